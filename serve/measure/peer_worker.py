"""One way to run the trained network, measured in a process of its own: what ``serve/peers.py`` starts.

It runs in the project's environment or in that of the peers, so it imports nothing of the project before it knows which
subject it is. Its last line of output is a JSON object.
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


def engine(inputs: Path) -> Infer:
    """What this project serves: the engine that the card names, as Triton's backend runs it."""
    from unet.card import Card
    from unet.engine.cpu import load_engine

    return load_engine(Card.load(inputs / "artefacts")).infer


def openvino(inputs: Path) -> Infer:
    """OpenVINO with the settings that it has by itself, which take bf16 where the CPU has it."""
    import openvino as ov

    compiled = ov.Core().compile_model(str(inputs / "model.onnx"), "CPU")
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


def gemm_peak(seconds: float) -> dict[str, float]:
    """The machine's matrix product, 4096 x 4096 x 4096, in each number format: GFLOP/s (int8: GOP/s), the best call."""
    import torch

    side = GEMM_SIDE
    operands = {
        "float32": (torch.randn(side, side), torch.mm),
        "bfloat16": (torch.randn(side, side).bfloat16(), torch.mm),
        "int8": (torch.randint(-128, 128, (side, side), dtype=torch.int8), torch._int_mm),
    }
    peaks = {}
    for name, (matrix, product) in operands.items():
        product(matrix, matrix)
        best, until = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < until:
            started = time.perf_counter()
            product(matrix, matrix)
            best = min(best, time.perf_counter() - started)
        peaks[name] = 2 * side**3 / best / 1e9
    return peaks


def img_per_s(infer: Infer, tiles: Tiles, seconds: float) -> float:
    """Images a second over at least so many seconds, after one call that is not measured."""
    infer(tiles)
    calls, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or calls == 0:
        infer(tiles)
        calls += 1
    return calls * len(tiles) / elapsed


def main(name: str, folder: str, seconds: str, *batch_sizes: str) -> None:
    """Measure one subject; its answer to the first tiles goes to ``FOLDER/answers/NAME.npy``."""
    inputs = Path(folder)
    if name == "gemm":
        result: dict[str, Any] = {"peak": gemm_peak(float(seconds))}
    else:
        tiles: Tiles = np.load(inputs / "tiles.npy")
        infer = SUBJECTS[name](inputs)
        answers = inputs / "answers"
        answers.mkdir(exist_ok=True)
        np.save(answers / f"{name}.npy", infer(tiles[:2]).astype(np.float32))
        rates = {size: img_per_s(infer, tiles[: int(size)], float(seconds)) for size in batch_sizes}
        result = {"img_per_s": rates}
    sys.stdout.write(f"\n{json.dumps(result)}\n")


if __name__ == "__main__":
    # The script's own folder would hide the packages of the same names.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    main(*sys.argv[1:])
