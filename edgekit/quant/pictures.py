"""The workload of a few-step bundle: prompts and seeds of its own recipe, run by the runtime that will run it.

Nothing here knows a sampler. The runtime opens its parts through one seam, and that is where a part is watched,
replaced by a quantized one, or answered from memory; so calibration sees the deployed steps, guidance and conditioning,
whatever they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.bundle.manifest import TensorSpec
from edgekit.bundle.store import Bundle
from edgekit.errors import BadRequest
from edgekit.quant.metrics import NSR, Metric, errors, metrics_for
from edgekit.runtime.backends import Binding, Session, open_session
from edgekit.runtime.diffusion.pipeline import DrawRequest, DrawResult, FewStepPipeline

Array = npt.NDArray[Any]

TINY_NOISE = (
    1e-3  # relative energy of the error that is put in to see how far it carries: small, so that it stays linear
)
KEPT = 64  # answers of unchanged parts remembered, each


@dataclass(frozen=True, eq=False)
class Call:
    """One run of a part on the deployed trajectory: what it was fed, what it answered.

    `gain` says how an error of its answer carries to the finished sample, by metric: energy there over energy here,
    both relative.
    """

    feeds: Mapping[str, Array]
    outputs: Mapping[str, Array]
    gain: Mapping[str, float] = field(default_factory=dict)


class PictureWorkload:
    """Requests, and the finished sample of each: what a denoiser, and what comes before it, is measured by.

    Args:
        bundle: the unquantized bundle.
        requests: what is drawn; images of one batch are one array.
        threads: of the inference engine.
    """

    def __init__(self, bundle: Bundle, requests: Sequence[DrawRequest], *, threads: int = 0) -> None:
        self._bundle, self._requests = bundle, tuple(requests)
        self._part_of = {bundle.root / part.graph: name for name, part in bundle.manifest.parts.items()}
        self._replaced: Mapping[str, Session] = {}
        self._watch: Callable[[str, Mapping[str, Array], dict[str, Array]], dict[str, Array]] | None = None
        self._pipeline = FewStepPipeline(bundle, threads=threads, open_session=self._open)
        self._main = self._pipeline.contract.main.name
        self._denoisers = set(denoisers(bundle))
        self._reference: tuple[Array, ...] | None = None

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What the finished samples are compared by."""
        return metrics_for(self.reference)

    @property
    def reference(self) -> tuple[Array, ...]:
        """The finished samples of the unquantized bundle."""
        if self._reference is None:
            self._reference = self.run({})
        return self._reference

    def run(self, replaced: Mapping[str, Session]) -> tuple[Array, ...]:
        """The finished sample of every request, (batch, ...) each, with some parts replaced; nothing is decoded."""
        self._replaced = replaced
        try:
            return tuple(self._sample(request) for request in self._requests)
        finally:
            self._replaced = {}

    def draw(self, replaced: Mapping[str, Session]) -> tuple[DrawResult, ...]:
        """The whole way to pictures."""
        self._replaced = replaced
        try:
            return tuple(
                next(event for event in self._pipeline.stream(request) if isinstance(event, DrawResult))
                for request in self._requests
            )
        finally:
            self._replaced = {}

    def record(
        self, parts: Sequence[str], *, whole: bool = False, replaced: Mapping[str, Session] | None = None
    ) -> dict[str, tuple[Call, ...]]:
        """Every run of some parts, in order, others replaced. `whole`: decoders and what follows run as well."""
        calls: dict[str, list[Call]] = {part: [] for part in parts}

        def watch(part: str, feeds: Mapping[str, Array], outputs: dict[str, Array]) -> dict[str, Array]:
            if part in calls:
                calls[part].append(Call({name: value.copy() for name, value in feeds.items()}, outputs))
            return outputs

        self._watched(watch, self.draw if whole else self.run, replaced)
        return {part: tuple(found) for part, found in calls.items()}

    def gains(self, part: str, *, seed: int = 0) -> tuple[dict[str, float], ...]:
        """How much of a small error in each run of a part is left in the finished sample, by metric of that sample.

        A little noise is added to the answer of one run at a time, in every request; what it is there, in the metric of
        the same name or else in `nsr`, divides what it is at the end. The n-th entry is about the n-th run of each
        request.
        """
        runs = len(self.record([part])[part]) // len(self._requests)
        found = []
        for number in range(runs):
            disturb = _Disturb(part, number, runs, seed)
            made = errors(self.metrics, self.reference, self._watched(disturb, self.run))
            put_in = disturb.put_in()
            found.append({name: error / put_in.get(name, put_in["nsr"]) for name, error in made.items()})
        return tuple(found)

    def _watched(
        self,
        watch: Callable[..., dict[str, Array]],
        run: Callable[..., Any],
        replaced: Mapping[str, Session] | None = None,
    ) -> Any:
        self._watch = watch
        try:
            return run(replaced or {})
        finally:
            self._watch = None

    def _sample(self, request: DrawRequest) -> Array:
        x: Array | None = None
        for event in self._pipeline.stream(request):
            if isinstance(event, DrawResult):
                break
            if event.stage == self._main:
                x = event.x
                if event.row + 1 == event.of:
                    break  # what comes after, a decoder above all, is not run
        if x is None:
            raise BadRequest("this bundle draws no sample, so there is nothing to calibrate its denoiser on")
        return x

    def _open(self, graph: Path, device: str, *, threads: int = 0) -> Session:
        part = self._part_of[graph]
        return _Seat(part, open_session(graph, device, threads=threads, planned=False), self)

    def answer(
        self, part: str, session: Session, memory: dict[bytes, dict[str, Array]], feeds: Any
    ) -> dict[str, Array]:
        """One run of a part: by its replacement, from memory, or by itself."""
        if part in self._replaced:
            return self._replaced[part].run(feeds)
        key = _digest(feeds) if part not in self._denoisers else b""
        if not key or key not in memory:
            outputs = session.run(feeds)
            if key and len(memory) < KEPT:
                memory[key] = outputs
        else:
            outputs = memory[key]
        return outputs if self._watch is None else self._watch(part, feeds, outputs)


