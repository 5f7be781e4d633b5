"""SavedModel to ONNX: channels first, dynamic batch, height and width, nothing but the network in the graph."""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.errors import ExportError
from export.steps.graph import OPSET, check_graph, write_model
from export.steps.reference import import_tensorflow, load_signature
from unet import __version__
from unet.errors import command, say
from unet.names import INPUT, OUTPUT

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    import onnx


def convert(saved_model: str | os.PathLike[str]) -> onnx.ModelProto:
    """Convert the ``serving_default`` signature of a SavedModel.

    Returns:
        A graph from ``image`` uint8 [N, 1, H, W] to ``probability`` float16 [N, 1, H - 184, W - 184] that computes
        in float32; normalisation is in it.

    Raises:
        ExportError: the SavedModel is not one of this project's, or the conversion gave something else than the network
            alone.
    """
    tf = import_tensorflow()
    import tf2onnx

    serve = load_signature(saved_model, "serving_default")
    network = tf.function(lambda image: {OUTPUT: serve(image=image)[OUTPUT]})
    with _copies_collected():
        model, _ = tf2onnx.convert.from_function(
            network,
            input_signature=[tf.TensorSpec([None, None, None, 1], tf.uint8, name=INPUT)],
            opset=OPSET,
            inputs_as_nchw=[INPUT],
            outputs_as_nchw=[OUTPUT],
        )
    _drop_last_reshapes(model)
    _name_everything(model)
    check_graph(model, half=False)
    return model


@contextlib.contextmanager
def _copies_collected() -> Iterator[None]:
    """Free the copies of all weights that tf2onnx makes for each of its some 30 optimizers.

    They are held in reference cycles of few objects, for which Python does not start its collector: 8 GB with 64
    filters.
    """
    from tf2onnx.optimizer.optimizer_base import GraphOptimizerBase

    optimize = GraphOptimizerBase.optimize

    def collect_and_optimize(self: Any, graph: Any, iteration: int) -> Any:
        gc.collect()
        return optimize(self, graph, iteration)

    # The collector need not look through TensorFlow's hundreds of thousands of objects each time.
    gc.freeze()
    GraphOptimizerBase.optimize = collect_and_optimize
    try:
        yield
    finally:
        GraphOptimizerBase.optimize = optimize
        gc.unfreeze()
        gc.collect()


def _drop_last_reshapes(model: onnx.ModelProto) -> None:
    """Remove the operators at the end that transpose a single plane, which changes nothing.

    Usually it is one Reshape. In one of some hundred conversions tf2onnx leaves the four operators that it merges
    otherwise; the reason was not found.
    """
    graph = model.graph
    producers = {output: node for node in graph.node for output in node.output}
    last = producers[OUTPUT]
    while last.op_type in ("Reshape", "Squeeze", "Unsqueeze"):
        graph.node.remove(last)
        last = producers[last.input[0]]
    last.output[0] = OUTPUT


def _name_everything(model: onnx.ModelProto) -> None:
    """Name nodes after the network's layers, tensors after their node and constants after their first reader.

    tf2onnx's own names hold counters and call paths; these are readable, and the same in every run.
    """
    graph = model.graph
    names = {INPUT: INPUT, OUTPUT: OUTPUT, "": ""}
    ordered = {i.name: i for i in graph.initializer}
    used: Counter[str] = Counter()
    kept: list[Any] = []
    for node in graph.node:
        name = _layer(node.name, *reversed(node.input)) + node.op_type
        used[name] += 1
        node.name = name if used[name] == 1 else f"{name}_{used[name]}"
        for index, tensor in enumerate(node.input):
            if tensor in ordered and tensor not in names:
                names[tensor] = f"{node.name}.{index}"
                kept.append(ordered[tensor])
        for tensor in node.output:
            names.setdefault(tensor, node.name)
        for field in (node.input, node.output):
            field[:] = [names[tensor] for tensor in field]
    for initializer in kept:
        initializer.name = names[initializer.name]
    copies = [type(i).FromString(i.SerializeToString()) for i in kept]
    del graph.initializer[:]
    graph.initializer.extend(copies)
    del graph.value_info[:]
    _name_ports(model)


def _layer(*paths: str) -> str:
    """The first Keras layer in TensorFlow's paths, with a slash; empty if there is none."""
    for path in paths:
        layers = [part for part in path.split("/")[:-1] if "PartitionedCall" not in part and part != "unet"]
        if layers:
            return f"{layers[0]}/"
    return ""


def _name_ports(model: onnx.ModelProto) -> None:
    graph = model.graph
    for value, symbols in ((graph.input[0], ("N", "H", "W")), (graph.output[0], ("N", "H_out", "W_out"))):
        dims = value.type.tensor_type.shape.dim
        if len(dims) != 4:
            raise ExportError(f"{value.name} has {len(dims)} dimensions where 4 are due: report this network")
        for index, symbol in zip((0, 2, 3), symbols):
            dims[index].dim_param = symbol
    graph.name = "unet"
    graph.doc_string = "non-membrane probability of raw intensities"
    model.producer_name, model.producer_version = "unet-medical-triton", __version__
    default = [opset for opset in model.opset_import if opset.domain == ""]
    copies = [type(o).FromString(o.SerializeToString()) for o in default]
    del model.opset_import[:]
    model.opset_import.extend(copies)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Convert a SavedModel from the command line."""
    parser = argparse.ArgumentParser(prog="export.steps.to_onnx", description="Convert a SavedModel to ONNX, unproven.")
    parser.add_argument("saved_model", type=Path, help="folder of the SavedModel")
    parser.add_argument("out", type=Path, help="ONNX file to write")
    args = parser.parse_args(argv)
    write_model(convert(args.saved_model), args.out)
    say(str(args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
