"""Ranges of activations on the deployed trajectory, found inside the graph: nothing large ever leaves the engine.

Two passes over the recorded runs of a part. The first finds the lowest and highest value of everything a unit reads or
makes; the second rounds each to 8 bits at a few clipped ranges and keeps the one with the least squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgekit.errors import GateFailed
from edgekit.quant.graph import Unit
from edgekit.quant.pictures import Call
from edgekit.quant.scratch import scratch_graph
from edgekit.runtime.backends import open_session

Array = npt.NDArray[Any]
Progress = Callable[[str, float], None]
Range = tuple[float, float]

SHARES = (1.0, 0.85, 0.7, 0.55)  # of the whole range, that are tried
CLIP_CALLS = 4  # recorded runs they are tried on, spread over all of them
LEVELS = 255


@dataclass(frozen=True)
class Calibration:
    """What is known of one part's activations.

    Attributes:
        ranges: (low, high) to round to 8 bits in, by value name; 0 lies inside.
        spread: of each value, the widest step's range over the narrowest's.
        shapes: of each value in the last run.
        channel_max: the largest magnitude of every channel, of the values that MatMuls read.
        moments: the mean square of every channel, of the same values.
    """

    ranges: dict[str, Range]
    spread: dict[str, float]
    shapes: dict[str, tuple[int, ...]]
    channel_max: dict[str, npt.NDArray[np.float32]]
    moments: dict[str, npt.NDArray[np.float32]]


def calibrate(model: ir.Model, units: Sequence[Unit], calls: Sequence[Call], progress: Progress) -> Calibration:
    """Measure every value that a unit reads or makes.

    Args:
        model: a normalised graph; it is not changed.
        units: its units; tables are passed over.
        calls: recorded runs.
        progress: told the share that is done.

    Raises:
        GateFailed: an activation is not finite.
    """
    values = list(dict.fromkeys(name for unit in units if unit.op != "Gather" for name in (unit.data, unit.output)))
    wide = {unit.data for unit in units if unit.op == "MatMul"}
    ends: dict[str, list[tuple[float, float]]] = {name: [] for name in values}
    shapes: dict[str, tuple[int, ...]] = {}
    channels: dict[str, npt.NDArray[np.float32]] = {}
    squares: dict[str, npt.NDArray[np.float32]] = {}
    for number, found in enumerate(_runs(model, calls, partial(_add_ends, names=values, wide=wide))):
        for name in values:
            low, high = float(found[f"{name}.low"]), float(found[f"{name}.high"])
            if not np.isfinite([low, high, float(found[f"{name}.mean"])]).all():
                raise GateFailed(f"activation {name!r} is not finite on the calibration inputs; check the weights")
            ends[name].append((low, high))
            shapes[name] = tuple(int(size) for size in found[f"{name}.shape"])
            if name in wide:
                channels[name] = np.maximum(channels.get(name, np.float32(0)), found[f"{name}.channels"])
                squares[name] = squares.get(name, np.float32(0)) + found[f"{name}.squares"] / np.float32(len(calls))
        progress("calibrating", 0.5 * (number + 1) / len(calls))
    whole = {
        name: (min(0.0, *(low for low, _ in seen)), max(0.0, *(high for _, high in seen)))
        for name, seen in ends.items()
    }
    ranges = _clipped(model, calls, whole, progress)
    return Calibration(ranges, {name: _spread(seen) for name, seen in ends.items()}, shapes, channels, squares)


def _clipped(
    model: ir.Model, calls: Sequence[Call], whole: dict[str, Range], progress: Progress
) -> dict[str, tuple[float, float]]:
    """The range of least squared error, of those shrunk by SHARES."""
    calls = calls[:: -(-len(calls) // CLIP_CALLS)]
    lost = {name: np.zeros(len(SHARES)) for name in whole}
    for number, found in enumerate(_runs(model, calls, partial(_add_losses, whole=whole))):
        for name in whole:
            lost[name] += found[f"{name}.lost"]
        progress("calibrating", 0.5 + 0.5 * (number + 1) / len(calls))
    best = {name: SHARES[int(losses.argmin())] for name, losses in lost.items()}
    return {name: (low * best[name], high * best[name]) for name, (low, high) in whole.items()}


def _runs(model: ir.Model, calls: Sequence[Call], add: Callable[[ir.Graph], None]) -> Iterator[dict[str, Array]]:
    """Run a copy of the graph, with more outputs, on every recorded run.

    Hundreds of tensors are reduced in one run; `eager`, each is reduced as soon as it is there, and goes.
    """
    graph = model.clone()
    add(graph.graph)
    with scratch_graph(graph, "calibrating") as path:
        session = open_session(path, "cpu", planned=False, eager=True)
        for call in calls:
            yield session.run(call.feeds)


def _values(graph: ir.Graph, names: Sequence[str]) -> Iterator[ir.Value]:
    wanted = set(names)
    for value in graph.inputs:
        if value.name in wanted:
            yield value
    for node in list(graph):
        for value in node.outputs:
            if value.name in wanted:
                yield value


def _add_ends(graph: ir.Graph, names: Sequence[str], wide: set[str]) -> None:
    for value in _values(graph, names):
        _output(graph, f"{value.name}.low", "ReduceMin", [value], {"keepdims": 0})
        _output(graph, f"{value.name}.high", "ReduceMax", [value], {"keepdims": 0})
        _output(graph, f"{value.name}.mean", "ReduceMean", [value], {"keepdims": 0})  # NaN is neither low nor high
        _output(graph, f"{value.name}.shape", "Shape", [value], {}, ir.DataType.INT64)
        if value.name in wide:
            _add_channels(graph, value)


def _add_channels(graph: ir.Graph, value: ir.Value) -> None:
    """max|x| and the mean of x^2 over every axis but the last, as rows."""
    assert value.shape is not None
    axes = _constant(graph, f"{value.name}.axes", np.arange(len(value.shape) - 1))
    size = _node(graph, "Abs", [value])
    _output(graph, f"{value.name}.channels", "ReduceMax", [size, axes], {"keepdims": 0})
    square = _node(graph, "Mul", [value, value])
    _output(graph, f"{value.name}.squares", "ReduceMean", [square, axes], {"keepdims": 0})


def _add_losses(graph: ir.Graph, whole: dict[str, Range]) -> None:
    for value in _values(graph, list(whole)):
        low, high = whole[str(value.name)]
        losses = []
        for share in SHARES:
            scale = max((high - low) * share / LEVELS, 1e-30)
            zero = np.uint8(np.clip(np.rint(-low * share / scale), 0, LEVELS))
            name = f"{value.name}.at{share:g}"
            given = [_constant(graph, f"{name}.scale", np.float32(scale)), _constant(graph, f"{name}.zero", zero)]
            rounded = _node(graph, "DequantizeLinear", [_node(graph, "QuantizeLinear", [value, *given]), *given])
            losses.append(_node(graph, "ReduceSumSquare", [_node(graph, "Sub", [value, rounded])], {"keepdims": 0}))
        axis = _constant(graph, f"{value.name}.first", np.array([0]))
        rows = [_node(graph, "Unsqueeze", [loss, axis]) for loss in losses]
        _output(graph, f"{value.name}.lost", "Concat", rows, {"axis": 0})


def _constant(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.initializers[name] = value
    return value


def _node(graph: ir.Graph, op: str, inputs: Sequence[ir.Value], attributes: dict[str, Any] | None = None) -> ir.Value:
    node = ir.node(op, list(inputs), attributes=attributes or {})
    graph.append(node)
    return node.outputs[0]


def _output(
    graph: ir.Graph,
    name: str,
    op: str,
    inputs: Sequence[ir.Value],
    attributes: dict[str, Any],
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> None:
    value = _node(graph, op, inputs, attributes)
    value.name, value.type = name, ir.TensorType(dtype)
    graph.outputs.append(value)


def _spread(ends: list[tuple[float, float]]) -> float:
    widths = [high - low for low, high in ends if high > low]
    return max(widths) / min(widths) if widths else 1.0
