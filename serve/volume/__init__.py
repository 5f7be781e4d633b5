"""A volume from its file to the files that are written of it."""
