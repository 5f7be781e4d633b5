"""The names that one room writes and another reads: tensors of the served model, and the artefacts with their files."""

from __future__ import annotations

# Of the served model: uint8 [N, 1, H, W] in, float16 [N, 1, H - 184, W - 184] out.
INPUT, OUTPUT = "image", "probability"

# The artefacts of an export: the one name that the card, messages and tables have for each ...
SAVED_MODEL, ONNX, HALF, INT8, PLAN = "saved_model", "onnx", "onnx_fp16", "int8", "plan"
BIOIMAGEIO = "bioimageio"
# ... and its file, relative to the folder of the card. The folder of the SavedModel has the artefact's own name.
ONNX_FILE = "model.onnx"
HALF_FILE = "model.fp16.onnx"
INT8_FILE = "model.int8.zip"
BIOIMAGEIO_FILE = "bioimageio.zip"
PLAN_FILE = "model.plan"
# Of the probability: a pixel is membrane where it is not above this, unless the training chose another.
DEFAULT_THRESHOLD = 0.5
