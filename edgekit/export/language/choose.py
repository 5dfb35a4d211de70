"""`--precision auto`: the format whose measured cost of a step makes the most tokens per second on this machine.

A step scores n rows: the last token and n - 1 drafts. With drafts accepted with probability a each it yields

    E(n) = 1 + a + ... + a**(n-1) = (1 - a**n) / (1 - a)      tokens (Leviathan et al. 2023, equation 1)

in T(n) seconds, so a format is worth max over n of E(n) / T(n). T is measured on graphs of the model's own widths and
head with more layers than a cache holds, and extrapolated to all of them. Their weights are a fixed pattern: a product
takes as long whatever it multiplies, and no checkpoint has to be read or quantized.
"""

from __future__ import annotations

import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgekit.export.language.config import Config
from edgekit.export.language.dialect_ort import OrtDialect
from edgekit.export.language.export import plan_language
from edgekit.export.language.families import read_spec
from edgekit.export.language.graph import Decoder
from edgekit.export.language.spec import Spec
from edgekit.export.language.store import Progress, stored_bytes, write_model
from edgekit.export.language.weights import Checkpoint
from edgekit.export.plan import ExportPlan
from edgekit.quant.precision import AUTO, get_precision
from edgekit.runtime.backends import Binding, open_session
from edgekit.runtime.backends.devices import engine
from edgekit.runtime.llm.feeds import OrtFeeds

Array = npt.NDArray[Any]

CANDIDATES = ("int8", "int8-128", "int8-row", "int4", "int4-128")  # the more accurate first
ROWS = (1, 2, 4, 8)
ACCEPTANCE = 0.7
NOISE = 0.03  # formats nearer than this to the fastest are equals, and the most accurate of them is taken
ROUNDS = 2
RUNS = 5
WARM_UP = 3
CONTEXT = 256  # tokens in the cache
LEAST_LAYERS = 64 << 20  # bytes of layers that are measured, where the caches are smaller
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
ENGINE = 160 << 20  # memory of the interpreter, numpy and ONNX Runtime


@dataclass(frozen=True)
class Curve:
    """Seconds of a step by rows, for one format and all layers."""

    precision: str
    seconds: Mapping[int, float]

    @property
    def best(self) -> int:
        """The number of rows at which a step makes the most tokens per second."""
        return max(self.seconds, key=self.rate)

    def rate(self, rows: int) -> float:
        """Expected tokens per second of steps of `rows`."""
        return expected_tokens(rows) / self.seconds[rows]


@dataclass(frozen=True)
class Choice:
    """The format taken, every curve measured, and the reason in words."""

    precision: str
    curves: tuple[Curve, ...]
    reason: str


def expected_tokens(rows: int) -> float:
    """Tokens a step of `rows` yields at ACCEPTANCE."""
    return (1 - ACCEPTANCE**rows) / (1 - ACCEPTANCE)


def choose_precision(source: Path, folder: Path, progress: Progress) -> Choice:
    """Measure every format in CANDIDATES on the CPU, in interleaved rounds, and take one.

    Args:
        source: a model folder that `plan_language` accepts; its weights are not read.
        folder: where the graphs that are measured stand for a while.
        progress: called with "measuring" and the share that is done.

    Raises:
        DeviceMissing: ONNX Runtime is not installed.
        SessionFailed: it refused a graph.
    """
    engine()
    spec, checkpoint = read_spec(Config.load(source)), Checkpoint(source)
    taken: dict[str, list[dict[int, float]]] = {name: [] for name in CANDIDATES}
    layers: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="measuring-", dir=folder) as place:
        for number in range((1 + ROUNDS) * len(CANDIDATES)):
            progress("measuring", number / ((1 + ROUNDS) * len(CANDIDATES)))
            name = CANDIDATES[number % len(CANDIDATES)]
            if name in layers:
                taken[name].append(_measure(Path(place) / f"{name}.onnx", spec, layers[name]))
            else:
                layers[name] = _write(spec, checkpoint, name, Path(place))
    progress("measuring", 1.0)
    curves = (Curve(name, {n: min(times[n] for times in taken[name]) for n in ROWS}) for name in CANDIDATES)
    return decide(tuple(curves))


def plan_auto(source: Path) -> ExportPlan:
    """The plan of the candidate that takes the most, and what measuring them takes; nothing is measured.

    Raises:
        what `plan_language` raises.
    """
    plans = {name: plan_language(source, name) for name in CANDIDATES}
    largest = max(plans, key=lambda name: plans[name].disk_bytes)
    measuring = peak_bytes(read_spec(Config.load(source)), Checkpoint(source))
    note = (
        f"auto measures {', '.join(CANDIDATES)} when it exports, on this machine's CPU, and takes the fastest; this is "
        f"the plan of {largest}, the largest of them"
    )
    return msgspec.structs.replace(
        plans[largest],
        precision=AUTO,
        peak_bytes=max(measuring, *(plan.peak_bytes for plan in plans.values())),
        notes=(*plans[largest].notes, note),
    )


def decide(curves: tuple[Curve, ...]) -> Choice:
    """The fastest at its best number of rows, or a more accurate one (earlier in `curves`) that is as fast."""
    fastest = max(curve.rate(curve.best) for curve in curves)
    taken = next(curve for curve in curves if curve.rate(curve.best) >= fastest * (1 - NOISE))
    return Choice(taken.precision, curves, _reason(taken, curves))


