"""What runs an exported network on this machine: OpenVINO or ONNX Runtime on a CPU, a TensorRT plan on a GPU."""
