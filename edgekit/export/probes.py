"""Sensitivity of every unit to every choice from a few gradients, instead of one run per unit and choice.

A unit that alone is changed by a choice moves its own output by d = unit_choice(x) - unit(x), which is computed. To
first order the part's output moves by J d, and a metric with the linear map A sees the error vector A J d. Its
coordinate along a random v ~ N(0, I) is

    <v, A J d> = <J' A' v, d> = <g, d>,        E <g, d>^2 = |A J d|^2        (Hutchinson 1989),

and one backward pass gives g = J' A' v at the outputs of all units. A' is Metric.pull. The same v serves all units, so
the coordinates are a random projection of the error vectors (Johnson, Lindenstrauss 1984): inner products between units
survive too, and with them what a mix of choices does.

Everything within the unit is exact: rounded weights, rounded inputs, their product; only what follows is linearised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from edgekit.errors import BadRequest, MemoryLimit
from edgekit.export.graph_torch import read_weight, run_graph
from edgekit.export.probe_rounding import as_chosen
from edgekit.quant.choices import CHOICES
from edgekit.quant.graph import Unit, weight_matrix
from edgekit.quant.lower.common import Store, rtn_store
from edgekit.quant.metrics import Metric
from edgekit.quant.pictures import Call
from edgekit.quant.scores import Scores
from edgekit.quant.targets import Target

F32 = npt.NDArray[np.float32]
Range = tuple[float, float]
Progress = Callable[[str, float], None]

PROBES = 8  # per recorded run and metric: a squared length is off by sqrt(2 / (probes * runs))
MAX_BYTES = 8 << 30
HALF = 2  # bytes of a number of a change that is kept


def probe_scores(
    model: ir.Model,
    units: Sequence[Unit],
    allowed: Mapping[str, Sequence[str]],
    calls: Sequence[Call],
    metrics: Sequence[Metric],
    *,
    target: Target,
    ranges: Mapping[str, Range],
    probes: int = PROBES,
    seed: int = 0,
    store: Store = rtn_store,
    max_bytes: int = MAX_BYTES,
    progress: Progress = lambda _, __: None,
) -> Scores:
    """Estimate the error of every unit alone at every choice, in each metric, as an average over recorded runs.

    Args:
        model: a normalised graph; it is not changed.
        units: which of its units.
        allowed: by unit id, names of CHOICES.
        calls: recorded runs. An error is weighed by the run's gain for the metric, 1 where it has none.
        metrics: of the part's output, or of its floating outputs joined into one array, as workloads join them.
        target: the device, which decides how activations are rounded.
        ranges: (low, high) by value name, of what is rounded by one scale.
        probes: random directions per run and metric.
        seed: of the directions.
        store: how a weight matrix is rounded; see `lower`.
        max_bytes: of activations and changes that lie in memory at a time, weights apart. Where they are more, runs
            follow one another (weights are rounded again for each), then every run needs several rounds of gradients.
        progress: told the share that is done.

    Returns:
        Vectors (units, choices, runs * probes): their squared lengths are the estimated errors.

    Raises:
        UnsupportedModel: the graph has an operator that is not modelled; a scan has no such limit.
        BadRequest: no runs, no probes, an activation without a range, a unit that the graph does not have.
        MemoryLimit: one run alone needs more than `max_bytes`.
    """
    if not calls or probes < 1 or not units:
        raise BadRequest(f"{len(calls)} runs, {probes} probes of {len(units)} units: nothing to estimate from")
    prober = _Prober(model, units, allowed, target, ranges, store)
    width = len(calls) * probes
    vectors = {metric.name: prober.blank(width) for metric in metrics}
    done = 0
    for traces in prober.batches(calls, max_bytes):
        for group in prober.groups(traces, max_bytes):
            _project(prober, traces, group, metrics, vectors, probes, seed)
            done += len(traces) * len(group)
            progress("probing", done / (len(calls) * len(units)))
    return Scores(tuple(unit.id for unit in units), prober.choices, vectors, "probe")


def _project(
    prober: _Prober,
    traces: Sequence[_Trace],
    group: Sequence[Unit],
    metrics: Sequence[Metric],
    vectors: Mapping[str, F32],
    probes: int,
    seed: int,
) -> None:
    """Fill in some units' coordinates of some runs."""
    deltas = prober.deltas(traces, group)
    for trace in traces:
        for at, metric in enumerate(metrics):
            into = vectors[metric.name]
            gain = math.sqrt(trace.call.gain.get(metric.name, 1.0) / into.shape[-1])
            directions = _directions(trace, metric, (seed, trace.number, at), probes)
            for column, direction in enumerate(directions, start=trace.number * probes):
                for unit, products in trace.project(direction, deltas):
                    for name, product in products.items():
                        into[prober.rows[unit], prober.choices.index(name), column] = product * gain


