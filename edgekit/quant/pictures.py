"""The workload of a few-step bundle: prompts and seeds of its own recipe, run by the runtime that will run it.

Nothing here knows a sampler. The runtime opens its parts through one seam, and that is where a part is watched,
replaced by a quantized one, or answered from memory; so calibration sees the deployed steps, guidance and conditioning,
whatever they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.bundle.manifest import Part
from edgekit.bundle.store import Bundle
from edgekit.errors import BadRequest
from edgekit.quant.metrics import NSR, Metric, errors, metrics_for
from edgekit.runtime.backends import Binding, Session, open_session
from edgekit.runtime.diffusion.pipeline import DrawRequest, DrawResult, FewStepPipeline

Array = npt.NDArray[Any]
Watch = Callable[[str, Mapping[str, Array], dict[str, Array]], dict[str, Array]]

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
        self._stage, self._requests = _Stage(bundle, threads), tuple(requests)
        self._reference: tuple[Array, ...] | None = None

    def of(self, requests: Sequence[DrawRequest]) -> PictureWorkload:
        """The workload of other requests, run by the same sessions."""
        other = copy(self)
        other._requests, other._reference = tuple(requests), None
        return other

    def release(self) -> None:
        """Close all sessions; each opens again when it is needed."""
        self._stage.release()

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
        with self._stage.playing(replaced):
            return tuple(self._sample(request) for request in self._requests)

    def draw(self, replaced: Mapping[str, Session]) -> tuple[DrawResult, ...]:
        """The whole way to pictures."""
        with self._stage.playing(replaced):
            return tuple(
                next(event for event in self._stage.pipeline.stream(request) if isinstance(event, DrawResult))
                for request in self._requests
            )

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

    def carried(self, part: str, replacement: Session) -> dict[str, float]:
        """How much of the error that a replacement makes in a part's answers is left in the finished sample, by metric.

        As `gains`, for errors of the replacement's own kind: what is wrong alike at every token of a text is not
        averaged out by who reads it, as noise is.
        """
        own = CallsWorkload(part, self.record([part])[part], [metric.name for metric in self.metrics])
        put_in = errors((*own.metrics, NSR), own.reference, own.run({part: replacement}))
        made = errors(self.metrics, self.reference, self.run({part: replacement}))
        return {name: error / (put_in.get(name, put_in["nsr"]) or 1.0) for name, error in made.items()}

    def _watched(
        self,
        watch: Callable[..., dict[str, Array]],
        run: Callable[..., Any],
        replaced: Mapping[str, Session] | None = None,
    ) -> Any:
        with self._stage.watched(watch):
            return run(replaced or {})

    def _sample(self, request: DrawRequest) -> Array:
        x: Array | None = None
        main = self._stage.pipeline.contract.main.name
        for event in self._stage.pipeline.stream(request):
            if isinstance(event, DrawResult):
                break
            if event.stage == main:
                x = event.x
                if event.row + 1 == event.of:
                    break  # what comes after, a decoder above all, is not run
        if x is None:
            raise BadRequest("this bundle draws no sample, so there is nothing to calibrate its denoiser on")
        return x


class _Stage:
    """One pipeline, whose parts can be watched, replaced and answered from memory."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._parts = {bundle.root / part.graph: (name, part) for name, part in bundle.manifest.parts.items()}
        self._denoisers = set(denoisers(bundle))
        self._seats: dict[str, _Seat] = {}
        self._replaced: Mapping[str, Session] = {}
        self._watch: Watch | None = None
        self.pipeline = FewStepPipeline(bundle, threads=threads, open_session=self._open)

    @contextmanager
    def playing(self, replaced: Mapping[str, Session]) -> Iterator[None]:
        """Some parts replaced; their own sessions are closed, as two large networks are many gigabytes."""
        for part in replaced.keys() & self._seats.keys():
            self._seats[part].close()
        self._replaced = replaced
        try:
            yield
        finally:
            self._replaced = {}

    @contextmanager
    def watched(self, watch: Watch) -> Iterator[None]:
        """Every run of a part that is not replaced is shown to `watch`, which answers."""
        self._watch = watch
        try:
            yield
        finally:
            self._watch = None

    def release(self) -> None:
        for seat in self._seats.values():
            seat.close()

    def answer(self, seat: _Seat, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """One run of a part: by its replacement, from memory, or by itself."""
        if seat.part in self._replaced:
            return self._replaced[seat.part].run(feeds)
        key = _digest(feeds) if seat.part not in self._denoisers else b""
        if not key or key not in seat.memory:
            outputs = seat.session().run(feeds)
            if key and len(seat.memory) < KEPT:
                seat.memory[key] = outputs
        else:
            outputs = seat.memory[key]
        return outputs if self._watch is None else self._watch(seat.part, feeds, outputs)

    def _open(self, graph: Path, device: str, *, threads: int = 0) -> Session:
        name, part = self._parts[graph]
        seat = _Seat(name, part, partial(open_session, graph, device, threads=threads, planned=False), self)
        self._seats[name] = seat
        return seat


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
    """A session of the runtime, opened when it is needed, whose runs the stage answers."""

    def __init__(self, name: str, part: Part, opener: Callable[[], Session], stage: _Stage) -> None:
        self.part, self.memory = name, dict[bytes, dict[str, Array]]()
        self.device, self.inputs, self.outputs = "cpu", part.inputs, part.outputs
        self._opener, self._stage = opener, stage
        self._session: Session | None = None

    def session(self) -> Session:
        """The part's own session."""
        if self._session is None:
            self._session = self._opener()
        return self._session

    def close(self) -> None:
        self._session = None

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """What the stage answers."""
        return self._stage.answer(self, feeds)

    def bind(self) -> Binding:
        """Buffers of the session itself; no sampling loop asks for them."""
        return self.session().bind()


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
