"""Small graphs to lower, what a lowered graph computes, and the obvious twins of its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from edgekit.quant.choices import CHOICES
from edgekit.quant.graph import Unit, find_units, normalised, weight_matrix
from edgekit.quant.lower import lower
from edgekit.quant.targets import Target, get_target
from edgekit.quant.weights import Stored, restore, store
from edgekit.runtime.backends import Session, open_session

Array = npt.NDArray[Any]

STRICT = get_target("cpu:any")
OPEN = replace(STRICT, allowed=lambda unit: tuple(CHOICES))  # one layer alone is always a graph's first and last
NBITS = ("w8a16", "w4a16-32", "w4a16-64", "w4a16-128", "w2a16-32")


def value(name: str, shape: Sequence[int | str] | None, dtype: int = TensorProto.FLOAT) -> Any:
    """A graph input or output."""
    return helper.make_tensor_value_info(name, dtype, shape)


def graph(nodes: Sequence[Any], weights: dict[str, Array], inputs: Any, outputs: Any, opset: int = 20) -> ir.Model:
    """A small graph."""
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    made = helper.make_graph(nodes, "small", inputs, outputs, stored)
    return ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10))


def linear(n: int, k: int, *, bias: bool = True, rank: int = 3, opset: int = 20, seed: int = 0) -> ir.Model:
    """x (..., k) to y (..., n)."""
    rng = np.random.default_rng(seed)
    weights = {"w": rng.standard_normal((k, n)).astype(np.float32), "b": rng.standard_normal(n).astype(np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p" if bias else "y"], name="product")]
    if bias:
        nodes.append(helper.make_node("Add", ["p", "b"], ["y"], name="bias"))
    else:
        del weights["b"]
    axes = ["batch", "tokens", "more"][: rank - 1]
    return graph(nodes, weights, [value("x", [*axes, k])], [value("y", [*axes, n])], opset)


def convolution(
    n: int, channels: int, kernel: int, stride: int = 1, *, bias: bool = True, relu: bool = False, seed: int = 0
) -> ir.Model:
    """x (batch, channels, h, w) to y, padded to the same size before the stride."""
    rng = np.random.default_rng(seed)
    weights = {"w": rng.standard_normal((n, channels, kernel, kernel)).astype(np.float32)}
    if bias:
        weights["b"] = rng.standard_normal(n).astype(np.float32) * 5
    inputs = ["x", "w", "b"] if bias else ["x", "w"]
    pads, strides = [kernel // 2] * 4, [stride] * 2
    nodes = [helper.make_node("Conv", inputs, ["p" if relu else "y"], name="product", pads=pads, strides=strides)]
    if relu:
        nodes.append(helper.make_node("Relu", ["p"], ["y"], name="relu"))
    shape = ["batch", n, "high", "wide"]
    return graph(nodes, weights, [value("x", ["batch", channels, "h", "w"])], [value("y", shape)])


@dataclass
class Lowered:
    """A lowered graph, opened."""

    path: Path
    units: tuple[Unit, ...]
    session: Session

    def __call__(self, **feeds: Array) -> Array:
        return next(iter(self.session.run(feeds).values()))

    def initializers(self) -> dict[str, Any]:
        """What is stored, by name."""
        return {name: each.const_value for name, each in ir.load(self.path).graph.initializers.items()}

    def ops(self) -> list[str]:
        """Operators as written."""
        return [node.op_type for node in ir.load(self.path).graph]


def lowered(
    folder: Path,
    model: ir.Model,
    choices: str | dict[str, str],
    ranges: dict[str, tuple[float, float]] | None = None,
    target: Any = OPEN,
    **options: Any,
) -> Lowered:
    """Lower, write and open; one choice for all units, or one each by id."""
    model = normalised(model)
    units = find_units(model)
    if isinstance(choices, str):
        choices = {unit.id: choices for unit in units}
    lower(model, units, choices, ranges or {}, target, **options)
    path = folder / "graph.onnx"
    ir.save(model, path, external_data=f"{path.name}.data")
    return Lowered(path, units, open_session(path, threads=1))


def stored_of(model: ir.Model, choice: str, code_bits: int = 7, target: Target = STRICT) -> tuple[Stored, Array]:
    """The one unit's weights as stored, and as they are meant, in float64."""
    model = normalised(model)
    (unit,) = find_units(model)
    stored = store(weight_matrix(model, unit), target.choice(choice), code_bits=code_bits)
    return stored, restore(stored).astype(np.float64)


def bias_of(model: ir.Model) -> Array | float:
    """The initializer `b`."""
    found = model.graph.initializers.get("b")
    return found.const_value.numpy() if found is not None else 0.0


