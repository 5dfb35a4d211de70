"""Smoothing: the same function, and activations that eight bits hold better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from onnx import TensorProto, helper

from edgekit.errors import BadRequest
from edgekit.quant.graph import find_units, initializer
from edgekit.quant.plan import Rewrite
from edgekit.quant.smooth import divide, smooth, smoothing_factors
from tests.quant.tiny_graphs import Graph, normal_form, prompts, relative, run, tiny_unet, unet_feeds

K, N = 16, 24
OUTLIERS = np.where(np.arange(K) % 7 == 3, 40.0, 1.0)
FORMS = ("layer", "layer-no-bias", "rms", "mul", "mul-first", "mul-add", "layer-mul-add")


def normed(form: str, dtype: Any = np.float32, seed: int = 0) -> ir.Model:
    """x (b, t, 16) through a norm of some spelling, whose scale has outliers, into two products."""
    make = Graph(seed)
    scale = ((1 + make.normal(K, 1)[:, 0]) * OUTLIERS).astype(dtype)
    bias = make.normal(K, 1)[:, 0].astype(dtype)
    ones = np.ones(K, dtype)
    if form.startswith("layer"):
        own = [ones] if form == "layer-mul-add" else [scale] if form == "layer-no-bias" else [scale, bias]
        out = make("LayerNormalization", "x", *own, name="norm")
    elif form == "rms":
        out = make("RMSNormalization", "x", scale, name="norm")
    else:
        square = make("ReduceMean", make("Mul", "x", "x"), np.array([-1]))
        out = make("Div", "x", make("Sqrt", make("Add", square, np.asarray(1e-5, dtype))))
    if "mul" in form:
        out = make("Mul", *((scale, out) if form == "mul-first" else (out, scale[None])), name="scaled")
    if form.endswith("add"):
        out = make("Add", out, bias, name="shifted")
    for name in ("left", "right"):
        make("MatMul", out, make.normal(K, N).astype(dtype), name=name)
    shape = ("b", "t", N)
    return normal_form(
        make.done(
            {"x": ("b", "t", K)},
            {"left": shape, "right": shape},
            opset=23,
            dtype=dtype,
        )
    )


def data(seed: int = 1, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """What `normed` takes."""
    return {"x": np.random.default_rng(seed).standard_normal((2, 50, K)).astype(dtype)}


def fed_to(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> tuple[str, np.ndarray]:
    """Name and content of what the first product reads."""
    proto = ir.to_proto(model)
    name = find_units(model)[0].data
    kept = onnx.ModelProto()
    kept.CopyFrom(proto)
    element = TensorProto.FLOAT16 if next(iter(feeds.values())).dtype == np.float16 else TensorProto.FLOAT
    kept.graph.output.append(helper.make_tensor_value_info(name, element, ("b", "t", K)))
    return name, run(ir.serde.deserialize_model(kept), feeds)[name]


def rounded(x: np.ndarray) -> np.ndarray:
    """Eight bits, one scale for all."""
    scale = np.abs(x).max() / 127
    return np.asarray(np.rint(x / scale) * scale)


def channel_max(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Calibration of one value."""
    name, x = fed_to(model, feeds)
    return {name: np.abs(x).max(axis=(0, 1))}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_every_spelling_of_a_norm_is_exact(form: str, alpha: float) -> None:
    """The products give the same to 1e-5, the norm's output is divided, and no node is new."""
    model, feeds = normed(form), data()
    before, (name, x) = run(model, feeds), fed_to(model, feeds)
    operators = [node.op_type for node in model.graph]
    factors = smoothing_factors(model, find_units(model), channel_max(model, feeds), alpha)
    assert smooth(model, find_units(model), channel_max(model, feeds), alpha) == (Rewrite("smooth", "node.left"),)
    after = run(model, feeds)
    assert max(relative(after[side], before[side]) for side in ("left", "right")) < 1e-5
    assert relative(fed_to(model, feeds)[1], x / factors[name]) < 1e-6
    assert [node.op_type for node in model.graph] == operators
    assert [unit.id for unit in find_units(model)] == ["node.left", "node.right"]


