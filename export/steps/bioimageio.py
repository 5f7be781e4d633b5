"""A BioImage.IO package: the network as ilastik, deepImageJ and others run it, with a tile and its answer to test with.

The package follows version 0.5 of the model description (https://bioimage.io, package ``bioimageio.spec``), which
writes and checks it. Its network is that of ``model.onnx`` without the casts at both ends: float32 intensities from 0
to 255 in, float32 probabilities out, which all programs have.
"""

from __future__ import annotations

import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.errors import ExportError
from export.steps.graph import OPSET, write_model
from unet.files import atomic_file
from unet.geometry import CONTEXT, GRID, HALO, MIN_SIZE
from unet.names import DEFAULT_THRESHOLD, INPUT, ONNX_FILE, OUTPUT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import onnx
    from numpy.typing import NDArray

_PAPER = "10.1007/978-3-319-24574-4_28"
_TEST_INPUT, _TEST_OUTPUT = "test_input.npy", "test_output.npy"
_README = """# {name}

Gives each pixel of an electron-microscopy slice the probability of not being membrane. Made by U-Net Medical on Triton.

- Input: intensities from 0 to 255, as in training: 8-bit slices stay as they are; other types are scaled to that.
- Convolutions are valid: the output is {context} pixels smaller, {margin} on each side. Mirror the slice's edges to
  keep its size.
- Sides: {smallest} pixels and multiples of {step} more.
- A pixel is membrane where the probability is not above {threshold}.

## Validation

{validation}
"""


def can_package() -> bool:
    """Whether the package that writes the description is installed."""
    return find_spec("bioimageio") is not None