class CallsWorkload:
    """Recorded runs of one part, and its own answers: what parts outside the sampling loop are measured by.

    Args:
        part: its name in the bundle.
        calls: its runs.
        names: metrics of the finished sample; where none of them fits these answers, `nsr` stands for all.
    """

    def __init__(self, part: str, calls: Sequence[Call], names: Sequence[str]) -> None:
        self._part, self._calls = part, tuple(calls)
        self.reference = tuple(joined(call.outputs) for call in self._calls)
        self.metrics = tuple(each for each in metrics_for(self.reference) if each.name in names) or (NSR,)

    def run(self, replaced: Mapping[str, Session]) -> tuple[Array, ...]:
        """The part's answers, those of one run joined into one array."""
        if self._part not in replaced:
            return self.reference
        return tuple(joined(replaced[self._part].run(call.feeds)) for call in self._calls)


def denoisers(bundle: Bundle) -> tuple[str, ...]:
    """The parts that run in the rows of the main stage, whose errors add up over steps."""
    recipe = bundle.manifest.recipe
    if recipe is None:
        raise BadRequest("a bundle without a recipe samples nothing")
    sampling = [stage for stage in recipe.stages if stage.sampler.kind != "direct"]
    main = sampling[0] if sampling else recipe.stages[0]
    return tuple(dict.fromkeys((main.denoise.part, *main.sampler.nets)))


def joined(outputs: Mapping[str, Array]) -> Array:
    """The floating outputs of a run as one array: as it is where it is one, else flattened beside each other."""
    floats = [value for name, value in outputs.items() if value.dtype.kind == "f" and not name.startswith("guard.")]
    if len(floats) == 1:
        return floats[0]
    return np.concatenate([value.reshape(len(value), -1) if value.ndim else value.reshape(1, 1) for value in floats], 1)


class _Seat:
    """A session of the runtime whose runs the workload answers."""

    def __init__(self, part: str, session: Session, workload: PictureWorkload) -> None:
        self._part, self._session, self._workload = part, session, workload
        self._memory: dict[bytes, dict[str, Array]] = {}
        self.device = session.device
        self.inputs: tuple[TensorSpec, ...] = session.inputs
        self.outputs: tuple[TensorSpec, ...] = session.outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """What the workload answers."""
        return self._workload.answer(self._part, self._session, self._memory, feeds)

    def bind(self) -> Binding:
        """Buffers of the session itself; no sampling loop asks for them."""
        return self._session.bind()


class _Disturb:
    """Adds noise of TINY_NOISE relative energy to the answers of one run of a part, once per request."""

    def __init__(self, part: str, number: int, runs: int, seed: int) -> None:
        self._part, self._number, self._runs = part, number, runs
        self._generator = np.random.default_rng(seed)
        self._seen = 0
        self._before: list[Array] = []
        self._after: list[Array] = []

    def __call__(self, part: str, feeds: Mapping[str, Array], outputs: dict[str, Array]) -> dict[str, Array]:
        del feeds
        if part != self._part:
            return outputs
        turn, self._seen = self._seen % self._runs, self._seen + 1
        if turn != self._number:
            return outputs
        noisy = {name: self._noisy(value) if value.dtype.kind == "f" else value for name, value in outputs.items()}
        self._before.append(joined(outputs))
        self._after.append(joined(noisy))
        return noisy

    def put_in(self) -> dict[str, float]:
        """The error that was added, in every metric that fits these answers."""
        return errors((*metrics_for(self._before), NSR), self._before, self._after)

    def _noisy(self, value: Array) -> Array:
        noise = self._generator.standard_normal(value.shape, np.float32)
        strength = np.sqrt(TINY_NOISE * np.mean(np.square(value, dtype=np.float64)))
        noisy: Array = value + noise * strength.astype(value.dtype)
        return noisy


def _digest(feeds: Mapping[str, Array]) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(feeds):
        found.update(name.encode() + str(feeds[name].shape).encode() + np.ascontiguousarray(feeds[name]).tobytes())
    return found.digest()
