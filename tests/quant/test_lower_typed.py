"""Products of another float type between Casts, and casts that cancel: which types, which numbers, what stays."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgekit.errors import BadRequest
from edgekit.quant.graph import Unit, find_units, normalised
from edgekit.quant.lower.typed import FLOAT_TYPES, cancel_casts, cast_of, check_typed, product_type, retype
from tests.quant.engine_graphs import network
from tests.quant.lowering import Array, convolution, convolved, graph, linear, table_graph, value

NARROW = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
CASTS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
NUMBERS = np.array([0, -0.0, 1, 1 / 3, -2.7, 1e-7, 6e-5, 65504, 1.0009765625, 3.14159, -1e30, np.inf], np.float32)


def retyped(model: ir.Model, choice: str) -> tuple[ir.Model, Unit]:
    """The one unit in another type."""
    model = normalised(model)
    (unit,) = find_units(model)
    retype(model, next(node for node in model.graph if node.name == unit.id), unit, choice)
    RemoveUnusedNodesPass()(model)
    return model, unit


def answer(model: ir.Model, folder: Path, **feeds: Array) -> Array:
    """By every operator's definition, in the types that are written: engines widen what they have no kernel for."""
    path = folder / "graph.onnx"
    ir.save(model, path)
    onnx.checker.check_model(path)
    onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    return ReferenceEvaluator(onnx.load(path)).run(None, feeds)[0]


def types_of(model: ir.Model, node_name: str) -> set[ir.DataType | None]:
    node = next(node for node in model.graph if node.name == node_name)
    return {each.dtype for each in (*node.inputs, *node.outputs) if each is not None}


def chain(*names: str) -> ir.Model:
    """x, cast to one type after another."""
    steps = ["x", *(f"v{i}" for i in range(len(names) - 1)), "y"]
    nodes = [
        helper.make_node("Cast", [steps[i]], [steps[i + 1]], name=f"cast{i}", to=CASTS[name])
        for i, name in enumerate(names)
    ]
    made = graph(nodes, {}, [value("x", ["n"])], [value("y", ["n"], CASTS[names[-1]])])
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(made)))


def cast_through(x: Array, names: tuple[str, ...]) -> Array:
    for name in names:
        with np.errstate(over="ignore"):
            x = x.astype(NARROW.get(name, np.float32))
    return x


@pytest.mark.parametrize("choice", NARROW)
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_made_in_the_narrow_type(choice: str, bias: bool, tmp_path: Path):
    """Data and weights are rounded to it, the product too, and a bias behind it is added in float32."""
    x = np.random.default_rng(1).standard_normal((2, 5, 48)).astype(np.float32)
    model, unit = retyped(linear(16, 48, bias=bias), choice)
    assert types_of(model, unit.id) == {FLOAT_TYPES[choice]}
    dtype = NARROW[choice]
    weight = model.graph.initializers[f"w.{choice}"].const_value.numpy()
    plain = x.astype(dtype).astype(np.float64) @ weight.astype(np.float64)
    wanted = plain.astype(np.float32) + (linear(16, 48).graph.initializers["b"].const_value.numpy() if bias else 0)
    step = 2.0 ** -(7 if choice == "bf16" else 10)
    got = answer(model, tmp_path, x=x)
    assert got.dtype == np.float32
    assert np.abs(got - wanted).max() <= 3 * step * np.abs(plain).max()


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_is_made_in_float16_with_its_bias(kernel: int, stride: int, bias: bool, tmp_path: Path):
    """A convolution's bias lies inside the product, so it is narrow as well."""
    x = np.random.default_rng(2).standard_normal((2, 16, 6, 6)).astype(np.float32)
    source = convolution(24, 16, kernel, stride, bias=bias)
    model, unit = retyped(source, "fp16")
    assert types_of(model, unit.id) == {ir.DataType.FLOAT16}
    weight = source.graph.initializers["w"].const_value.numpy().reshape(24, -1)
    wanted = convolved(x.astype(np.float16), weight.astype(np.float16).astype(np.float64), kernel, stride)
    if bias:
        wanted = wanted + source.graph.initializers["b"].const_value.numpy().reshape(-1, 1, 1)
    got = answer(model, tmp_path, x=x)
    assert got.dtype == np.float32
    assert np.abs(got - wanted).max() <= 3e-3 * np.abs(wanted).max()


