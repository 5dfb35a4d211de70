"""Lowering for TensorRT: what is written is what its parser asks for, and means what the choice says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from edgekit.quant.choices import CHOICES
from edgekit.quant.graph import find_units, normalised, weight_matrix
from edgekit.quant.lower.tensorrt import residuals
from edgekit.quant.targets import get_target
from edgekit.quant.weights import Stored, restore, store
from tests.quant.engine_graphs import network, picture, ranges_of, run, written
from tests.quant.lowering import Array, bias_of, close, convolution, convolved, graph, linear, range_of, value

TRT = get_target("trt")
FLOAT, INT8 = TensorProto.FLOAT, TensorProto.INT8
FP8, INT4, FP4 = TensorProto.FLOAT8E4M3FN, TensorProto.INT4, TensorProto.FLOAT4E2M1
QUANTIZED = ("w8a8", "fp8", "w4a16-64", "nvfp4")


class TRT_FP4DynamicQuantize(OpRun):
    """TensorRT's operator by its definition: E4M3 scales of 16, times one float, then E2M1 codes."""

    op_domain = "trt"

    def _run(self, x: Array, whole: Array, axis: int, block_size: int, scale_type: int) -> tuple[Array, Array]:
        assert (axis, block_size, scale_type) == (-1, 16, FP8)
        parts = x.reshape(*x.shape[:-1], -1, block_size)
        widths = (np.abs(parts).max(-1) / 6 / whole).clip(0, 448).astype(ml_dtypes.float8_e4m3fn)
        steps = widths.astype(np.float32) * whole
        codes = np.divide(parts, steps[..., None], out=np.zeros_like(parts), where=steps[..., None] > 0)
        return codes.clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).reshape(x.shape), widths


def signed(x: Array, low: float, high: float, reach: float = 127) -> Array:
    """What symmetric int8 codes mean."""
    step = np.float32(max(-low, high) / reach)
    return np.clip(np.round(x / step), -128, 127).astype(np.float64) * np.float64(step)


def eighth(x: Array, low: float, high: float) -> Array:
    """What E4M3 codes mean."""
    step = np.float32(max(-low, high) / 448)
    return (x / step).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * np.float64(step)


def stored_of(model: ir.Model, choice: str) -> tuple[Stored, Array]:
    """The one unit's weights at full width, and what they mean."""
    model = normalised(model)
    (unit,) = find_units(model)
    stored = store(weight_matrix(model, unit), CHOICES[choice])
    return stored, restore(stored).astype(np.float64)


def proto(path: Path) -> onnx.ModelProto:
    onnx.checker.check_model(path, full_check=False)
    return onnx.load(path)


def maker_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if name in node.output)


def array_of(model: onnx.ModelProto, name: str) -> Array:
    return onnx.numpy_helper.to_array(next(each for each in model.graph.initializer if each.name == name))


def type_of(model: onnx.ModelProto, name: str) -> int:
    for each in model.graph.initializer:
        if each.name == name:
            return each.data_type
    infos = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return next(info.type.tensor_type.elem_type for info in infos if info.name == name)


def node_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def attribute(node: onnx.NodeProto, name: str) -> object:
    return next(helper.get_attribute_value(each) for each in node.attribute if each.name == name)


@pytest.fixture(name="whole")
def _whole(tmp_path: Path) -> tuple[ir.Model, dict[str, tuple[float, float]], Array]:
    model, x = network(), picture()
    return model, ranges_of(tmp_path, normalised(model), x), x


@pytest.mark.parametrize(("n", "k", "shape"), [(16, 64, (3, 64)), (24, 128, (2, 5, 128)), (8, 192, (1, 3, 4, 192))])
@pytest.mark.parametrize("bias", [True, False])
def test_a_w8a8_product_is_signed_on_both_sides(n: int, k: int, shape: tuple[int, ...], bias: bool, tmp_path: Path):
    """Inputs rounded around 0, times int8 weights, plus a float bias; the output is not rounded."""
    model = linear(n, k, bias=bias, rank=len(shape))
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32) - 0.3
    path = written(tmp_path, model, "w8a8", {"x": range_of(x)})
    close(run(path, x=x), signed(x, *range_of(x)) @ stored_of(model, "w8a8")[1].T + bias_of(model))


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_w8a8_convolution_is_signed_on_both_sides(kernel: int, stride: int, bias: bool, tmp_path: Path):
    """The same of a convolution."""
    model = convolution(32, 16, kernel, stride, bias=bias)
    x = np.random.default_rng(2).standard_normal((2, 16, 6, 7)).astype(np.float32)
    path = written(tmp_path, model, "w8a8", {"x": (-3.0, 2.0)})
    plain = convolved(signed(x, -3, 2), stored_of(model, "w8a8")[1], kernel, stride)
    close(run(path, x=x), plain + np.reshape(bias_of(model), (-1, 1, 1)))


