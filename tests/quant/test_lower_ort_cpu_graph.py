"""Lowering for ONNX Runtime on a CPU: what is shared, what it weighs on disk, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from edgekit.errors import BadRequest
from edgekit.quant.choices import CHOICES, Choice, WeightFormat
from edgekit.quant.fused import kernels
from edgekit.quant.graph import Unit, find_units, normalised
from edgekit.quant.lower import LOWERINGS, lower
from edgekit.quant.lower.common import rtn_store
from edgekit.quant.weights import Stored
from tests.quant.lowering import (
    NBITS,
    OPEN,
    STRICT,
    Lowered,
    attention_graph,
    best_integers,
    bias_of,
    by_block,
    close,
    convolution,
    graph,
    linear,
    lowered,
    range_of,
    stored_of,
    value,
    wide_ranges,
)


def test_one_value_is_rounded_once(tmp_path: Path):
    """Q, K and V read the same codes; a convolution reads the codes that the one before it wrote."""
    units = find_units(normalised(attention_graph()))
    made = lowered(tmp_path, attention_graph(), best_integers(units), wide_ranges(units), STRICT)
    written = made.ops()
    # c0, c1, c2, t, mixed, out, bent
    assert written.count("QuantizeLinear") == 7
    assert written.count("MatMulIntegerToFloat") == 6
    found = kernels(made.path)
    assert (found["QLinearConv"], found["MatMulIntegerToFloat"]) == (2, 6)
    assert found["MatMul"] + found["FusedMatMul"] == 2  # scores and mix have no weights
    assert found["Softmax"] == 1  # the engine's integer Softmax is slower than the float one


def test_a_whole_graph_stays_near_float(tmp_path: Path):
    """Integers throughout change the answer by a small share of its energy, in the same shapes."""
    units = find_units(normalised(attention_graph()))
    x = np.random.default_rng(15).standard_normal((3, 4, 8, 8)).astype(np.float32)
    plain = lowered(tmp_path, attention_graph(), {})(x=x)
    for choices in (best_integers(units), {unit.id: "fp16" for unit in units}):
        made = lowered(tmp_path, attention_graph(), choices, wide_ranges(units), STRICT)(x=x)
        assert np.square(made - plain).sum() < 0.01 * np.square(plain).sum()


@pytest.mark.parametrize("choice", ["fp32", "fp16", "w8a8", "w8a8-row", "w8a16", "w4a16-32", "w2a16-32"])
def test_the_signature_stays(choice: str, tmp_path: Path):
    """Inputs and outputs keep names, types and shapes, also where the output is a convolution's own value."""
    plain = attention_graph()
    units = find_units(normalised(plain))
    fits = {unit.id: choice for unit in units if unit.op == "MatMul" or choice in ("fp32", "fp16", "w8a8")}
    made = lowered(tmp_path, plain, fits, wide_ranges(units))
    assert [spec.name for spec in made.session.inputs] == ["x"]
    assert [(spec.name, spec.shape, spec.dtype) for spec in made.session.outputs] == [
        ("y", ("batch", 4, 8, 8), "float32")
    ]
    model = ir.load(made.path)
    assert model.opset_imports[""] == 20
    assert model.ir_version == 10


def sizes(made: Lowered) -> int:
    """Bytes of all initializers."""
    return sum(tensor.nbytes for tensor in made.initializers().values())


@pytest.mark.parametrize("choice", ["fp32", "fp16", "w8a8", "w8a8-row", *NBITS])
@pytest.mark.parametrize(("n", "k"), [(64, 256), (33, 100)])
def test_a_file_holds_what_the_choice_declares(choice: str, n: int, k: int, tmp_path: Path):
    """Weights, scales and padding are the declared bytes; a bias and a few scalars come on top."""
    made = lowered(tmp_path, linear(n, k), choice, {"x": (-1, 1)})
    declared = STRICT.choice(choice).weight.bytes(n, k) + 4 * n
    assert declared <= sizes(made) <= declared + 32
    data = made.path.with_name("graph.onnx.data")
    assert data.stat().st_size <= declared
    assert "w" not in made.initializers() or choice == "fp32"