def test_half_precision_keeps_its_type() -> None:
    """Constants are divided in float64 and stored as what they were."""
    model, feeds = normed("layer", np.float16), data(dtype=np.float16)
    before = run(model, feeds)["left"]
    smooth(model, find_units(model), channel_max(model, feeds))
    assert {value.dtype for value in model.graph.initializers.values()} == {ir.DataType.FLOAT16}
    assert relative(run(model, feeds)["left"], before) < 5e-3


@settings(deadline=None, max_examples=30)
@given(alpha=st.floats(0, 1), seed=st.integers(0, 999))
def test_the_factors_are_the_papers(alpha: float, seed: int) -> None:
    """Equation 4, one channel at a time, over the weights of all that read the norm."""
    model = normed("layer", seed=seed)
    peaks = np.random.default_rng(seed).uniform(0.1, 9, K)
    found = smoothing_factors(model, find_units(model), {"norm": peaks}, alpha)["norm"]
    weights = [initializer(model, unit.weight).numpy() for unit in find_units(model)]
    for j in range(K):
        most = max(abs(float(w)) for weight in weights for w in weight[j])
        assert found[j] == pytest.approx(float(peaks[j]) ** alpha / most ** (1 - alpha), rel=1e-6)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 999), spread=st.floats(-3, 3))
def test_any_positive_factors_are_exact(seed: int, spread: float) -> None:
    """Over six orders of magnitude the division and the product cancel."""
    model, feeds = normed("layer", seed=seed), data(seed)
    before = run(model, feeds)["left"]
    divide(model, find_units(model), {"norm": 10 ** np.linspace(-spread, spread, K)})
    assert relative(run(model, feeds)["left"], before) < 1e-5


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_outlier_channels_no_longer_cost(seed: int) -> None:
    """One scale of eight bits for the activations: the product's error more than halves."""
    model, feeds = normed("layer", seed=seed), data(seed)
    wanted, errors = run(model, feeds)["left"], []
    for _ in range(2):
        _, x = fed_to(model, feeds)
        weight = initializer(model, find_units(model)[0].weight).numpy()
        errors.append(float(np.linalg.norm(rounded(x) @ weight - wanted)))
        smooth(model, find_units(model), channel_max(model, feeds))
    assert errors[1] < errors[0] / 2


def test_a_unet_is_smoothed_where_it_can_be() -> None:
    """The two norms before products, told by their first readers; convolutions, text and other products stay."""
    model, feeds = normal_form(tiny_unet()), unet_feeds(prompts(2))
    before, units = run(model, feeds)["out_sample"], find_units(model)
    peaks = {unit.data: np.linspace(0.1, 5, unit.k) for unit in units if unit.op == "MatMul"}
    done = smooth(model, units, peaks)
    assert done == (Rewrite("smooth", "node.to_q"), Rewrite("smooth", "node.ff_in"))
    assert relative(run(model, feeds)["out_sample"], before) < 1e-5
    told = [(unit.id, unit.role, unit.n, unit.k) for unit in units]
    assert [(unit.id, unit.role, unit.n, unit.k) for unit in find_units(model)] == told


def test_only_what_integers_will_feed() -> None:
    """A norm none of the named units reads stays, and one that has no maxima; one named reader is enough."""
    peaks = {name: np.ones(K) * 3 for name in ("norm1", "norm2")}
    model = normal_form(tiny_unet())
    assert smooth(model, find_units(model), peaks, only=["node.ff_in"]) == (Rewrite("smooth", "node.ff_in"),)
    assert smooth(model, find_units(model), {"norm1": np.ones(K)}) == (Rewrite("smooth", "node.to_q"),)
    two = normed("layer")
    assert smooth(two, find_units(two), {"norm": np.ones(K)}, only={"node.right"}) == (Rewrite("smooth", "node.left"),)


