"""Lowering for ONNX Runtime on a CPU: what each choice computes, against twins that do it the obvious way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import helper

from edgekit.quant.fused import kernels
from edgekit.quant.targets import get_target
from tests.quant.lowering import (
    NBITS,
    OPEN,
    bias_of,
    by_block,
    by_token,
    close,
    convolution,
    convolved,
    graph,
    linear,
    lowered,
    range_of,
    rounded,
    stored_of,
    table_graph,
    value,
)

INTEGERS = ["w8a8", "w8a8-row"]
LINEARS = [
    (16, 32, (3, 32)),
    (24, 40, (2, 5, 40)),
    (8, 129, (1, 7, 129)),
    (33, 64, (4, 1, 64)),
    (9, 200, (2, 3, 2, 200)),
]


@pytest.mark.parametrize(("n", "k", "shape"), LINEARS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_w8a8_product_is_the_integer_product(n: int, k: int, shape: tuple[int, ...], bias: bool, tmp_path: Path):
    """Rounded inputs times stored weights, plus a float bias; nothing else is rounded."""
    model = linear(n, k, bias=bias, rank=len(shape))
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32) + 0.5
    made = lowered(tmp_path, model, "w8a8", {"x": range_of(x)})
    _, weight = stored_of(model, "w8a8")
    close(made(x=x), rounded(x, *range_of(x)) @ weight.T + bias_of(model))
    assert kernels(made.path) == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1}


@pytest.mark.parametrize(("n", "k", "shape"), LINEARS)
@pytest.mark.parametrize("opset", [13, 17, 20, 21, 23])
def test_a_row_product_rounds_each_token(n: int, k: int, shape: tuple[int, ...], opset: int, tmp_path: Path):
    """One scale per token, measured as it runs, under every spelling that an opset asks for."""
    model = linear(n, k, rank=len(shape), opset=opset)
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32) * 3
    x[0] *= 100
    x[..., -1, :] = 0
    made = lowered(tmp_path, model, "w8a8-row")
    _, weight = stored_of(model, "w8a8-row")
    close(made(x=x), by_token(x) @ weight.T + bias_of(model))
    assert made.session.inputs[0].name == "x"


def test_a_token_has_the_same_numbers_in_any_company(tmp_path: Path):
    """w8a8-row is exact and independent of batch-mates, bit for bit."""
    made = lowered(tmp_path, linear(32, 48), "w8a8-row")
    x = np.random.default_rng(3).standard_normal((4, 6, 48)).astype(np.float32)
    x[1] *= 1000
    together = made(x=x)
    for row in range(4):
        for token in range(6):
            alone = made(x=x[row : row + 1, token : token + 1])
            np.testing.assert_array_equal(alone[0, 0], together[row, token])


def test_both_spellings_of_row_scales_agree(tmp_path: Path):
    """A division before one scale, and a scale per block, give the same bits."""
    x = np.random.default_rng(4).standard_normal((2, 9, 80)).astype(np.float32)
    answers = []
    for opset in (20, 21):
        (folder := tmp_path / str(opset)).mkdir()
        answers.append(lowered(folder, linear(16, 80, opset=opset), "w8a8-row")(x=x))
    np.testing.assert_array_equal(*answers)


@pytest.mark.parametrize("choice", NBITS)
@pytest.mark.parametrize(("n", "k", "shape"), LINEARS)
def test_a_product_of_stored_integers_is_matmulnbits(
    choice: str, n: int, k: int, shape: tuple[int, ...], tmp_path: Path
):
    """Stored weights times activations that the kernel rounds per block, K padded to whole blocks."""
    model = linear(n, k, rank=len(shape))
    x = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    made = lowered(tmp_path, model, choice)
    stored, weight = stored_of(model, choice)
    close(made(x=x), by_block(x, stored.format.block) @ weight.T + bias_of(model))
    assert kernels(made.path) == {"MatMulNBits": 1}


@pytest.mark.parametrize(
    ("n", "channels", "kernel", "stride"), [(16, 24, 1, 1), (12, 8, 3, 1), (20, 6, 3, 2), (40, 16, 1, 2), (8, 5, 5, 1)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_w8a8_convolution_is_the_integer_one(
    n: int, channels: int, kernel: int, stride: int, bias: bool, tmp_path: Path
):
    """Input, weights and output rounded, the bias to the product's own step; ties of the last rounding aside."""
    model = convolution(n, channels, kernel, stride, bias=bias)
    x = np.random.default_rng(6).standard_normal((2, channels, 9, 10)).astype(np.float32)
    _, weight = stored_of(model, "w8a8")
    plain = convolved(rounded(x, *range_of(x)), weight, kernel, stride)
    plain = plain + np.reshape(bias_of(model), (-1, 1, 1))
    made = lowered(tmp_path, model, "w8a8", {"x": range_of(x), "y": range_of(plain)})
    step = np.ptp(np.append(plain, 0)) / 255
    off = np.abs(made(x=x) - rounded(plain, *range_of(plain))) / step
    assert off.max() < 1.01
    assert (off > 0.01).mean() < 0.01
    found = kernels(made.path)
    assert found["QLinearConv"] == 1
    assert not found["Conv"] + found["FusedConv"]