@pytest.mark.parametrize("choice", NARROW)
def test_a_table_is_stored_narrow_and_widened_once_gathered(choice: str, tmp_path: Path):
    """Rows are those of the rounded table, as float32."""
    source = table_graph()
    ids = np.array([[3, 0, 49]], np.int64)
    model, _ = retyped(source, choice)
    assert set(model.graph.initializers) == {f"table.{choice}"}
    table = source.graph.initializers["table"].const_value.numpy().astype(NARROW[choice]).astype(np.float32)
    np.testing.assert_array_equal(answer(model, tmp_path, ids=ids), table[ids])


@pytest.mark.parametrize("choice", CASTS)
def test_the_type_it_has_already_changes_nothing(choice: str):
    """A float32 unit of a float32 graph, and likewise of narrow graphs, is left as it is."""
    model = normalised(network(dtype=NARROW.get(choice, np.float32)))
    before = ir.to_proto(model).SerializeToString()
    for unit in find_units(model):
        assert product_type(model, unit) == FLOAT_TYPES[choice]
        retype(model, next(node for node in model.graph if node.name == unit.id), unit, choice)
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("dtype", NARROW.values())
def test_a_narrow_graphs_unit_may_be_wide(dtype: type, tmp_path: Path):
    """fp32 in a float16 or bfloat16 graph: the product is float32, what surrounds it stays narrow."""
    model = normalised(network(dtype=dtype))
    units = {unit.id: unit for unit in find_units(model)}
    for name in ("to_q", "conv1"):
        retype(model, next(node for node in model.graph if node.name == name), units[name], "fp32")
        assert types_of(model, name) == {ir.DataType.FLOAT}
    ir.save(model, tmp_path / "graph.onnx")
    onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "graph.onnx"), strict_mode=True, check_type=True)


def test_readers_of_one_value_share_a_cast_and_values_keep_their_names():
    """Three narrow projections read one Cast; the float32 results have the names that they had."""
    model = normalised(network())
    units = {unit.id: unit for unit in find_units(model)}
    for name in ("to_q", "to_k", "to_v"):
        retype(model, next(node for node in model.graph if node.name == name), units[name], "fp16")
    nodes = {node.name: node for node in model.graph}
    assert len({nodes[name].inputs[0].name for name in ("to_q", "to_k", "to_v")}) == 1
    assert [each.name for each in nodes["attend"].inputs] == ["qv", "kv", "vv"]
    assert {each.dtype for each in nodes["attend"].inputs} == {ir.DataType.FLOAT}


def test_a_cast_of_someone_elses_is_not_shared(tmp_path: Path):
    """A Cast that the exporter wrote may stand behind the product; the product gets one of its own, in front."""
    weights = {"w": np.ones((16, 16), np.float32)}
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "w"], ["p"], name="product"),
        helper.make_node("Cast", ["r"], ["half"], name="theirs", to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["half"], ["wide"], name="back", to=TensorProto.FLOAT),
        helper.make_node("Add", ["p", "wide"], ["y"], name="sum"),
    ]
    model = normalised(graph(nodes, weights, [value("x", ["m", 16])], [value("y", ["m", 16])]))
    (unit,) = find_units(model)
    retype(model, next(node for node in model.graph if node.name == "product"), unit, "fp16")
    x = np.ones((2, 16), np.float32)
    np.testing.assert_array_equal(answer(model, tmp_path, x=x), 17 * x)


