"""The same network by other libraries, and the machine's own limit."""