def float_interface(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network with float32 in and out, without the casts at both ends.

    Args:
        model: as `export.steps.to_onnx` writes it; it stays as it is.
    """
    import onnx

    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    nodes = changed.graph.node
    first = next(node for node in nodes if node.op_type == "Cast" and node.input[0] == INPUT)
    last = next(node for node in nodes if node.op_type == "Cast" and node.output[0] == OUTPUT)
    for node in nodes:
        node.input[:] = [INPUT if name == first.output[0] else name for name in node.input]
        node.output[:] = [OUTPUT if name == last.input[0] else name for name in node.output]
    nodes.remove(first)
    nodes.remove(last)
    for end in (*changed.graph.input, *changed.graph.output):
        end.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    onnx.checker.check_model(changed)
    return changed


def packaged(path: Path) -> Callable[[NDArray[np.uint8]], NDArray[np.float16]]:
    """What runs the network in a package as the served one is run: uint8 tiles in, float16 probability out."""
    with zipfile.ZipFile(path) as packed:
        run = _session(packed.read(ONNX_FILE))
    return lambda tiles: run(tiles).astype(np.float16)


def _session(content: bytes) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        (found,) = session.run(None, {INPUT: tiles.astype(np.float32)})
        return np.asarray(found, np.float32)

    return run


def write_package(
    model: onnx.ModelProto, tile: NDArray[np.uint8], facts: Mapping[str, Any], path: Path, *, validation: str
) -> None:
    """Write the package, whole or not at all.

    Args:
        model: as `export.steps.to_onnx` writes it.
        tile: uint8 [1, 1, S, S], to test with.
        facts: of the network, as the card has them.
        path: the ZIP file to write.
        validation: what is known of the network's scores, in words.

    Raises:
        ExportError: ``bioimageio.spec`` is not installed, or finds a fault in the package.
    """
    try:
        from bioimageio.spec import InvalidDescr, load_description, save_bioimageio_package
        from pydantic import ValidationError
    except ImportError as error:
        raise ExportError(
            f"a BioImage.IO package needs bioimageio.spec ({error}): pip install 'unet-medical-triton[bioimageio]'"
        ) from error
    with tempfile.TemporaryDirectory(dir=path.parent) as name, atomic_file(path) as aside:
        folder = Path(name)
        write_model(float_interface(model), folder / ONNX_FILE)
        np.save(folder / _TEST_INPUT, tile.astype(np.float32))
        np.save(folder / _TEST_OUTPUT, _session((folder / ONNX_FILE).read_bytes())(tile))
        try:
            description = _description(folder, facts, validation)
        except ValidationError as error:
            # Of an answer that is near 0 everywhere, for one.
            faults = "; ".join(one["msg"] for one in error.errors())
            raise ExportError(f"{path.name} would be no valid package: {faults}; leave out --bioimageio") from error
        save_bioimageio_package(description, output_path=aside)
        found = load_description(aside, perform_io_checks=True)
        if isinstance(found, InvalidDescr):
            faults = "; ".join(one.msg for one in found.validation_summary.errors)
            raise ExportError(f"{path.name} is not a valid package: {faults}")


def _description(folder: Path, facts: Mapping[str, Any], validation: str) -> Any:
    from bioimageio.spec.common import FileDescr
    from bioimageio.spec.generic.v0_3 import CiteEntry
    from bioimageio.spec.model import v0_5

    name = f"U-Net membrane segmentation - {facts['base_filters']} filters"
    threshold = facts.get("threshold", DEFAULT_THRESHOLD)
    sizes = {"context": CONTEXT, "margin": HALO, "smallest": MIN_SIZE, "step": GRID}
    text = _README.format(name=name, threshold=threshold, validation=validation, **sizes)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return v0_5.ModelDescr(
        name=name,
        description="Membrane segmentation of electron-microscopy slices by a U-Net with valid convolutions.",
        documentation=FileDescr(source=folder / "README.md"),
        inputs=[_image(folder)],
        outputs=[_probability(folder)],
        weights=v0_5.WeightsDescr(onnx=v0_5.OnnxWeightsDescr(source=folder / ONNX_FILE, opset_version=OPSET)),
        cite=[CiteEntry(text="Ronneberger et al. 2015, U-Net", doi=_PAPER)],
        tags=["electron-microscopy", "membrane", "semantic-segmentation", "unet", "2d"],
        config={"unet_medical": {"threshold": threshold, "pixel_size_nm": facts.get("pixel_size_nm", {})}},
    )


def _image(folder: Path) -> Any:
    from bioimageio.spec.common import FileDescr
    from bioimageio.spec.model import v0_5

    sides = v0_5.ParameterizedSize(min=MIN_SIZE, step=GRID)
    return v0_5.InputTensorDescr(
        id=v0_5.TensorId(INPUT),
        description="one channel, intensities from 0 to 255",
        axes=[
            v0_5.BatchAxis(),
            v0_5.ChannelAxis(channel_names=[v0_5.Identifier("intensity")]),
            *(v0_5.SpaceInputAxis(id=v0_5.AxisId(side), size=sides) for side in "yx"),
        ],
        test_tensor=FileDescr(source=folder / _TEST_INPUT),
        data=v0_5.IntervalOrRatioDataDescr(type="float32", range=(0.0, 255.0)),
    )


def _probability(folder: Path) -> Any:
    from bioimageio.spec.common import FileDescr
    from bioimageio.spec.model import v0_5

    def side(name: str) -> Any:
        axis = v0_5.AxisId(name)
        size = v0_5.SizeReference(tensor_id=v0_5.TensorId(INPUT), axis_id=axis, offset=-CONTEXT)
        return v0_5.SpaceOutputAxis(id=axis, size=size)

    return v0_5.OutputTensorDescr(
        id=v0_5.TensorId(OUTPUT),
        description="probability of not being membrane",
        axes=[
            v0_5.BatchAxis(),
            v0_5.ChannelAxis(channel_names=[v0_5.Identifier("not_membrane")]),
            *(side(name) for name in "yx"),
        ],
        test_tensor=FileDescr(source=folder / _TEST_OUTPUT),
        data=v0_5.IntervalOrRatioDataDescr(type="float32", range=(0.0, 1.0)),
    )