def test_a_relu_becomes_the_end_of_the_range(tmp_path: Path):
    """Conv and Relu are one QLinearConv, whose 256 codes all lie on the side that Relu leaves."""
    model = convolution(16, 8, 3, relu=True)
    x = np.random.default_rng(7).standard_normal((2, 8, 8, 8)).astype(np.float32)
    _, weight = stored_of(model, "w8a8")
    plain = convolved(rounded(x, *range_of(x)), weight, 3, 1) + np.reshape(bias_of(model), (-1, 1, 1))
    made = lowered(tmp_path, model, "w8a8", {"x": range_of(x), "p": range_of(plain)})
    found = kernels(made.path)
    assert (found["QLinearConv"], found["Relu"]) == (1, 0)
    assert made.initializers()["y.u8.zero"].numpy() == 0
    assert np.abs(made(x=x) - np.maximum(plain, 0)).max() <= 0.51 * plain.max() / 255


def test_a_convolution_of_sequences_runs_on_integers_too(tmp_path: Path):
    """Weights of three dimensions: one kernel axis."""
    weight = np.random.default_rng(8).standard_normal((12, 16, 3)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="product", pads=[1, 1])
    model = graph([node], {"w": weight}, [value("x", ["b", 16, "l"])], [value("y", ["b", 12, "l"])])
    x = np.random.default_rng(9).standard_normal((2, 16, 11)).astype(np.float32)
    plain = lowered(tmp_path, model, "fp32")(x=x)
    made = lowered(tmp_path, model, "w8a8", {"x": range_of(x), "y": range_of(plain)})
    assert kernels(made.path)["QLinearConv"] == 1
    assert np.square(made(x=x) - plain).sum() < 1e-3 * np.square(plain).sum()


def test_fp16_is_storage_alone(tmp_path: Path):
    """Weights lie as float16 and mean what float16 holds; the products stay float32 kernels."""
    model = linear(24, 40)
    x = np.random.default_rng(10).standard_normal((2, 3, 40)).astype(np.float32)
    made = lowered(tmp_path, model, "fp16")
    weight = model.graph.initializers["w"].const_value.numpy().astype(np.float16)
    close(made(x=x), x @ weight.astype(np.float64) + bias_of(model))
    assert made.initializers()["w.fp16"].dtype == ir.DataType.FLOAT16
    assert "Cast" not in kernels(made.path)


def test_fp16_convolutions_keep_their_kernels(tmp_path: Path):
    """A Cast between an initializer and Conv is folded before the engine chooses its layout."""
    (tmp_path / "plain").mkdir()
    plain = lowered(tmp_path / "plain", convolution(16, 16, 3), "fp32")
    made = lowered(tmp_path, convolution(16, 16, 3), "fp16")
    assert kernels(made.path) == kernels(plain.path)
    x = np.random.default_rng(11).standard_normal((1, 16, 8, 8)).astype(np.float32)
    close(made(x=x), plain(x=x), 1e-3)


def test_a_table_stays_narrow_until_it_is_read(tmp_path: Path):
    """fp16 on a Gather widens the rows that were gathered, never the table."""
    model = table_graph()
    made = lowered(tmp_path, model, "fp16")
    assert made.ops() == ["Gather", "Cast"]
    ids = np.array([[3, 49, 0], [7, 7, 12]])
    table = model.graph.initializers["table"].const_value.numpy()
    np.testing.assert_array_equal(made(ids=ids), table.astype(np.float16).astype(np.float32)[ids])
    assert kernels(made.path) == {"Gather": 1, "Cast": 1}


