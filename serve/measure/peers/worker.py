"""One way to run the trained network, measured in a process of its own: what ``serve/peers.py`` starts.

It runs in the project's environment or in that of the peers, where only the project's modules without dependencies can
be imported. Its last line of output is a JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Tiles = npt.NDArray[np.uint8]
# uint8 [N, 1, S, S] to the probability of "not membrane", [N, 1, S - 184, S - 184], any float type.
Infer = Callable[[Tiles], npt.NDArray[Any]]

LEVELS = 5
GEMM_SIDE = 4096
GEMM = "gemm_"
# The instructions that a number format needs; without them libraries fall back to reference code, in which one call
# takes minutes.
NEEDS = {"float32": "", "bfloat16": "bf16", "int8": "vnni"}
FORMATS = {"tensorflow_bf16": "bfloat16", "pytorch_bf16": "bfloat16", **{GEMM + one: one for one in NEEDS}}


def missing_instructions(name: str) -> str:
    """Why a subject is not measured on this processor; empty if it is."""
    from unet.machine import instruction_sets

    number_format = FORMATS.get(name, "float32")
    if NEEDS[number_format] in ("", *instruction_sets()):
        return ""
    return f"this processor has no instructions for {number_format}"


def engine(inputs: Path) -> Infer:
    """What this project serves: the engine that the card names, as Triton's backend runs it."""
    from unet.card import Card
    from unet.engine.cpu import load_engine

    return load_engine(Card.load(inputs / "artefacts")).infer


def openvino(inputs: Path) -> Infer:
    """OpenVINO with the settings that it has by itself, which take bf16 where the CPU has it.

    Held to instructions without bf16 it still chooses bf16 by the processor, and fails: then it gets float32, which it
    takes by itself on a processor without them.
    """
    import openvino as ov

    settings = {"INFERENCE_PRECISION_HINT": "f32"} if missing_instructions("tensorflow_bf16") else {}
    compiled = ov.Core().compile_model(str(inputs / "model.onnx"), "CPU", settings)
    return lambda tiles: np.asarray(compiled({"image": tiles})[0])


def onnxruntime(inputs: Path) -> Infer:
    """ONNX Runtime with the settings that it has by itself."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(inputs / "model.onnx"), providers=["CPUExecutionProvider"])
    return lambda tiles: np.asarray(session.run(None, {"image": tiles})[0])


def tensorflow(inputs: Path) -> Infer:
    """The SavedModel's serving signature."""
    import tensorflow as tf

    serve = tf.saved_model.load(str(inputs / "saved_model")).signatures["serving_default"]

    def infer(tiles: Tiles) -> npt.NDArray[Any]:
        return np.moveaxis(serve(image=tf.constant(np.moveaxis(tiles, 1, -1)))["probability"].numpy(), -1, 1)

    return infer


def tensorflow_bf16(inputs: Path) -> Infer:
    """The same with oneDNN's automatic bfloat16."""
    import tensorflow as tf

    tf.config.optimizer.set_experimental_options({"auto_mixed_precision_onednn_bfloat16": True})
    return tensorflow(inputs)


def torch_network(weights: Path) -> Any:
    """The network as a PyTorch user would write it, float32 [N, 1, H, W] raw intensities to the probability.

    Args:
        weights: .npz with the kernels and biases of TensorFlow's 23 layers in their order, as arr_0 to arr_45.
    """
    import torch
    from torch import nn

    with np.load(weights) as stored:
        values = iter([stored[f"arr_{index}"] for index in range(46)])

    def convolution(relu: bool = True) -> nn.Module:
        kernel, bias = next(values), next(values)
        layer = nn.Conv2d(kernel.shape[2], kernel.shape[3], kernel.shape[0])
        layer.weight.data = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
        layer.bias.data = torch.from_numpy(bias)  # type: ignore[union-attr]
        return nn.Sequential(layer, nn.ReLU()) if relu else layer

    def up_convolution() -> nn.Module:
        kernel, bias = next(values), next(values)
        incoming, filters = kernel.shape[2], kernel.shape[3] // 4
        layer = nn.ConvTranspose2d(incoming, filters, 2, stride=2)
        layer.weight.data = torch.from_numpy(kernel.reshape(incoming, 2, 2, filters).transpose(0, 3, 1, 2).copy())
        layer.bias.data = torch.from_numpy(bias)  # type: ignore[union-attr]
        return layer

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.ModuleList([nn.Sequential(convolution(), convolution()) for _ in range(LEVELS)])
            ups = [(up_convolution(), convolution(), convolution()) for _ in range(LEVELS - 1)]
            self.rise = nn.ModuleList([up for up, _, _ in ups])
            self.up = nn.ModuleList([nn.Sequential(first, second) for _, first, second in ups])
            self.head = convolution(relu=False)

        def forward(self, image: Any) -> Any:
            tensor, skips = image / 127.5 - 1, []
            for level, block in enumerate(self.down):
                if level:
                    tensor = nn.functional.max_pool2d(tensor, 2)
                tensor = block(tensor)
                skips.append(tensor)
            for rise, block, skip in zip(self.rise, self.up, reversed(skips[:-1])):
                tensor = rise(tensor)
                crop = (skip.shape[-1] - tensor.shape[-1]) // 2
                tensor = block(torch.cat([skip[..., crop:-crop, crop:-crop], tensor], 1))
            return torch.softmax(self.head(tensor).float(), 1)[:, 1:]

    return UNet().eval()


