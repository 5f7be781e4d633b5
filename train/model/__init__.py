"""The network, its losses, and the SavedModel that it is written as."""
