"""A training run: its folder, its ranks, its checkpoints and its log."""