def peak_bytes(spec: Spec, checkpoint: Checkpoint) -> int:
    """Memory that measuring takes: a graph mapped from its file, what the engine packs of it, and the engine."""
    shorts = (_build(spec, checkpoint, name, _depth(spec, checkpoint, name)) for name in CANDIDATES)
    return ENGINE + 2 * max(stored_bytes(model, decoder.views) for decoder, model in shorts)


def _reason(taken: Curve, curves: tuple[Curve, ...]) -> str:
    rows = ", ".join(map(str, ROWS))
    lines = [
        f"{taken.precision}: {taken.rate(taken.best):.0f} tokens/s expected with {taken.best - 1} free drafts a step, "
        f"each accepted with probability {ACCEPTANCE}; {taken.rate(1):.0f} without drafts.",
        f"Milliseconds of a step of {rows} rows, and expected tokens/s, on the {os.cpu_count()} cores that exported:",
    ]
    for curve in curves:
        times = " ".join(f"{curve.seconds[n] * 1e3:.2f}" for n in ROWS)
        lines.append(f"{curve.precision}: {times}; {curve.rate(curve.best):.0f} at {curve.best} rows")
    return "\n".join(lines)


def beyond_cache() -> int:
    """Bytes that must be read from memory in every step: what the last cache holds, as far as the system tells."""
    sizes = [LEAST_LAYERS]
    for file in CACHES.glob("index*/size"):
        with suppress(OSError, ValueError):
            sizes.append(int(file.read_text().strip().removesuffix("K")) << 10)
    return max(sizes)


def _depth(spec: Spec, checkpoint: Checkpoint, name: str) -> int:
    """Layers whose weights no cache holds, two at least."""
    sizes = []
    for layers in (1, 2):
        decoder, model = _build(spec, checkpoint, name, min(layers, spec.layers))
        sizes.append(stored_bytes(model, decoder.views))
    layer = max(sizes[1] - sizes[0], 1)
    return min(spec.layers, max(2, -(-beyond_cache() // layer)))


def _build(spec: Spec, checkpoint: Checkpoint, name: str, layers: int) -> tuple[Decoder, ir.Model]:
    short = replace(spec, windows=spec.windows[:layers], ropes=spec.ropes[:layers])
    decoder = Decoder(short, checkpoint, get_precision(name), OrtDialect())
    return decoder, decoder.build()


def _write(spec: Spec, checkpoint: Checkpoint, name: str, folder: Path) -> int:
    """Write the short graph of one format, and say how many layers it has."""
    layers = _depth(spec, checkpoint, name)
    decoder, model = _build(spec, checkpoint, name, layers)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.LazyTensor):
            value.const_value = _pattern(value.const_value)
    write_model(model, decoder.views, folder / f"{name}.onnx", lambda _stage, _share: None)
    return layers


def _pattern(tensor: ir.LazyTensor) -> ir.LazyTensor:
    """The same type and shape, filled with small numbers that repeat: neither zeros nor subnormals arise of them.

    Every tensor has numbers of its own: the engine keeps one copy of packed weights with equal bytes, and layers that
    are all alike would be read from the cache, in half the time.
    """
    shape, dtype = tuple(int(n) for n in tensor.shape), tensor.dtype.numpy()
    generator = np.random.default_rng(zlib.crc32(str(tensor.name).encode()))
    tile = generator.uniform(0.01, 0.02, 1 << 12) if dtype.kind == "f" else generator.integers(0, 127, 1 << 12)
    return ir.LazyTensor(
        lambda: ir.Tensor(np.resize(tile.astype(dtype), shape), name=tensor.name),
        tensor.dtype,
        ir.Shape(shape),
        name=tensor.name,
    )


def _measure(graph: Path, spec: Spec, layers: int) -> dict[int, float]:
    """Seconds of a step by rows, for all layers: runs that want no rows leave the head out, and tell its share."""
    binding = open_session(graph, "cpu").bind()
    cache = 1, spec.kv_heads, CONTEXT + max(ROWS), spec.head_dim
    for layer in range(layers):
        for half in ("key", "value"):
            binding.share(f"past.{layer}.{half}", f"present.{layer}.{half}", cache, np.float32)
    seconds = {}
    for n in ROWS:
        whole = _time(binding, _feeds(spec, layers, n, n), n, spec.vocab)
        body = _time(binding, _feeds(spec, layers, n, 0), 0, spec.vocab) if layers < spec.layers else 0.0
        seconds[n] = whole + body * (spec.layers - layers) / layers
    return seconds


def _time(binding: Binding, feeds: Mapping[str, Array], rows: int, vocab: int) -> float:
    into = {"logits": np.zeros((1, rows, vocab), np.float32)}
    return min(_runs(lambda: binding.run(feeds, into)))


def _runs(run: Callable[[], object]) -> Iterator[float]:
    for number in range(WARM_UP + RUNS):
        start = time.perf_counter()
        run()
        if number >= WARM_UP:
            yield time.perf_counter() - start


def _feeds(spec: Spec, layers: int, count: int, rows: int) -> dict[str, Array]:
    """A step of `count` tokens on CONTEXT tokens in the cache; the last `rows` of them get logits."""
    place, total = OrtFeeds(), CONTEXT + count
    place.place(total, count)
    bias = np.zeros((1, 1, count, total), np.float32)
    windows = spec.windows[:layers]
    biases = {"attention_bias": None in windows, "attention_bias_sliding": any(w is not None for w in windows)}
    return {
        "input_ids": np.arange(count, dtype=np.int64)[None],
        "position_ids": np.arange(CONTEXT, total, dtype=np.int64)[None],
        "rows": np.arange(count - rows, count, dtype=np.int64),
        **place.arrays,
        **{name: bias for name, used in biases.items() if used},
    }