def rounded(x: Array, low: float, high: float) -> Array:
    """What uint8 codes between `low` and `high` mean: one of 256 numbers, 0 among them."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = np.float32((high - low) / 255)
    middle = np.round(-low / step)
    return (np.clip(np.round(x / step) + middle, 0, 255) - middle) * np.float64(step)


def by_token(x: Array) -> Array:
    """Each row to 255 steps of its own."""
    step = (np.abs(x).max(-1, keepdims=True) * np.float32(1 / 127)).astype(np.float32)
    return np.round(np.divide(x, step, out=np.zeros_like(x), where=step > 0)).astype(np.float64) * step


def by_block(x: Array, block: int) -> Array:
    """Each run of `block` inputs to int8 with a scale of its own: what accuracy level 4 does within MatMulNBits."""
    k = x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -k % block)]).reshape(*x.shape[:-1], -1, block)
    return by_token(padded).reshape(*x.shape[:-1], -1)[..., :k]


def convolved(x: Array, weight: Array, kernel: int, stride: int) -> Array:
    """A convolution by its definition, (n, k) weights, float64."""
    pad = kernel // 2
    x = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), (2, 3))[:, :, ::stride, ::stride]
    return np.einsum("bchwij,ncij->bnhw", windows, weight.reshape(len(weight), x.shape[1], kernel, kernel))


def close(got: Array, wanted: Array, share: float = 1e-5) -> None:
    """Equal to a share of the largest number there."""
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= share * np.abs(wanted).max()


def range_of(x: Array) -> tuple[float, float]:
    return float(x.min()), float(x.max())


def table_graph() -> ir.Model:
    """ids to rows of a table."""
    table = np.random.default_rng(12).standard_normal((50, 16)).astype(np.float32)
    node = helper.make_node("Gather", ["table", "ids"], ["y"], name="rows", axis=0)
    ids = value("ids", ["batch", "tokens"], TensorProto.INT64)
    return graph([node], {"table": table}, [ids], [value("y", ["batch", "tokens", 16])])


def attention_graph() -> ir.Model:
    """A convolution read by another and by a sum; three projections of one value; a feed-forward pair."""
    rng = np.random.default_rng(14)
    node = helper.make_node

    def weight(*shape: int) -> Array:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    weights = {"first": weight(16, 4, 3, 3), "again": weight(16, 16, 3, 3), "last": weight(4, 16, 3, 3)}
    weights |= {name: weight(16, 16) for name in ("q", "k", "v", "o")} | {"up": weight(16, 64), "down": weight(64, 16)}
    weights |= {"ob": weight(16, 1)[:, 0], "rows": np.array([0, 16, -1]), "picture": np.array([0, 16, 8, 8])}
    nodes = [
        node("Conv", ["x", "first"], ["c0"], name="first", pads=[1] * 4),
        node("Conv", ["c0", "again"], ["c1"], name="conv1", pads=[1] * 4),
        node("Conv", ["c1", "again2"], ["c2"], name="conv2", pads=[1] * 4),
        node("Add", ["c1", "c2"], ["sum"], name="residual"),
        node("Reshape", ["sum", "rows"], ["flat"], name="flatten"),
        node("Transpose", ["flat"], ["t"], name="tokens", perm=[0, 2, 1]),
        *(node("MatMul", ["t", name], [f"{name}v"], name=f"to_{name}") for name in "qkv"),
        node("Transpose", ["kv"], ["kt"], name="turn", perm=[0, 2, 1]),
        node("MatMul", ["qv", "kt"], ["scores"], name="scores"),
        node("Softmax", ["scores"], ["shares"], name="softmax", axis=-1),
        node("MatMul", ["shares", "vv"], ["mixed"], name="mix"),
        node("MatMul", ["mixed", "o"], ["op"], name="to_out"),
        node("Add", ["op", "ob"], ["out"], name="out_bias"),
        node("MatMul", ["out", "up"], ["wide"], name="up"),
        node("Tanh", ["wide"], ["bent"], name="bend"),
        node("MatMul", ["bent", "down"], ["narrow"], name="down"),
        node("Transpose", ["narrow"], ["back"], name="back", perm=[0, 2, 1]),
        node("Reshape", ["back", "picture"], ["image"], name="image"),
        node("Conv", ["image", "last"], ["y"], name="last", pads=[1] * 4),
    ]
    weights["again2"] = weight(16, 16, 3, 3)
    ends = [value("x", ["batch", 4, 8, 8])], [value("y", ["batch", 4, 8, 8])]
    return graph(nodes, weights, *ends)


def wide_ranges(units: Sequence[Unit]) -> dict[str, tuple[float, float]]:
    """Ends that hold what `attention_graph` makes."""
    return {name: (-4.0, 4.0) for unit in units for name in (unit.data, unit.output)}


def best_integers(units: Sequence[Unit]) -> dict[str, str]:
    """w8a8 wherever the real target allows it."""
    return {unit.id: "w8a8" if "w8a8" in STRICT.allowed(unit) else "fp32" for unit in units}
