"""The graphs of a bundle: opened when first asked, run in batches they allow, let go of when memory is short."""

from __future__ import annotations

import math
import mmap
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgekit.bundle.manifest import GUARD, GUARD_LIMIT, Manifest, TensorSpec
from edgekit.errors import BadManifest, BadRequest, ForeignInput, MemoryLimit
from edgekit.runtime.backends import Array, Session

OpenSession = Callable[..., Session]

SMALLEST_TILE = 128  # pixels
SMALL_DECODER = 10_000_000  # parameters; AutoencoderTiny has 1.2 M, AutoencoderKL's decoder 49 M
BYTES_PER_PIXEL = {True: 9_600, False: 1_500}  # working memory, the most at any size: of a large decoder, a small one
FEEDABLE = ("float32", "float16", "int64", "int32")  # dtypes the sources of a recipe can be cast to


@dataclass(frozen=True)
class Meter:
    """Seconds and runs of each part, for one request."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    opening: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    runs: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))


class Networks:
    """Parts by name. `open_session(graph, device, threads=)` is the backend seam.

    Under `max_memory` (bytes of this process) only the parts of the present phase stay open (`phase`), and a part whose
    weights would not fit beside what is resident is refused before it is read. What its activations take is known once
    it has run: a first step that went over the limit is the last.
    """

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        device: str,
        threads: int,
        open_session: OpenSession,
        max_memory: int | None = None,
    ) -> None:
        self._root, self._manifest = root, manifest
        self._device, self._threads, self._open_session = device, threads, open_session
        self._max_memory = max_memory
        self._sizes = {entry.path: entry.bytes for entry in manifest.files}
        self._sessions: dict[str, Session] = {}

    def run(self, name: str, feeds: Mapping[str, Array], meter: Meter) -> dict[str, Array]:
        """Run a part; every feed has the batch on axis 0, and so has every output, in float32 where it is a float.

        Guards are held against their limit and are not among the outputs.

        Raises:
            BadRequest: a size or batch the graph was not exported for. SessionFailed: the engine refused.
            MemoryLimit: the run took more than `max_memory`.
            ForeignInput: a guard says that an input is not the one this part was quantized with.
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
        self._check_taken(name)
        _check_guards(name, answers)
        keys = [key for key in answers[0] if not key.startswith(GUARD)]
        joined = {key: np.concatenate([answer[key] for answer in answers]) for key in keys}
        return {key: value.astype(np.float32) if value.dtype.kind == "f" else value for key, value in joined.items()}

    def inputs(self, name: str) -> dict[str, TensorSpec]:
        """What a part takes, by name."""
        return {spec.name: spec for spec in self._manifest.parts[name].inputs}

    def shape_like(self, name: str, tensor: str, fed: Mapping[str, Array]) -> tuple[int, ...]:
        """The shape of an input that nothing else decides: its named axes are those of what else is fed.

        Raises:
            BadManifest: an axis that no fed input has.
        """
        inputs = self.inputs(name)
        sizes = {
            dim: size
            for key, value in fed.items()
            for dim, size in zip(inputs[key].shape, value.shape, strict=True)
            if isinstance(dim, str)
        }
        try:
            return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in inputs[tensor].shape)
        except KeyError as why:
            raise BadManifest(f"part {name!r}: nothing that is fed says how long axis {why} of {tensor!r} is") from why

    def phase(self, parts: Collection[str]) -> None:
        """Let go of every other part, if memory is limited: what runs next are these."""
        if self._max_memory is not None:
            for name in [name for name in self._sessions if name not in parts]:
                del self._sessions[name]

    def bytes_of(self, name: str) -> int:
        """What a part's files hold."""
        part = self._manifest.parts[name]
        return sum(self._sizes.get(path, 0) for path in (part.graph, *part.data))

    def decoder_tile(self, name: str, sides: tuple[int, int]) -> int | None:
        """The largest square, in pixels, that a decoder may draw at once; None where the whole picture fits.

        A decoder's working memory grows with its picture, by BYTES_PER_PIXEL (benchmarks/memory.py).

        Raises:
            MemoryLimit: not even a tile of SMALLEST_TILE pixels fits.
        """
        pixels = self._pixels_that_fit(name)
        if self._max_memory is None or pixels is None or pixels >= sides[0] * sides[1]:
            return None
        tile = math.isqrt(max(pixels, 0)) // SMALLEST_TILE * SMALLEST_TILE
        if not tile:
            need = self._max_memory + self._bytes_per_pixel(name) * (SMALLEST_TILE**2 - pixels)
            raise MemoryLimit(
                f"max_memory is {self._max_memory / 1e6:,.0f} MB; decoding by {name!r} needs at least "
                f"{need / 1e6:,.0f} MB, in tiles of {SMALLEST_TILE} pixels"
            )
        return tile

    def decoder_frames(self, name: str, sides: tuple[int, int], frames: int, batch: int) -> int:
        """How many of `frames` frames, `sides` pixels each, a decoder may draw at once in each of `batch` videos.

        At least one, which `decoder_tile` cuts if it must.
        """
        pixels = self._pixels_that_fit(name)
        return frames if pixels is None else max(1, min(frames, pixels // (sides[0] * sides[1] * batch)))

    def _pixels_that_fit(self, name: str) -> int | None:
        """Pixels that a decoder may draw at once, below 0 where its weights do not fit; None without a limit."""
        if self._max_memory is None:
            return None
        held = 0 if name in self._sessions else self.bytes_of(name)
        return (self._max_memory - resident_bytes() - held) // self._bytes_per_pixel(name)

    def _bytes_per_pixel(self, name: str) -> int:
        return BYTES_PER_PIXEL[self._manifest.parts[name].parameters > SMALL_DECODER]

    def close(self) -> None:
        """Let go of every session; the next run opens anew."""
        self._sessions.clear()

    def _session(self, name: str, meter: Meter) -> Session:
        if name not in self._sessions:
            self._check_room(name)
            start = time.perf_counter()
            graph = self._root / self._manifest.parts[name].graph
            self._sessions[name] = self._open_session(graph, self._device, threads=self._threads)
            meter.opening[name] += time.perf_counter() - start
        return self._sessions[name]

    def _check_room(self, name: str) -> None:
        if self._max_memory is None:
            return
        need, held = self.bytes_of(name), resident_bytes()
        if held + need > self._max_memory:
            raise MemoryLimit(
                f"max_memory is {self._max_memory / 1e6:,.0f} MB; part {name!r} has {need / 1e6:,.0f} MB of weights "
                f"and {held / 1e6:,.0f} MB are taken already. Allow {(held + need) / 1e6:,.0f} MB and more."
            )

    def _check_taken(self, name: str) -> None:
        if self._max_memory is not None and (taken := resident_bytes()) > self._max_memory:
            raise MemoryLimit(
                f"max_memory is {self._max_memory / 1e6:,.0f} MB; with part {name!r} at this size and batch "
                f"{taken / 1e6:,.0f} MB are taken. Ask for a smaller picture, fewer at once, or allow more."
            )

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


def _check_guards(part: str, answers: Iterable[Mapping[str, Array]]) -> None:
    for answer in answers:
        for key, value in answer.items():
            if key.startswith(GUARD) and not (off := float(value.max())) <= GUARD_LIMIT:  # a NaN is refused too
                raise ForeignInput(
                    f"part {part!r}, input {key.removeprefix(GUARD)!r}: the text encoder's first token is not the one "
                    f"this bundle was quantized with, but {off:.1e} of it away (limit {GUARD_LIMIT:g}). That is "
                    "another text encoder, or textual inversion; export again with it."
                )


def _cast(part: str, spec: TensorSpec, value: Array) -> Array:
    if spec.dtype not in FEEDABLE:
        raise BadManifest(
            f"part {part!r}: input {spec.name!r} is {spec.dtype}; a source is one of {', '.join(FEEDABLE)}"
        )
    return np.ascontiguousarray(value, dtype=spec.dtype)


def resident_bytes() -> int:
    """Memory this process holds now: /proc on Linux, elsewhere the most it ever held."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return pages * mmap.PAGESIZE
