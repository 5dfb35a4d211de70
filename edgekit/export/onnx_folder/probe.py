"""Proof for adopted parts: what the graphs were exported from is not there, so they are held against themselves.

Every part is run in ONNX Runtime on fixed inputs: answers are finite, not constant, and of the declared shapes; a row
of a batch answers as it does alone; and a latent of each size up to the coarsest its network divides by is tried.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.bundle.manifest import Gate, TensorSpec
from edgekit.errors import ParityFailed, SessionFailed
from edgekit.runtime.backends import Session, open_session
from edgekit.runtime.backends.ort import OrtSession

Array = npt.NDArray[Any]
Bounds = tuple[float, float]

# Rows of a batch in one run and alone: another order of summation, and for float16 its rounding.
LIMITS = {"float32": 1e-4, "float16": 2e-2}
MULTIPLES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Probe:
    """How a part is tried.

    Attributes:
        part: its name, for messages.
        inputs, outputs: the signature it is to have.
        fill: uniform bounds of inputs that are no unit normals (integers below the upper bound).
        sizes: of dynamic axes, in this order: (name, size of a run), the batch left out.
        shared: inputs whose first row counts for the whole batch.
    """

    part: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    fill: Mapping[str, Bounds]
    sizes: tuple[Mapping[str, int], ...]
    shared: tuple[str, ...] = ()

    @property
    def batches(self) -> bool:
        """Whether the batch axis is free."""
        return all(spec.shape[:1] == ("batch",) for spec in self.inputs)

    def feeds(self, sizes: Mapping[str, int]) -> dict[str, Array]:
        """Inputs for these sizes, the same on every machine; a longer batch begins with the shorter one."""
        return {spec.name: self._fed(spec, sizes) for spec in self.inputs}

    def _fed(self, spec: TensorSpec, sizes: Mapping[str, int]) -> Array:
        shape = resolved(spec, sizes)
        generator = np.random.default_rng(zlib.crc32(f"{self.part}/{spec.name}".encode()))
        low, high = self.fill.get(spec.name, (0.0, 1.0))
        if spec.dtype.startswith("int"):
            return generator.integers(int(low), int(high), shape).astype(spec.dtype)
        if spec.name in self.fill:
            made: Array = generator.uniform(low, high, shape)
        else:
            made = generator.standard_normal(shape)
        if spec.name in self.shared:
            made[:] = made[:1]
        return made.astype(spec.dtype)


def prove(probe: Probe, graph: Path) -> Gate:
    """Run a written graph on its probes.

    Returns:
        The worst difference between a row of a batch of two and the same row alone, of max|x|; 0 where the batch is
        fixed.

    Raises:
        SessionFailed: the engine refuses the graph or a run.
        ParityFailed: an answer of another shape, not finite or without content, or rows that depend on each other.
    """
    session = open_session(graph, "cpu")
    worst, runs = 0.0, []
    for sizes in probe.sizes:
        alone = run(probe, session, {**sizes, "batch": 1})
        runs.append("x".join(map(str, next(iter(alone.values())).shape)))
        if not probe.batches:
            continue
        feeds = probe.feeds({**sizes, "batch": 2})
        both = run(probe, session, {**sizes, "batch": 2})
        for row in (0, 1):
            one = _checked(probe, session.run({name: value[row : row + 1] for name, value in feeds.items()}), sizes, 1)
            worst = max(worst, *(apart(both[name][row : row + 1], one[name]) for name in one))
    limit = LIMITS["float16" if any(spec.dtype == "float16" for spec in probe.outputs) else "float32"]
    what = "rows of a batch of two against each alone, of max|x|" if probe.batches else "runs, finite"
    if not worst <= limit:
        raise ParityFailed(
            f"{probe.part}: a row of a batch differs by {worst:.2g} of max|x| from the same row alone, over the limit "
            f"of {limit:g}: the graph mixes the pictures of a batch. Export it with a dynamic batch, or with batch 1"
        )
    return Gate(f"{probe.part}: {what}, first answers {', '.join(runs)}", worst, limit)


def run(probe: Probe, session: Session, sizes: Mapping[str, int]) -> dict[str, Array]:
    """One run for these sizes, checked. Raises SessionFailed, ParityFailed."""
    return _checked(probe, session.run(probe.feeds(sizes)), sizes, sizes["batch"])


def finest_multiple(probe: Probe, graph: Path, axes: Sequence[str], coarsest: int) -> int:
    """The least of 1, 2, 4, … `coarsest` such that sizes that are odd multiples of it run.

    A graph traced on even sizes may have fixed how its network meets odd ones; then those fail in the engine.

    Raises:
        SessionFailed: not even multiples of `coarsest` run.
    """
    session = _quiet_session(graph)
    for multiple in MULTIPLES:
        sizes = {**probe.sizes[0], **dict.fromkeys(axes, 3 * multiple), "batch": 1}
        try:
            run(probe, session, sizes)
        except (SessionFailed, ParityFailed):
            if multiple >= coarsest:
                raise
        else:
            return multiple
    return coarsest


def _quiet_session(graph: Path) -> Session:
    """A session of a graph that is known to load, whose engine prints nothing about runs that fail on purpose."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    engine = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return OrtSession(engine, graph.name, "cpu")


def resolved(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A shape with its axes' sizes put in."""
    return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape)


def apart(one: Array, other: Array) -> float:
    """max|one - other| / max|other|."""
    wide = other.astype(np.float64)
    return float(np.abs(one.astype(np.float64) - wide).max() / np.abs(wide).max())


def _checked(probe: Probe, answers: dict[str, Array], sizes: Mapping[str, int], batch: int) -> dict[str, Array]:
    for spec in probe.outputs:
        value, wanted = answers[spec.name], resolved(spec, {**sizes, "batch": batch})
        where = f"{probe.part}: {spec.name}"
        if value.shape != wanted:
            raise ParityFailed(f"{where} is {value.shape} where the configs say {wanted}; do they belong together?")
        if not np.isfinite(value).all():
            raise ParityFailed(f"{where} is not finite on plain inputs; are the weights whole, or float16 overflowing?")
        if value.size > 1 and not np.ptp(value):
            raise ParityFailed(f"{where} is the same number everywhere, so nothing is proved; are the weights whole?")
    return {spec.name: answers[spec.name] for spec in probe.outputs}