@pytest.mark.parametrize("shape", ["linear", "conv"])
def test_full_codes_do_not_saturate(shape: str, tmp_path: Path):
    """At 7 bits the largest sums of products are exact on a processor that adds two of them in 16 bits."""
    model = linear(16, 512, bias=False) if shape == "linear" else convolution(16, 64, 3, bias=False)
    weights = model.graph.initializers["w"]
    weights.const_value = ir.tensor(np.full(weights.const_value.shape, -1, np.float32), name="w")
    x = np.full((2, 4, 512) if shape == "linear" else (1, 64, 6, 6), 2, np.float32)
    ranges = {"x": (0.0, 2.0), "y": (-2.0 * 576, 0.0)}
    got = lowered(tmp_path, model, "w8a8", ranges)(x=x)
    stored, weight = stored_of(model, "w8a8")
    assert stored.codes.min() in (-64, -63)
    exact = rounded(x, 0, 2) @ weight.T if shape == "linear" else convolved(x, weight, 3, 1)
    assert np.abs(got - exact).max() <= (1e-5 * 1024 if shape == "linear" else 2.01 * 576 / 255)


def test_code_bits_are_the_targets(tmp_path: Path):
    """Weights that meet integer activations have the bits that the target's processor can add up."""
    reach = {}
    for name in ("cpu:any", "cpu:vnni"):
        target = replace(get_target(name), allowed=OPEN.allowed)
        made = lowered(tmp_path, linear(16, 64), "w8a8", {"x": (-3, 3)}, target)
        reach[name] = int(np.abs(made.initializers()["w.w8a8.codes"].numpy().astype(int)).max())
    assert 60 <= reach["cpu:any"] <= 64 < 120 <= reach["cpu:vnni"] <= 128


def test_a_bias_far_larger_than_its_weights_survives(tmp_path: Path):
    """A channel of weights that are nearly or exactly 0 keeps its bias: int32 would not hold it in their own steps."""
    model = convolution(8, 16, 3)
    weights = model.graph.initializers["w"].const_value.numpy().copy()
    weights[0], weights[1] = 0, weights[1] * 1e-12
    model.graph.initializers["w"].const_value = ir.tensor(weights, name="w")
    x = np.random.default_rng(13).standard_normal((1, 16, 6, 6)).astype(np.float32)
    plain = lowered(tmp_path, model, "fp32")(x=x)
    made = lowered(tmp_path, model, "w8a8", {"x": range_of(x), "y": range_of(plain)})
    step = np.ptp(np.append(plain, 0)) / 255
    got = made(x=x)
    bias = bias_of(model)
    for channel in (0, 1):
        np.testing.assert_allclose(got[:, channel], np.full_like(got[:, channel], bias[channel]), atol=0.51 * step)
    assert np.square(got - plain).sum() < 1e-3 * np.square(plain).sum()


@pytest.mark.parametrize("ends", [(0.0, 0.0), (1.0, 2.0), (-2.0, -1.0), (-1e-30, 1e-30)])
def test_any_range_includes_zero(ends: tuple[float, float], tmp_path: Path):
    """0 is one of the 256 numbers whatever the range, so that padding stays exact."""
    made = lowered(tmp_path, linear(16, 32, bias=False), "w8a8", {"x": ends})
    assert not made(x=np.zeros((1, 1, 32), np.float32)).any()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(16, 40),
    k=st.integers(16, 150),
    tokens=st.integers(1, 5),
    choice=st.sampled_from(["w8a8", "w8a8-row"]),
)
def test_integer_products_of_any_shape(n: int, k: int, tokens: int, choice: str, tmp_path: Path):
    """The twin agrees at every width, also where rows are no multiple of a vector."""
    model = linear(n, k, seed=n)
    x = np.random.default_rng(k).standard_normal((1, tokens, k)).astype(np.float32)
    _, weight = stored_of(model, choice)
    inputs = by_token(x) if choice == "w8a8-row" else rounded(x, *range_of(x))
    close(lowered(tmp_path, model, choice, {"x": range_of(x)})(x=x), inputs @ weight.T + bias_of(model))
