"""The graphs of a bundle, opened when first asked and run in batches they allow."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgekit.bundle.manifest import Manifest, TensorSpec
from edgekit.errors import BadManifest, BadRequest
from edgekit.runtime.backends import Array, Session

OpenSession = Callable[..., Session]

FEEDABLE = ("float32", "float16", "int64", "int32")  # dtypes the sources of a recipe can be cast to


@dataclass(frozen=True)
class Meter:
    """Seconds and runs of each part, for one request."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    opening: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    runs: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))


class Networks:
    """Parts by name. `open_session(graph, device, threads=)` is the backend seam."""

    def __init__(self, root: Path, manifest: Manifest, device: str, threads: int, open_session: OpenSession) -> None:
        self._root, self._manifest = root, manifest
        self._device, self._threads, self._open_session = device, threads, open_session
        self._sessions: dict[str, Session] = {}

    def run(self, name: str, feeds: Mapping[str, Array], meter: Meter) -> dict[str, Array]:
        """Run a part; every feed has the batch on axis 0, and so has every output, in float32 where it is a float.

        Raises:
            BadRequest: a size or batch the graph was not exported for. SessionFailed: the engine refused.
        """
        session = self._session(name, meter)
        inputs = {spec.name: spec for spec in self._manifest.parts[name].inputs}
        cast = {key: _cast(name, inputs[key], value) for key, value in feeds.items()}
        self._check_sizes(name, inputs, cast)
        batch = max((len(value) for value in cast.values()), default=1)
        step = self._batch_of(name, inputs, batch)
        start = time.perf_counter()
        slices = [slice(at, at + step) for at in range(0, batch, step)]
        answers = [session.run({key: value[part] for key, value in cast.items()}) for part in slices]
        meter.seconds[name] += time.perf_counter() - start
        meter.runs[name] += len(slices)
        joined = {key: np.concatenate([answer[key] for answer in answers]) for key in answers[0]}
        return {key: value.astype(np.float32) if value.dtype.kind == "f" else value for key, value in joined.items()}

    def close(self) -> None:
        """Let go of every session; the next run opens anew."""
        self._sessions.clear()

    def _session(self, name: str, meter: Meter) -> Session:
        if name not in self._sessions:
            start = time.perf_counter()
            graph = self._root / self._manifest.parts[name].graph
            self._sessions[name] = self._open_session(graph, self._device, threads=self._threads)
            meter.opening[name] += time.perf_counter() - start
        return self._sessions[name]

    def _check_sizes(self, part: str, inputs: Mapping[str, TensorSpec], feeds: Mapping[str, Array]) -> None:
        """Hold every axis but the batch against the graph: fixed sizes and the ranges of dynamic ones."""
        for name, value in feeds.items():
            shape = inputs[name].shape
            if len(shape) != value.ndim:
                raise BadManifest(f"part {part!r}: input {name!r} has {len(shape)} axes, its source {value.ndim}")
            for axis, (dim, size) in enumerate(zip(shape[1:], value.shape[1:], strict=True), start=1):
                low, high = self._range(dim)
                if not low <= size <= high:
                    legal = f"{low}" if low == high else f"{low} to {high}"
                    raise BadRequest(
                        f"part {part!r}: axis {axis} of {name!r} would be {size}; the graph was exported for {legal}"
                    )

    def _batch_of(self, part: str, inputs: Mapping[str, TensorSpec], batch: int) -> int:
        """How many images one run takes: as many as asked where the graph allows, else its limit."""
        step = batch
        for spec in inputs.values():
            low, high = self._range(spec.shape[0])
            if low == high and batch % low:
                raise BadRequest(f"part {part!r} runs {low} images at a time; {batch} is no multiple of it")
            step = min(step, high)
        return step

    def _range(self, dim: int | str) -> tuple[int, int]:
        if isinstance(dim, int):
            return dim, dim
        axis = self._manifest.axes.get(dim)
        return (axis.min, axis.max) if axis else (1, 2**31)


def _cast(part: str, spec: TensorSpec, value: Array) -> Array:
    if spec.dtype not in FEEDABLE:
        raise BadManifest(
            f"part {part!r}: input {spec.name!r} is {spec.dtype}; a source is one of {', '.join(FEEDABLE)}"
        )
    return np.ascontiguousarray(value, dtype=spec.dtype)