@dataclass
class _Delta:
    """What choices add to one unit's output, as half floats of a tensor each, scaled to reach 1."""

    scales: dict[str, float] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, change: Tensor) -> None:
        peak = float(change.abs().max()) if change.numel() else 0.0
        if peak > 0:
            self.scales[name], self.values[name] = peak, (change / peak).half().reshape(-1)

    def products(self, gradient: Tensor) -> dict[str, float]:
        """<gradient, change> of every choice that changes anything."""
        flat = gradient.reshape(-1)
        return {name: self.scales[name] * float(flat @ each.to(flat.dtype)) for name, each in self.values.items()}


@dataclass
class _Trace:
    """One run that can still be differentiated.

    Attributes:
        number, call: which recorded run.
        output: the joined floating outputs.
        data, made: by unit id, what its product read (with a convolution's bias) and made.
        bytes: of tensors that the run keeps alive, weights apart.
    """

    number: int
    call: Call
    output: Tensor
    data: dict[str, tuple[Tensor, Tensor | None]]
    made: dict[str, Tensor]
    bytes: int

    def project(
        self, direction: Tensor, deltas: Mapping[tuple[int, str], _Delta]
    ) -> Iterator[tuple[str, dict[str, float]]]:
        """Of each unit of `deltas`, by choice: how far its change moves the output along a direction."""
        if not self.output.requires_grad:
            return  # no unit leads to it
        units = [unit for number, unit in deltas if number == self.number]
        made = [self.made[unit] for unit in units]
        gradients = torch.autograd.grad(self.output, made, direction, retain_graph=True, allow_unused=True)
        for unit, gradient in zip(units, gradients, strict=True):
            if gradient is not None:
                yield unit, deltas[self.number, unit].products(gradient)


