"""Tiles to a server and their probabilities back."""