def _torch(inputs: Path, *, compiled: bool, bf16: bool) -> Infer:
    import torch

    network = torch_network(inputs / "weights.npz").to(memory_format=torch.channels_last)
    run = torch.compile(network) if compiled else network

    def infer(tiles: Tiles) -> npt.NDArray[Any]:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            answer: npt.NDArray[Any] = run(torch.from_numpy(tiles).float()).numpy()
        return answer

    return infer


def pytorch(inputs: Path) -> Infer:
    """PyTorch, eager, float32."""
    return _torch(inputs, compiled=False, bf16=False)


def pytorch_compiled(inputs: Path) -> Infer:
    """PyTorch, compiled, float32."""
    return _torch(inputs, compiled=True, bf16=False)


def pytorch_bf16(inputs: Path) -> Infer:
    """PyTorch, compiled, bfloat16 where autocast takes it."""
    return _torch(inputs, compiled=True, bf16=True)


SUBJECTS: dict[str, Callable[[Path], Infer]] = {
    function.__name__: function
    for function in (
        *(engine, openvino, onnxruntime, tensorflow, tensorflow_bf16),
        *(pytorch, pytorch_compiled, pytorch_bf16),
    )
}


def gemm_peak(number_format: str, seconds: float) -> float:
    """The machine's matrix product, 4096 x 4096 x 4096, in a number format: GFLOP/s (int8: GOP/s), the best call."""
    import torch

    side = GEMM_SIDE
    if number_format == "int8":
        matrix, product = torch.randint(-128, 128, (side, side), dtype=torch.int8), torch._int_mm
    else:
        matrix, product = torch.randn(side, side).to(getattr(torch, number_format)), torch.mm
    product(matrix, matrix)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        product(matrix, matrix)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best / 1e9


def img_per_s(infer: Infer, tiles: Tiles, seconds: float) -> float:
    """Images a second over at least so many seconds, after one call that is not measured."""
    infer(tiles)
    calls, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or calls == 0:
        infer(tiles)
        calls += 1
    return calls * len(tiles) / elapsed


def write_weights(inputs: Path) -> None:
    """Write the SavedModel's variables, in their order, to ``weights.npz``, for the peers that read no SavedModel."""
    import tensorflow as tf

    variables = tf.saved_model.load(str(inputs / "saved_model")).model.variables
    np.savez(inputs / "weights.npz", *(variable.numpy() for variable in variables))


def measure(name: str, inputs: Path, seconds: float, batch_sizes: list[int]) -> dict[str, Any]:
    """Rates of one subject by batch size; its answer to the first tiles goes to ``FOLDER/answers/NAME.npy``."""
    tiles: Tiles = np.load(inputs / "tiles.npy")
    infer = SUBJECTS[name](inputs)
    (inputs / "answers").mkdir(exist_ok=True)
    # In the shape that is measured: a compiled network would otherwise be compiled for any shape.
    answer = infer(tiles[: batch_sizes[0]])
    np.save(inputs / "answers" / f"{name}.npy", answer[:2].astype(np.float32))
    rates = {size: img_per_s(infer, tiles[:size], seconds) for size in batch_sizes}
    # Our engine chooses its number format by the processor's instructions.
    ours = getattr(infer, "__self__", None)
    return {"img_per_s": rates, "precision": "" if ours is None else ours.choice.precision}


def main(name: str, folder: str, seconds: str, *batch_sizes: str) -> None:
    """Measure one subject, or say why this processor cannot."""
    skipped, inputs = missing_instructions(name), Path(folder)
    if skipped:
        result: dict[str, Any] = {"skipped": skipped}
    elif name == "weights":
        result = {}
        write_weights(inputs)
    elif name.startswith(GEMM):
        result = {"peak": gemm_peak(name[len(GEMM) :], float(seconds))}
    else:
        result = measure(name, inputs, float(seconds), [int(size) for size in batch_sizes])
    sys.stdout.write(f"\n{json.dumps(result)}\n")


if __name__ == "__main__":
    # The script's own folder would hide the packages of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[3])
    main(*sys.argv[1:])
