"""What a choice costs in time, measured: one small graph per (operator, shape, choice), run by the engine itself.

A unit is timed as it stands in the model, between floats: what it takes to round its input and to widen its output is
in its time. Where two units follow each other with nothing in between, that is counted twice; `boundaries` says for
which pairs, and the allocation gives it back when both ends run on integers.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgekit.quant.graph import Unit, find_units, initializer
from edgekit.quant.lower import lower
from edgekit.quant.targets import Target
from edgekit.runtime.backends import Session, open_session

Array = npt.NDArray[Any]

SECONDS = 0.04  # spent on each graph, at least
LEAST_RUNS, MOST_RUNS = 5, 200
WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Timing:
    """Median and interquartile range of one run, in milliseconds, over `runs` runs."""

    median: float
    spread: float
    runs: int


class LatencyTable:
    """Timings by operator, shape and choice; kept in a file, since a device does not change between plans.

    Args:
        file: where timings of this backend and machine are kept, or None.
        threads: of the inference engine.
    """

    def __init__(self, target: Target, file: Path | None = None, *, threads: int = 0) -> None:
        self._target, self._file, self._threads = target, file, threads
        stored = json.loads(file.read_bytes()) if file is not None and file.is_file() else {}
        self._timings = {key: Timing(*value) for key, value in stored.items()}

    def measure(
        self,
        model: ir.Model,
        units: Sequence[Unit],
        shapes: Mapping[str, tuple[int, ...]],
        report: Callable[[str, float], None],
    ) -> npt.NDArray[np.float64]:
        """Milliseconds of every allowed choice: (units, choices of CHOICES), NaN where it is not allowed.

        Args:
            model: the normalised graph they are units of.
            units: tables are free.
            shapes: of every unit's data.
            report: told the share that is done.
        """
        from edgekit.quant.choices import CHOICES

        names = list(CHOICES)
        found = np.full((len(units), len(names)), np.nan)
        for row, unit in enumerate(units):
            for choice in self._target.allowed(unit):
                found[row, names.index(choice)] = self.time(model, unit, shapes.get(unit.data, ()), choice).median
            report("timing", (row + 1) / len(units))
        return found

    def time(self, model: ir.Model, unit: Unit, shape: tuple[int, ...], choice: str) -> Timing:
        """One unit at one choice, from memory if it was ever measured here."""
        if unit.op == "Gather":
            return Timing(0.0, 0.0, 0)
        key = _key(model, unit, shape, choice, self._target)
        if key not in self._timings:
            self._timings[key] = self._measure(model, unit, shape, choice)
            self._keep()
        return self._timings[key]

    def boundary(self, shape: tuple[int, ...]) -> float:
        """Milliseconds of rounding a tensor of a shape to 8 bits and widening it again."""
        key = f"{self._target.name} boundary of {list(shape)}"
        if key not in self._timings:
            x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
            given = [_constant("scale", np.float32(0.02)), _constant("zero", np.uint8(128))]
            small = ir.node("QuantizeLinear", [x, *given])
            wide = ir.node("DequantizeLinear", [small.outputs[0], *given])
            wide.outputs[0].name, wide.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
            graph = ir.Graph([x], wide.outputs, nodes=[small, wide], initializers=given, opset_imports={"": 20})
            self._timings[key] = self._timed(ir.Model(graph, ir_version=10), shape)
            self._keep()
        return self._timings[key].median

    def _measure(self, model: ir.Model, unit: Unit, shape: tuple[int, ...], choice: str) -> Timing:
        alone = _alone(model, unit, shape)
        (found,) = find_units(alone)
        one = replace(found, role=unit.role)  # alone, every product is the last one
        lower(alone, (one,), {one.id: choice}, dict.fromkeys((one.data, one.output), (-3.0, 3.0)), self._target)
        return self._timed(alone, shape)

    def _timed(self, alone: ir.Model, shape: tuple[int, ...]) -> Timing:
        with tempfile.TemporaryDirectory(prefix="timing-") as folder:
            path = Path(folder) / "unit.onnx"
            ir.save(alone, path)
            session = open_session(path, "cpu", threads=self._threads)
        return timed(session, {"x": np.random.default_rng(0).standard_normal(shape, np.float32)})

    def _keep(self) -> None:
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            told = {key: [each.median, each.spread, each.runs] for key, each in sorted(self._timings.items())}
            beside = self._file.with_suffix(".new")
            beside.write_text(json.dumps(told, indent=0))
            beside.replace(self._file)


def timed(session: Session, feeds: Mapping[str, Array]) -> Timing:
    """Run a session a few times; milliseconds."""
    for _ in range(WARM_UP):
        session.run(feeds)
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) < LEAST_RUNS or (time.perf_counter() - begin < SECONDS and len(taken) < MOST_RUNS):
        start = time.perf_counter()
        session.run(feeds)
        taken.append(1e3 * (time.perf_counter() - start))
    low, _, high = statistics.quantiles(taken, n=4)
    return Timing(statistics.median(taken), high - low, len(taken))


def boundaries(units: Sequence[Unit]) -> tuple[tuple[int, int], ...]:
    """Pairs of units of which the second reads what the first made, with nothing in between."""
    maker = {unit.output: row for row, unit in enumerate(units)}
    return tuple((maker[unit.data], row) for row, unit in enumerate(units) if unit.data in maker)


def _alone(model: ir.Model, unit: Unit, shape: tuple[int, ...]) -> ir.Model:
    """A graph of one product: x -> product (+ bias), with weights of a fixed pattern."""
    node = next(each for each in model.graph if each.name == unit.id)
    weight_shape = tuple(int(size) for size in initializer(model, unit.weight).shape)
    generator = np.random.default_rng(0)
    weights = {"w": generator.standard_normal(weight_shape, np.float32) / np.sqrt(unit.k, dtype=np.float32)}
    if unit.op == "Conv":
        weights["b"] = generator.standard_normal(unit.n, np.float32)
    values = {name: _constant(name, array) for name, array in weights.items()}
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    product = ir.node(
        unit.op, [x, *values.values()], attributes={key: each.value for key, each in node.attributes.items()}
    )
    product.name = "unit"
    made = [product]
    output = product.outputs[0]
    output.name, output.type = "y", ir.TensorType(ir.DataType.FLOAT)
    if unit.op == "MatMul":
        bias = _constant("b", generator.standard_normal(unit.n, np.float32))
        values["b"] = bias
        output.name = "y.product"
        add = ir.node("Add", [output, bias])
        made.append(add)
        output = add.outputs[0]
        output.name, output.type = "y", ir.TensorType(ir.DataType.FLOAT)
    # a reader that is not quantized, so that the engine cannot leave the result as integers
    graph = ir.Graph(
        [x], [output], nodes=made, initializers=list(values.values()), opset_imports=dict(model.opset_imports)
    )
    return ir.Model(graph, ir_version=model.ir_version)


def _constant(name: str, array: Array) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)


def _key(model: ir.Model, unit: Unit, shape: tuple[int, ...], choice: str, target: Target) -> str:
    node = next(each for each in model.graph if each.name == unit.id)
    attributes = (
        ",".join(f"{key}={each.value}" for key, each in sorted(node.attributes.items())) if unit.op == "Conv" else ""
    )
    return f"{target.name} {unit.op} {unit.n}x{unit.k}{list(unit.kernel)} of {list(shape)} {attributes} {choice}"
