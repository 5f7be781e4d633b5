from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.errors import ExportError
from export.steps.graph import base_filters, check_graph, read_model, write_model


def test_what_the_exporter_makes_is_accepted(single: Any, half: Any) -> None:
    check_graph(single, half=False)
    check_graph(half, half=True)
    assert base_filters(single) == 2


@pytest.mark.parametrize("op", ["Transpose", "Shape", "Identity"])
def test_foreign_operators_are_refused_by_name(single: Any, op: str) -> None:
    model = copy.deepcopy(single)
    model.graph.node.insert(1, helper.make_node(op, [model.graph.node[0].output[0]], ["stray"], name="stray"))
    with pytest.raises(ExportError, match=f"operators {op}, which"):
        check_graph(model, half=False)


def test_weights_stored_without_use_are_refused(single: Any) -> None:
    model = copy.deepcopy(single)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.float32), "spare"))
    with pytest.raises(ExportError, match="twice or unused"):
        check_graph(model, half=False)


def test_another_interface_is_refused(single: Any) -> None:
    model = copy.deepcopy(single)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3
    with pytest.raises(ExportError, match="inputs and outputs"):
        check_graph(model, half=False)
    model = copy.deepcopy(single)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
    with pytest.raises(ExportError, match="inputs and outputs"):
        check_graph(model, half=False)
    model = copy.deepcopy(single)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 572
    with pytest.raises(ExportError, match="inputs and outputs"):
        check_graph(model, half=False)


def test_a_float32_island_in_a_float16_graph_is_refused(half: Any, single: Any) -> None:
    with pytest.raises(ExportError, match="FLOAT where FLOAT16 is due"):
        check_graph(single, half=True)
    with pytest.raises(ExportError, match="FLOAT16 where FLOAT is due"):
        check_graph(half, half=False)
    model = copy.deepcopy(half)
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    source = relu.input[0]
    relu.input[0] = "back"
    position = list(model.graph.node).index(relu)
    model.graph.node.insert(position, helper.make_node("Cast", ["island"], ["back"], to=TensorProto.FLOAT16))
    model.graph.node.insert(position, helper.make_node("Cast", [source], ["island"], to=TensorProto.FLOAT))
    with pytest.raises(ExportError, match="island are FLOAT"):
        check_graph(model, half=True)


def test_files_that_are_no_model_get_one_sentence(single: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be read"):
        read_model(tmp_path / "none.onnx")
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "garbage.onnx").write_bytes(b"not a model")
    write_model(single, tmp_path / "whole.onnx")
    (tmp_path / "half.onnx").write_bytes((tmp_path / "whole.onnx").read_bytes()[:5000])
    for name in ("empty", "garbage", "half"):
        with pytest.raises(ExportError, match=rf"{name}\.onnx is not a valid ONNX model"):
            read_model(tmp_path / f"{name}.onnx")
