"""OME-NGFF, that is OME-Zarr: volumes in and out."""
