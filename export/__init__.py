"""From a trained SavedModel to ONNX, FP16 ONNX and an engine, each step checked against the one before."""
