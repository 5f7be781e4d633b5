"""TIFF stacks: read page by page, written in order or by blocks of rows."""