def test_constants_that_others_read_are_left_to_them() -> None:
    """Two norms share one scale: the one that is smoothed gets its own, and old weights are not kept."""
    make = Graph()
    scale = make.constant("scale", np.ones(K, np.float32))
    for side in ("a", "b"):
        normed = make("LayerNormalization", "x", scale, name=f"norm.{side}")
        make("MatMul", normed, make.normal(K, K), name=side)
    shape = ("b", "t", K)
    model = normal_form(make.done({"x": shape}, {"a": shape, "b": shape}))
    before = run(model, data())
    divide(model, find_units(model), {"norm.a": np.linspace(1, 9, K)})
    after = run(model, data())
    assert relative(after["a"], before["a"]) < 1e-5
    assert np.array_equal(after["b"], before["b"])
    assert {"scale", "b.1"} < set(model.graph.initializers)
    assert "a.1" not in model.graph.initializers


def blocked(kind: str) -> ir.Model:
    """A norm that cannot be divided: something but a product reads it, or nothing constant scales it."""
    make, shape = Graph(), ("b", "t", K)
    outputs = {"y": shape}
    if kind == "input":
        out = "x"
    elif kind == "fed":
        out = make("LayerNormalization", "x", make("ReduceSum", "x", np.array([0, 1]), keepdims=0), name="norm")
    elif kind == "scalar":
        out = make("Mul", make("Tanh", "x"), np.float32(2), name="norm")
    elif kind == "unscaled-add":
        out = make("Add", make("Tanh", "x"), make.normal(K, 1)[:, 0], name="norm")
    else:
        out = make("LayerNormalization", "x", make.normal(K, 1)[:, 0], name="norm")
    if kind == "reshaped":
        out = make("Reshape", out, np.array([0, 0, K]))
    if kind == "inner":
        outputs["twice"] = shape
        out, _ = make("Add", out, make.normal(K, 1)[:, 0]), make("Tanh", out, name="twice")
    make("MatMul", out, make.normal(K, K), name="y")
    if kind == "also":
        make("Tanh", out, name="more")
        outputs["more"] = shape
    if kind == "output":
        outputs["norm"] = shape
    if kind == "second":
        make("MatMul", out, make("Transpose", out, perm=[0, 2, 1]), name="more")
        outputs["more"] = ("b", "t", "t")
    return normal_form(make.done({"x": shape}, outputs))


@pytest.mark.parametrize(
    "kind", ["input", "fed", "scalar", "unscaled-add", "reshaped", "inner", "also", "output", "second"]
)
def test_other_norms_stay(kind: str) -> None:
    """Read by something else, at any stage, or not scaled by a constant of that length: not a byte changes."""
    model = blocked(kind)
    before = ir.to_proto(model).SerializeToString()
    everything = {str(out.name): np.ones(K) for node in model.graph for out in node.outputs} | {"x": np.ones(K)}
    assert smooth(model, find_units(model), everything) == ()
    assert smoothing_factors(model, find_units(model), everything) == {}
    assert ir.to_proto(model).SerializeToString() == before


def test_a_dead_channel_stays() -> None:
    """Of a channel that is always 0, or that no weight reads, the factor is 1."""
    model = normed("layer")
    weights = [initializer(model, unit.weight).numpy() for unit in find_units(model)]
    peaks = np.full(K, 4.0)
    peaks[2] = 0
    factors = smoothing_factors(model, find_units(model), {"norm": peaks})["norm"]
    assert factors[2] == 1.0
    assert np.isfinite(factors).all()
    assert np.abs(weights[0][2]).max() > 0


@pytest.mark.parametrize(
    ("peaks", "alpha", "told"),
    [
        (np.ones(K + 1), 0.5, "one per channel"),
        (np.ones((1, K)), 0.5, "one per channel"),
        (np.full(K, np.nan), 0.5, "finite"),
        (np.full(K, -1.0), 0.5, "none below 0"),
        (np.ones(K), 1.5, "from 0"),
    ],
)
def test_bad_maxima_are_refused(peaks: np.ndarray, alpha: float, told: str) -> None:
    """Another length, another rank, no numbers, negative ones, or an exponent that means nothing."""
    model = normed("layer")
    with pytest.raises(BadRequest, match=told):
        smooth(model, find_units(model), {"norm": peaks}, alpha)


def test_a_factor_of_zero_is_refused() -> None:
    """Nothing can be divided by it."""
    model = normed("layer")
    with pytest.raises(BadRequest, match="a factor is 0"):
        divide(model, find_units(model), {"norm": np.zeros(K)})