class _Prober:
    """One graph, its units, and how to run them."""

    def __init__(
        self,
        model: ir.Model,
        units: Sequence[Unit],
        allowed: Mapping[str, Sequence[str]],
        target: Target,
        ranges: Mapping[str, Range],
        store: Store,
    ) -> None:
        self.model, self.units, self.allowed, self.target, self.ranges = model, units, allowed, target, ranges
        self.store = store
        self.choices = tuple(name for name in CHOICES if any(name in allowed[unit.id] for unit in units))
        self.rows = {unit.id: row for row, unit in enumerate(units)}
        self.nodes = {str(node.name): node for node in model.graph if node.name in self.rows}
        if missing := self.rows.keys() - self.nodes.keys():
            raise BadRequest(f"the graph has no node {sorted(missing)[0]!r}; find its units anew")
        self._weights: dict[ir.Value, Tensor] = {}

    def blank(self, width: int) -> F32:
        """Zeros where a choice is allowed, NaN elsewhere: (units, choices, width)."""
        found = np.full((len(self.units), len(self.choices), width), np.nan, np.float32)
        for row, unit in enumerate(self.units):
            found[row, [self.choices.index(name) for name in self.allowed[unit.id]]] = 0
        return found

    def batches(self, calls: Sequence[Call], max_bytes: int) -> Iterator[list[_Trace]]:
        """Runs, as many at a time as fit: weights are rounded once for all of them."""
        batch: list[_Trace] = []
        largest = 0
        for number, call in enumerate(calls):
            if batch and (len(batch) + 1) * largest > max_bytes:
                yield batch
                batch.clear()
            batch.append(self._trace(number, call))
            changes = sum(self._delta_bytes(batch[-1:], unit) for unit in self.units)
            largest = max(largest, batch[-1].bytes + changes)
        yield batch

    def groups(self, traces: Sequence[_Trace], max_bytes: int) -> Iterator[list[Unit]]:
        """Units whose changes fit in memory beside the runs; one group where there is room for all."""
        needed = [self._delta_bytes(traces, unit) for unit in self.units]
        room = max_bytes - sum(trace.bytes for trace in traces)
        if room < max(needed) and len(traces) == 1:
            raise MemoryLimit(
                f"probing needs {(max_bytes - room + max(needed)) / 2**30:.1f} GiB for one run of this graph and has "
                f"{max_bytes / 2**30:.1f}; calibrate on smaller pictures or a smaller batch, or allow more"
            )
        group: list[Unit] = []
        used = 0
        for unit, size in zip(self.units, needed, strict=True):
            if group and used + size > room:
                yield group
                group, used = [], 0
            group.append(unit)
            used += size
        yield group

    def deltas(self, traces: Sequence[_Trace], group: Iterable[Unit]) -> dict[tuple[int, str], _Delta]:
        """What every choice of some units adds to their outputs, in each run; inputs of these units are let go."""
        found = {(trace.number, unit.id): _Delta() for unit in group for trace in traces}
        with torch.no_grad():
            for unit in group:
                node, weight = self.nodes[unit.id], weight_matrix(self.model, unit)
                for choice in (self.target.choice(name) for name in self.allowed[unit.id] if name != "fp32"):
                    run = as_chosen(node, unit, weight, choice, self.target, self.ranges, self.store)
                    if run is None:
                        continue
                    for trace in traces:
                        change = run(*trace.data[unit.id]) - trace.made[unit.id]
                        found[trace.number, unit.id].add(choice.name, change)
                for trace in traces:
                    del trace.data[unit.id]
        return found

    def _delta_bytes(self, traces: Sequence[_Trace], unit: Unit) -> int:
        changing = sum(name != "fp32" for name in self.allowed[unit.id])
        numbers: int = sum(trace.made[unit.id].numel() for trace in traces)
        return numbers * changing * HALF

    def _weight(self, value: ir.Value) -> Tensor:
        """Read once: weights that have to be computed, such as stored halves, are then in memory once for all runs."""
        if value not in self._weights:
            self._weights[value] = read_weight(value)
        return self._weights[value]

    def _trace(self, number: int, call: Call) -> _Trace:
        data: dict[str, tuple[Tensor, Tensor | None]] = {}
        made: dict[str, Tensor] = {}

        def watch(node: ir.Node, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor]) -> None:
            if node.name in self.rows:
                read = inputs[1 if node.op_type == "Gather" else 0]
                assert read is not None
                data[node.name] = read.detach(), inputs[2] if len(inputs) > 2 else None
                made[node.name] = outputs[0]
                if not outputs[0].requires_grad:
                    outputs[0].requires_grad_()

        held: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()

        feeds = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in call.feeds.items()}
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = run_graph(self.model, feeds, weights=self._weight, watch=watch)
            output = _joined(outputs)
        for tensor in (*(read for read, _ in data.values()), *made.values()):
            keep(tensor)
        for weight in self._weights.values():
            held.pop(weight.untyped_storage().data_ptr(), None)
        return _Trace(number, call, output, data, made, sum(held.values()))


def _joined(outputs: Mapping[str, Tensor]) -> Tensor:
    """edgekit.quant.pictures.joined, differentiable."""
    floats = [value for name, value in outputs.items() if value.is_floating_point() and not name.startswith("guard.")]
    if len(floats) == 1:
        return floats[0]
    return torch.cat([value.reshape(len(value), -1) if value.ndim else value.reshape(1, 1) for value in floats], 1)


def _directions(trace: _Trace, metric: Metric, seed: tuple[int, ...], probes: int) -> Iterator[Tensor]:
    """A' v of random v, in the output's type."""
    reference = trace.output.detach().numpy()
    generator = np.random.default_rng(seed)
    for _ in range(probes):
        v = generator.standard_normal(metric.dim(reference))
        yield torch.from_numpy(metric.pull(reference, v)).to(trace.output.dtype).reshape(reference.shape)