def test_an_fp8_product_is_e4m3_on_both_sides(tmp_path: Path):
    """Inputs and weights are rounded to E4M3, one scale each."""
    model = linear(24, 128, opset=19)
    x = np.random.default_rng(3).standard_normal((2, 5, 128)).astype(np.float32) * 7
    path = written(tmp_path, model, "fp8", {"x": range_of(x)})
    close(run(path, x=x), eighth(x, *range_of(x)) @ stored_of(model, "fp8")[1].T + bias_of(model))
    found = proto(path)
    product = node_of(found, "product")
    for name in product.input:
        widen = maker_of(found, name)
        assert widen.op_type == "DequantizeLinear"
        assert not widen.attribute
        assert type_of(found, widen.input[0]) == FP8
        assert array_of(found, widen.input[1]).shape == ()


@pytest.mark.parametrize(("choice", "block"), [("w4a16-64", 64), ("w4a16-128", 128)])
def test_a_w4a16_product_is_of_floats_and_int4_weights(choice: str, block: int, tmp_path: Path):
    """Weights are int4 in blocks down K with positive scales; what they multiply is not rounded."""
    model = linear(24, 256, opset=21)
    x = np.random.default_rng(4).standard_normal((2, 5, 256)).astype(np.float32)
    path = written(tmp_path, model, choice)
    found = proto(path)
    product = node_of(found, "product")
    widen = maker_of(found, product.input[1])
    assert product.input[0] == "x"
    assert (attribute(widen, "axis"), attribute(widen, "block_size")) == (0, block)
    assert type_of(found, widen.input[0]) == INT4
    codes, scales = (array_of(found, name) for name in widen.input)
    assert codes.shape == (256, 24)
    assert scales.shape == (256 // block, 24)
    assert scales.min() > 0
    meant = codes.astype(np.float64) * np.repeat(scales.astype(np.float64), block, axis=0)
    close(run(path, x=x), x.astype(np.float64) @ meant + bias_of(model))
    weight = model.graph.initializers["w"].const_value.numpy()
    assert np.abs(meant - weight).max() <= 0.5001 * scales.max()


def test_an_nvfp4_product_has_two_levels_of_scales(tmp_path: Path):
    """Weights and inputs are E2M1 in blocks of 16 along K, their scales E4M3, and those times one float."""
    model = linear(24, 96, opset=23)
    model.ir_version = 11
    x = np.random.default_rng(5).standard_normal((2, 5, 96)).astype(np.float32)
    x[0, 0] *= 10
    path = written(tmp_path, model, "nvfp4", {"x": range_of(x)})
    found = proto(path)
    product = node_of(found, "product")
    for name, axis, shape in ((product.input[0], -1, None), (product.input[1], 0, (6, 24))):
        outer = maker_of(found, name)
        inner = maker_of(found, outer.input[1])
        assert (attribute(outer, "axis"), attribute(outer, "block_size")) == (axis, 16)
        assert (type_of(found, outer.input[0]), type_of(found, inner.input[0])) == (FP4, FP8)
        assert array_of(found, inner.input[1]).shape == ()
        if shape:
            assert array_of(found, inner.input[0]).shape == shape
    got = ReferenceEvaluator(found, new_ops=[TRT_FP4DynamicQuantize]).run(None, {"x": x})[0]
    whole = np.float32(max(map(abs, range_of(x))) / 448 / 6)
    parts = x.reshape(2, 5, 6, 16)
    widths = (np.abs(parts).max(-1, keepdims=True) / 6 / whole).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    steps = widths * whole
    rounded = (parts / steps).clip(-6, 6).astype(np.float32).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * steps
    close(got, rounded.reshape(x.shape) @ stored_of(model, "nvfp4")[1].T + bias_of(model))


def test_the_int8_network_is_spelt_as_tensorrt_asks(
    whole: tuple[ir.Model, dict[str, tuple[float, float]], Array], tmp_path: Path
):
    """Every zero point is 0 and every code int8, biases are the float ones, and no product's output is rounded."""
    model, ranges, x = whole
    path = written(tmp_path, model, "w8a8", ranges, TRT)
    found = proto(path)
    products = [
        node for node in found.graph.node if node.name in ("conv1", "conv2", "to_q", "to_k", "to_v", "up", "down")
    ]
    assert len(products) == 7
    for node in products:
        data, weight = (maker_of(found, name) for name in node.input[:2])
        assert data.op_type == weight.op_type == "DequantizeLinear"
        assert attribute(weight, "axis") == (0 if node.op_type == "Conv" else 1)
        assert array_of(found, weight.input[1]).shape == (
            array_of(found, weight.input[0]).shape[attribute(weight, "axis")],
        )
        readers = {reader.op_type for reader in found.graph.node if node.output[0] in reader.input}
        assert "QuantizeLinear" not in readers or node.name in ("to_q", "to_k", "to_v")
        if node.op_type == "Conv":
            assert type_of(found, node.input[2]) == FLOAT
            assert node.input[2] == f"b.{node.name[-1]}"
    for node in found.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            codes = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
            assert type_of(found, codes) == INT8
            assert len(node.input) == 2 or not array_of(found, node.input[2]).any()
            assert array_of(found, node.input[1]).min() > 0
    exact = run(_saved(tmp_path, model), x=x)
    assert np.square(run(path, x=x) - exact).sum() < 2e-3 * np.square(exact).sum()


def test_a_value_is_rounded_once_for_all_its_readers(
    whole: tuple[ir.Model, dict[str, tuple[float, float]], Array], tmp_path: Path
):
    """Three projections of one value share one pair of Q/DQ, and a residual that is also an input shares that one's."""
    model, ranges, _ = whole
    found = proto(written(tmp_path, model, {"to_q": "w8a8", "to_k": "w8a8", "to_v": "w8a8"}, ranges, TRT))
    assert Counter(node.op_type for node in found.graph.node)["QuantizeLinear"] == 1
    found = proto(written(tmp_path, model, {"conv1": "w8a8", "conv2": "w8a8"}, ranges, TRT))
    assert node_of(found, "residual").input[0] == node_of(found, "conv1").input[0]


def test_the_other_term_of_a_residual_is_rounded_where_its_range_is_known(
    whole: tuple[ir.Model, dict[str, tuple[float, float]], Array], tmp_path: Path
):
    """The Add takes a rounded residual beside an int8 convolution's plain output; without a range a plain one."""
    model, ranges, _ = whole
    units = find_units(normalised(model))
    assert residuals(normalised(model), units, {"conv2": "w8a8"}) == ("r0",)
    assert residuals(normalised(model), units, {"conv1": "w8a8"}) == ()
    assert residuals(normalised(model), units, {"conv2": "fp16"}) == ()
    add = node_of(proto(written(tmp_path, model, {"conv2": "w8a8"}, ranges, TRT)), "residual")
    assert list(add.input) == ["r0.int8.meant", "c2"]
    del ranges["r0"]
    add = node_of(proto(written(tmp_path, model, {"conv2": "w8a8"}, ranges, TRT)), "residual")
    assert list(add.input) == ["r0", "c2"]


def test_of_two_convolutions_that_meet_the_earlier_is_the_residual():
    """The later convolution takes the addition in, so one term alone is rounded."""
    weights = {name: np.ones((16, 16, 1, 1), np.float32) for name in "ab"}
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="relu"),
        helper.make_node("Conv", ["r", "a"], ["p"], name="first"),
        helper.make_node("Conv", ["r", "b"], ["q"], name="second"),
        helper.make_node("Add", ["q", "p"], ["y"], name="sum"),
    ]
    shape = ["batch", 16, 4, 4]
    model = normalised(graph(nodes, weights, [value("x", shape)], [value("y", shape)]))
    assert residuals(model, find_units(model), {"first": "w8a8", "second": "w8a8"}) == ("p",)