def test_an_integer_convolution_weighs_what_is_declared(tmp_path: Path):
    """Its bias costs a code and a step per output."""
    made = lowered(tmp_path, convolution(32, 16, 3), "w8a8", {"x": (-1, 1), "y": (-9, 9)})
    declared = CHOICES["w8a8"].weight.bytes(32, 144) + 8 * 32
    assert declared <= sizes(made) <= declared + 16


def test_weights_are_stored_once_and_only_when_written(tmp_path: Path):
    """Lowering reads no weight; writing makes each matrix once, whatever is derived from it."""
    model = normalised(attention_graph())
    units = find_units(model)
    asked: list[tuple[str, str, int]] = []

    def counting(matrix: Any, choice: Choice, code_bits: int, unit: Unit) -> Stored:
        asked.append((unit.id, choice.name, code_bits))
        assert matrix.shape == (unit.n, unit.k)
        return rtn_store(matrix, choice, code_bits, unit)

    choices = best_integers(units) | {"up": "w4a16-32", "down": "w8a8-row"}
    lower(model, units, choices, wide_ranges(units), STRICT, counting)
    assert asked == []
    ir.save(model, tmp_path / "graph.onnx", external_data="graph.onnx.data")
    integers = {unit: choice for unit, choice in choices.items() if choice != "fp32"}
    assert sorted(asked) == sorted((unit, choice, 7) for unit, choice in integers.items())


def test_units_that_share_weights_share_what_is_stored(tmp_path: Path):
    """One initializer read by two products is stored once under the same choice."""
    weights = {"w": np.random.default_rng(16).standard_normal((32, 32)).astype(np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="one"),
        helper.make_node("MatMul", ["h", "w"], ["y"], name="two"),
    ]
    model = graph(nodes, weights, [value("x", ["b", 32])], [value("y", ["b", 32])])
    for choice in ("fp16", "w8a8", "w4a16-32"):
        made = lowered(tmp_path, model, choice, {"x": (-1, 1), "h": (-9, 9)})
        wide = [tensor for tensor in made.initializers().values() if tensor.nbytes >= 32 * 32 // 2]
        assert len(wide) == 1
        mixed = lowered(tmp_path, model, {"one": choice, "two": "fp32"}, {"x": (-1, 1), "h": (-9, 9)})
        assert "w" in mixed.initializers()


def refuse(model: ir.Model, choices: dict[str, str], ranges: Any, target: Any, *words: str) -> None:
    """Lowering raises BadRequest with these words, and changes nothing."""
    model = normalised(model)
    before = [node.op_type for node in model.graph]
    with pytest.raises(BadRequest) as why:
        lower(model, find_units(model), choices, ranges, target)
    for word in words:
        assert word in str(why.value)
    assert [node.op_type for node in model.graph] == before


def test_refusals_name_what_is_wrong():
    """An unknown unit, a choice that is not for it, a value that was not measured: by name, before any change."""
    refuse(linear(16, 32), {"nowhere": "fp16"}, {}, OPEN, "nowhere")
    refuse(linear(16, 32), {"product": "w3"}, {}, OPEN, "w3", "known")
    refuse(linear(16, 32), {"product": "fp8"}, {}, STRICT, "product", "fp8", "cpu:any", "w4a16-32")
    refuse(convolution(16, 8, 3), {"product": "w8a8"}, {}, STRICT, "product", "fp32, fp16")
    refuse(linear(16, 32), {"product": "w8a8"}, {"y": (0, 1)}, OPEN, "product", "'x'")
    refuse(convolution(16, 8, 3), {"product": "w8a8"}, {"x": (0, 1)}, OPEN, "product", "'y'")
    for ends in ((1.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))):
        refuse(linear(16, 32), {"product": "w8a8"}, {"x": ends}, OPEN, "product", "'x'", "again")


