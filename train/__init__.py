"""Horovod TensorFlow trainer: slices and labels in, checkpoints and a SavedModel out."""

import os

# By itself TensorFlow takes oneDNN's convolutions only where the processor has AVX-512 instructions for networks.
# They are faster with AVX2 too: docs/training.md has the figures.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
