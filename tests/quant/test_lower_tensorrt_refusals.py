"""Lowering for TensorRT: what is refused, and by what name; scales and rounding that its parser takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgekit.errors import BadRequest
from edgekit.quant.graph import Unit, find_units, normalised
from edgekit.quant.lower import lower
from edgekit.quant.lower.tensorrt import positive
from edgekit.quant.targets import get_target
from edgekit.quant.weights import Stored, store
from tests.quant.engine_graphs import network, run, written
from tests.quant.lowering import Array, linear

TRT = get_target("trt")


def proto(path: Path) -> onnx.ModelProto:
    onnx.checker.check_model(path)
    return onnx.load(path)


@pytest.mark.parametrize(
    ("choice", "opset", "needed"), [("fp8", 18, 19), ("w4a16-64", 20, 21), ("nvfp4", 22, 23), ("w8a8", 12, 13)]
)
def test_an_opset_that_cannot_say_it_is_named(choice: str, opset: int, needed: int, tmp_path: Path):
    """A graph of an older opset is refused with both numbers; the first that can say it is taken."""
    with pytest.raises(BadRequest, match=rf"'product' is to be {choice}.*{needed}.* has opset {opset}"):
        written(tmp_path, linear(16, 64, opset=opset), choice, {"x": (-1.0, 1.0)})
    made = linear(16, 64, opset=needed)
    made.ir_version = 11
    proto(written(tmp_path, made, choice, {"x": (-1.0, 1.0)}))


def test_narrow_graphs_need_a_later_opset_for_int8(tmp_path: Path):
    """float16 scales exist from opset 19 on."""
    model = linear(16, 64, opset=18)
    for name in ("w", "b"):
        model.graph.initializers[name].const_value = ir.tensor(np.ones((64, 16) if name == "w" else 16, np.float16))
    with pytest.raises(BadRequest, match="opset 19"):
        written(tmp_path, model, "w8a8", {"x": (-1.0, 1.0)})


@pytest.mark.parametrize(
    ("k", "rank", "choice", "message"),
    [
        (96, 3, "w4a16-64", "96 inputs are no multiple of 64"),
        (72, 3, "nvfp4", "72 inputs are no multiple of 16"),
        (64, 4, "nvfp4", "reads 4 axes"),
        (64, 3, "fp8", "has no range"),
        (64, 3, "w8a8", "has no range"),
    ],
)
def test_what_tensorrt_does_not_take_is_refused_by_name(k: int, rank: int, choice: str, message: str, tmp_path: Path):
    """The message names the unit, what it was to be and why it cannot."""
    model = linear(16, k, rank=rank, opset=23)
    ranges = {} if "range" in message else {"x": (-1.0, 1.0)}
    with pytest.raises(BadRequest, match=message) as raised:
        written(tmp_path, model, choice, ranges)
    assert "'product'" in str(raised.value)
    assert choice in str(raised.value)


def test_a_refusal_leaves_the_graph_as_it_was():
    """Everything is checked before the first node is changed."""
    model = normalised(network())
    units = find_units(model)
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(BadRequest, match="has no range"):
        lower(model, units, {"to_q": "fp16", "conv1": "w8a8"}, {}, TRT)
    assert ir.to_proto(model).SerializeToString() == before


def test_scales_are_above_zero(tmp_path: Path):
    """A row of zeros gets the scale 1, one too small for its type the smallest number; a negative one is refused."""
    got = positive(np.array([0, 1e-9, 0.5], np.float32), ir.DataType.FLOAT16)
    np.testing.assert_array_equal(got, np.array([1, 2.0**-24, 0.5], np.float16))
    with pytest.raises(BadRequest, match="above 0"):
        positive(np.array([-1], np.float32), ir.DataType.FLOAT)
    model = linear(16, 64, opset=23, bias=False)
    weight = model.graph.initializers["w"].const_value.numpy().copy()
    weight[:, 3] = 0
    model.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    for choice in ("w8a8", "w4a16-64"):
        path = written(tmp_path, model, choice, {"x": (0.0, 0.0)})
        assert not run(path, x=np.ones((1, 2, 64), np.float32))[..., 3].any()
        stored = {each.name: onnx.numpy_helper.to_array(each) for each in proto(path).graph.initializer}
        assert all(array.min() > 0 for name, array in stored.items() if "scale" in name)


def test_a_store_of_ones_own_is_asked_for_every_matrix(tmp_path: Path):
    """The rounding is whoever's that calls; it is told the unit, and 4 bits are asked for with positive scales."""
    asked: list[tuple[str, str, str]] = []

    def note(matrix: Array, choice: object, code_bits: int, unit: Unit) -> Stored:
        asked.append((unit.id, choice.name, choice.activation))  # type: ignore[attr-defined]
        assert matrix.shape == (unit.n, unit.k)
        return store(matrix, choice, code_bits=code_bits)  # type: ignore[arg-type]

    ranges = {"t": (-4.0, 4.0), "h": (-4.0, 4.0)}
    choices = {"to_q": "w8a8", "to_k": "w4a16-64", "up": "fp8"}
    written(tmp_path, network(), choices, ranges, TRT, store=note)
    assert sorted(asked) == [("to_k", "w4a16-64", "static"), ("to_q", "w8a8", "static"), ("up", "fp8", "static")]
