"""The names that one room writes and another reads: tensors of the served model, and the artefacts' files."""

from __future__ import annotations

# Of the served model: uint8 [N, 1, H, W] in, float16 [N, 1, H - 184, W - 184] out.
INPUT, OUTPUT = "image", "probability"

# Of an export, relative to the folder of its card.
SAVED_MODEL = "saved_model"
ONNX_FILE = "model.onnx"
HALF_FILE = "model.fp16.onnx"
INT8_FILE = "model.int8.zip"
PLAN_FILE = "model.plan"
