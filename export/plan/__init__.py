"""TensorRT: build a plan, run it, and prove it."""