@pytest.mark.parametrize("choice", QUANTIZED)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_graph_of_narrow_floats_keeps_its_type(choice: str, dtype: type, tmp_path: Path):
    """Scales and what is dequantized have the graph's own float type, so that no Cast is needed."""
    model = network(dtype=dtype)
    ranges = {unit.data: (-4.0, 4.0) for unit in find_units(normalised(model))}
    found = proto(written(tmp_path, model, choice, ranges, TRT))
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    assert "Cast" not in {node.op_type for node in found.graph.node}
    for node in found.graph.node:
        if node.op_type == "DequantizeLinear":
            assert type_of(found, node.output[0]) == element
    onnx.shape_inference.infer_shapes(found, strict_mode=True)
    if dtype is np.float16 and choice != "nvfp4":
        assert np.isfinite(run(tmp_path / "lowered.onnx", x=picture(dtype=dtype))).all()


@pytest.mark.parametrize("choice", QUANTIZED)
def test_the_network_answers_like_the_float_one(
    choice: str, whole: tuple[ir.Model, dict[str, tuple[float, float]], Array], tmp_path: Path
):
    """Whole graphs of every quantized choice stay near the float graph."""
    model, ranges, x = whole
    exact = run(_saved(tmp_path, model), x=x)
    path = written(tmp_path, model, choice, ranges, TRT)
    if choice == "nvfp4":
        got = ReferenceEvaluator(proto(path), new_ops=[TRT_FP4DynamicQuantize]).run(None, {"x": x})[0]
    else:
        got = run(path, x=x)
    assert (
        1e-8
        < np.square(got - exact).sum() / np.square(exact).sum()
        < {"nvfp4": 0.1, "w4a16-64": 0.03}.get(choice, 5e-3)
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mix_keeps_the_signature_and_every_type(data: st.DataObject, tmp_path: Path):
    """Whatever is chosen, inputs and outputs stay as they were, the checker passes and all types agree."""
    model = network()
    units = find_units(normalised(model))
    choices = {unit.id: data.draw(st.sampled_from([*TRT.allowed(unit), "none"])) for unit in units}
    choices = {
        unit.id: choices[unit.id]
        for unit in units
        if choices[unit.id] != "none" and not unit.k % (CHOICES[choices[unit.id]].weight.block or 1)
    }
    ranges = {name: (-4.0, 4.0) for unit in units for name in (unit.data, unit.output)}
    found = proto(written(tmp_path, model, choices, ranges, TRT))
    before = ir.to_proto(model)
    assert list(found.graph.input) == list(before.graph.input)
    assert list(found.graph.output) == list(before.graph.output)
    assert len({node.name for node in found.graph.node}) == len(found.graph.node)
    inferred = onnx.shape_inference.infer_shapes(_without_values(found), strict_mode=not _has_fp4(found))
    wanted = {info.name: info.type.tensor_type.elem_type for info in inferred.graph.value_info}
    stated = {info.name: info.type.tensor_type.elem_type for info in found.graph.value_info}
    assert {name: wanted[name] for name in stated if wanted.get(name)} == {
        name: stated[name] for name in stated if wanted.get(name)
    }


def test_attention_follows_its_projections(tmp_path: Path):
    """Where one projection is narrow the whole Attention is, without a Cast between; else it stays float32."""
    model = network()
    for narrow, dtype in (
        ({"to_q": "fp16"}, TensorProto.FLOAT16),
        ({"to_q": "fp16", "to_k": "bf16"}, TensorProto.BFLOAT16),
    ):
        found = proto(written(tmp_path, model, narrow, target=TRT))
        attend = node_of(found, "attend")
        assert {type_of(found, name) for name in [*attend.input, *attend.output]} == {dtype}
    every = dict.fromkeys(("to_q", "to_k", "to_v", "to_out"), "fp16")
    found = proto(written(tmp_path, model, every, target=TRT))
    attend = node_of(found, "attend")
    assert {maker_of(found, name).op_type for name in attend.input} == {"MatMul"}
    assert node_of(found, "to_out").input[0] == attend.output[0]
    ranges = {"t": (-4.0, 4.0)}
    found = proto(written(tmp_path, model, {"to_q": "w8a8"}, ranges, TRT))
    assert {type_of(found, name) for name in node_of(found, "attend").input} == {FLOAT}


def _saved(folder: Path, model: ir.Model) -> Path:
    ir.save(model, folder / "float.onnx")
    return folder / "float.onnx"


def _has_fp4(model: onnx.ModelProto) -> bool:
    return any(entry.domain == "trt" for entry in model.opset_import)


def _without_values(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose inner values have no stated type."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    return copy
