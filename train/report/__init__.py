"""A page that shows how a run of training learned, and where its network joins and cuts cells."""
