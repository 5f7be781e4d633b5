"""A page that shows the slices of a volume with what was found in them, read from the disk as they are asked for."""