@settings(max_examples=60, deadline=None)
@given(names=st.lists(st.sampled_from(sorted(CASTS)), min_size=1, max_size=6).map(tuple))
def test_cancelling_casts_changes_no_bit(names: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory):
    """Whatever is cast to whatever, the numbers are those of every cast done in turn."""
    model = chain(*names)
    cancel_casts(model.graph)
    RemoveUnusedNodesPass()(model)
    folder = tmp_path_factory.mktemp("casts")
    with np.errstate(over="ignore"):
        got = answer(model, folder, x=NUMBERS)
    wanted = cast_through(NUMBERS, names)
    np.testing.assert_array_equal(got.astype(np.float32), wanted.astype(np.float32))
    assert len(model.graph) <= len(names)


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (("fp16", "fp32", "fp16"), 2),  # the last gives the graph's output, so it stays to name it
        (("fp16", "fp32", "fp16", "fp32"), 2),
        (("bf16", "fp32", "bf16", "fp32"), 2),
        (("fp16", "fp32", "bf16"), 2),
        (("fp16", "fp32"), 2),
        (("bf16", "fp16", "fp32"), 3),
        (("fp32", "fp32", "fp32"), 1),
    ],
)
def test_as_many_casts_are_left_as_round(names: tuple[str, ...], left: int):
    """Widening and narrowing again is nothing; what rounds stays."""
    model = chain(*names)
    cancel_casts(model.graph)
    RemoveUnusedNodesPass()(model)
    assert len(model.graph) == left


def test_a_run_of_narrow_products_does_not_bounce(tmp_path: Path):
    """Two narrow products in a row have a Cast before and one after, none between."""
    random = np.random.default_rng(3)
    weights = {name: random.standard_normal((32, 32)).astype(np.float32) for name in "ab"}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["p"], name="first"),
        helper.make_node("MatMul", ["p", "b"], ["y"], name="second"),
    ]
    model = normalised(graph(nodes, weights, [value("x", ["m", 32])], [value("y", ["m", 32])]))
    made = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
    for unit in find_units(made):
        retype(made, next(node for node in made.graph if node.name == unit.id), unit, "fp16")
    cast = answer(made, tmp_path, x=weights["a"])
    cancel_casts(made.graph)
    RemoveUnusedNodesPass()(made)
    assert [node.op_type for node in made.graph] == ["Cast", "MatMul", "MatMul", "Cast"]
    np.testing.assert_array_equal(answer(made, tmp_path, x=weights["a"]), cast)


def test_a_computed_bias_is_cast():
    """A bias that is no initializer goes through a Cast like the data."""
    source = convolution(16, 16, 1)
    node = next(iter(source.graph))
    bias = ir.Value(name="b2", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([16]))
    source.graph.inputs.append(bias)
    node.replace_input_with(2, bias)
    model, unit = retyped(source, "fp16")
    assert types_of(model, unit.id) == {ir.DataType.FLOAT16}
    made = next(node for node in model.graph if node.name == unit.id).inputs[2]
    assert made is cast_of(model.graph, model.graph.inputs[1], ir.DataType.FLOAT16)


def test_what_the_type_cannot_hold_is_refused():
    """Activations beyond float16, and bfloat16 convolutions before opset 22, are named."""
    model = normalised(network(opset=21))
    units = {unit.id: unit for unit in find_units(model)}
    with pytest.raises(BadRequest, match=r"'to_q' is to be fp16 and value 't' reaches 1e\+05"):
        check_typed(model, units["to_q"], "fp16", {"t": (-1e5, 3.0)})
    with pytest.raises(BadRequest, match="'conv1' is to be bf16 and the graph has opset 21"):
        check_typed(model, units["conv1"], "bf16", {})
    check_typed(model, units["to_q"], "bf16", {"t": (-1e5, 3.0)})
    check_typed(model, units["to_q"], "fp16", {"t": (-65504.0, 65504.0)})
    check_typed(normalised(network(opset=22)), units["conv1"], "bf16", {})
