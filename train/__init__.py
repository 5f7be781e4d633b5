"""Horovod TensorFlow trainer: slices and labels in, checkpoints and a SavedModel out."""