def test_graphs_that_cannot_hold_integers_are_refused():
    """Too old an opset, weights that are not float32, a bias that is computed."""
    refuse(linear(16, 32, opset=12), {"product": "w8a8-row"}, {}, OPEN, "opset 12")
    half = linear(16, 32)
    weights = half.graph.initializers["w"]
    weights.const_value = ir.tensor(weights.const_value.numpy().astype(np.float16), name="w")
    refuse(half, {"product": "w4a16-32"}, {}, OPEN, "product", "FLOAT16")
    weights = {"w": np.ones((16, 8, 3, 3), np.float32), "b": np.ones(16, np.float32)}
    nodes = [
        helper.make_node("Add", ["b", "more"], ["sum"], name="sum"),
        helper.make_node("Conv", ["x", "w", "sum"], ["y"], name="product", pads=[1] * 4),
    ]
    ends = [value("x", ["n", 8, 4, 4]), value("more", [16])], [value("y", ["n", 16, 4, 4])]
    refuse(graph(nodes, weights, *ends), {"product": "w8a8"}, {"x": (0, 1), "y": (0, 1)}, OPEN, "product", "bias")


def test_a_weight_that_fp16_cannot_hold_is_named(tmp_path: Path):
    """Infinity is never written."""
    model = linear(16, 32)
    weights = model.graph.initializers["w"]
    weights.const_value = ir.tensor(weights.const_value.numpy() * np.float32(1e5), name="w")
    with pytest.raises(BadRequest, match=r"product.*65504"):
        lowered(tmp_path, model, "fp16")


def test_narrow_weights_are_left_alone(tmp_path: Path):
    """fp16 of weights that are float16 already changes nothing."""
    weight = np.random.default_rng(17).standard_normal((32, 16)).astype(np.float16)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    ends = (
        [value("x", ["b", 32], TensorProto.FLOAT16)],
        [value("y", ["b", 16], TensorProto.FLOAT16)],
    )
    made = lowered(tmp_path, graph([node], {"w": weight}, *ends), "fp16")
    assert made.ops() == ["MatMul"]


def test_a_bias_is_taken_along_only_where_it_alone_reads_the_product(tmp_path: Path):
    """A product that something else reads too, or a sum of another shape, stays as it is."""
    rng = np.random.default_rng(18)
    weights = {"w": rng.standard_normal((32, 16)).astype(np.float32), "b": rng.standard_normal(16).astype(np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], name="product"),
        helper.make_node("Add", ["b", "p"], ["s"], name="bias"),
        helper.make_node("Mul", ["s", "p"], ["y"], name="gate"),
    ]
    model = graph(nodes, weights, [value("x", ["n", 32])], [value("y", ["n", 16])])
    x = rng.standard_normal((3, 32)).astype(np.float32)
    plain = lowered(tmp_path, model, "fp32")(x=x)
    made = lowered(tmp_path, model, "w8a8", {"x": range_of(x)})
    assert made.ops().count("Add") == 1
    close(made(x=x), plain, 0.05)


def test_every_engine_has_a_row():
    """A target's engine leads to a module that lowers for it."""
    assert set(LOWERINGS) >= {"ort-cpu", STRICT.engine}


def test_zero_points_are_stored_beside_their_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A format with zero points gives the kernel a third input of the declared size, and the same numbers."""
    choice = Choice("w4a16-32z", WeightFormat("int", 4, 32, 16, zero=True))
    monkeypatch.setitem(CHOICES, choice.name, choice)
    model = linear(24, 100)
    made = lowered(tmp_path, model, choice.name)
    x = np.random.default_rng(19).standard_normal((2, 3, 100)).astype(np.float32)
    _, weight = stored_of(model, choice.name)
    close(made(x=x), by_block(x, 32) @ weight.T + bias_of(model))
    assert sizes(made) == choice.weight.bytes(24, 100) + 4 * 24
