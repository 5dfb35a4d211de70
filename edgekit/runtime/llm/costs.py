"""What a verification costs by its number of rows: measured on this machine, remembered on its disk.

The curve decides how much to draft, and no formula gives it: kernels go by tiles, engines by thresholds, and small runs
are bound by memory where large ones are bound by arithmetic.
"""

from __future__ import annotations

import hashlib
import platform
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, log2
from pathlib import Path
from time import perf_counter
from typing import Generic, TypeVar

import msgspec

from edgekit.bundle.files import cache_folder, write_atomically
from edgekit.errors import BadRequest
from edgekit.runtime.llm.probe import filler
from edgekit.runtime.llm.tree import TokenTree
from edgekit.runtime.llm.verifier import LocalVerifier

T = TypeVar("T")
FORMAT = 3  # of the remembered files
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
CONTEXT = 256  # tokens before the measured rows, where the model takes them
BUDGET = 1.5  # seconds for measuring a curve
ROUNDS = 15
REACH = 2.0  # octaves over which an observation bends the curve


@dataclass(frozen=True)
class Curve:
    """T(n): seconds of one verification by its number of rows.

    Attributes:
        rows: ascending; the first is 1.
        seconds: measured, one per entry of `rows`.

    Raises:
        BadRequest: not such a table.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        ascending = self.rows[:1] == (1,) and all(a < b for a, b in zip(self.rows, self.rows[1:], strict=False))
        if not ascending or len(self.rows) != len(self.seconds):
            raise BadRequest(f"a cost curve has ascending rows from 1 and one time for each; this has {self.rows}")
        if not all(isfinite(seconds) and seconds > 0 for seconds in self.seconds):
            raise BadRequest(f"the times of a cost curve are above 0; these are {self.seconds}")

    @cached_property
    def smooth(self) -> tuple[float, ...]:
        """The non-decreasing times nearest to the measured ones."""
        return isotonic(self.seconds)

    def at(self, rows: int) -> float:
        """Seconds for so many rows, at least 1: interpolated; beyond the table the last slope goes on."""
        known, smooth = self.rows, self.smooth
        right = min(bisect_right(known, rows), len(known) - 1)
        if right == 0:
            return smooth[0]
        left = right - 1
        share = (rows - known[left]) / (known[right] - known[left])
        return smooth[left] + share * (smooth[right] - smooth[left])

    def relative(self, rows: int) -> float:
        """T(n) / T(1)."""
        return self.at(rows) / self.smooth[0]

    def scaled(self, factor: float) -> Curve:
        """The same curve on a machine `factor` times as slow."""
        return Curve(self.rows, tuple(seconds * factor for seconds in self.seconds))

    def updated(self, rows: int, seconds: float, rate: float) -> Curve:
        """Moved towards an observation; by less the further away, and single rows stay where they are.

        The smooth times move: what no non-decreasing curve can meet must not drive the measured ones apart for ever.

        Args:
            rows: of the run observed, at least 2.
            seconds: what it took; less than a single row counts as a single row.
            rate: share of the way, in logarithms, that the curve goes to meet it.
        """
        least, place = self.smooth[0], log2(rows)
        ratio = max(seconds, least) / self.at(rows)
        bent = (
            max(least, old * ratio ** (rate * max(0.0, 1 - abs(log2(n) - place) / REACH)))
            for n, old in zip(self.rows[1:], self.smooth[1:], strict=True)
        )
        return Curve(self.rows, (least, *bent))


def isotonic(values: Sequence[float]) -> tuple[float, ...]:
    """Least-squares non-decreasing fit: pool adjacent violators (Ayer et al. 1955)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, size = value, 1
        while pools and pools[-1][0] > mean:
            other, count = pools.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        pools.append((mean, size))
    return tuple(mean for mean, size in pools for _ in range(size))


def measure(verifier: LocalVerifier, *, rows: Sequence[int] = ROWS, budget: float = BUDGET) -> Curve:
    """Time chains of different lengths in turns; the least of each, since what disturbs a run only ever adds to it.

    It is remembered for long, and a curve taken on a busy machine would keep drafts from ever being asked for again.
    A slow graph gets fewer lengths and rounds: at least one round of one and two rows. The verifier's own cache is
    left alone.

    Args:
        verifier: whose graph it is; what it remembers stays as it is.
        rows: lengths, ascending from 1.
        budget: seconds, after the context is computed.
    """
    twin = verifier.fork()
    twin.prefixes = None
    context = max(1, min(CONTEXT, verifier.context_length - rows[-1]))
    text = filler(context + rows[-1], verifier.vocab_size)
    tokens, drafts = text[:context], text[context:]
    chains = {size: TokenTree.chain(tokens[-1], drafts[: size - 1]) for size in rows}
    fits = [size for size in rows if context + size - 1 <= verifier.context_length]
    twin.score(tokens, chains[1])  # computes the context
    sizes: list[int] = []
    start = perf_counter()
    for size in fits:  # the first run of a size allocates: it only tells how many sizes the budget allows
        if len(sizes) > 1 and 4 * (perf_counter() - start) > budget:
            break
        _time(twin, tokens, chains[size])
        sizes.append(size)
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(ROUNDS):
        if number and perf_counter() - start > budget:
            break
        for size in sizes if number % 2 else reversed(sizes):
            seconds[size].append(_time(twin, tokens, chains[size]))
    return Curve(tuple(sizes), tuple(min(seconds[size]) for size in sizes))


def _time(verifier: LocalVerifier, tokens: tuple[int, ...], tree: TokenTree) -> float:
    """Seconds to score a tree whose context is cached."""
    start = perf_counter()
    verifier.score(tokens, tree)
    return perf_counter() - start


class _Remembered(msgspec.Struct, Generic[T], frozen=True, forbid_unknown_fields=True):
    format: int
    found: T


def remembered(kind: type[T], key: Sequence[str], find: Callable[[], T]) -> T:
    """What was found out about a graph under this key before, else found out now and remembered.

    It lies in `verifiers/` of the cache folder ($EDGEKIT_CACHE). A file that cannot be read, or is of another format,
    counts as missing; a folder that cannot be written to means finding out again next time.

    Args:
        kind: Curve or Invariance.
        key: everything it depends on but the processor's model: hashes of the graph, engine, device, threads.
        find: called where nothing is remembered.
    """
    parts = (*key, _processor(), str(FORMAT))
    fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    path = cache_folder() / "verifiers" / f"{kind.__name__.lower()}-{fingerprint}.json"
    with suppress(OSError, ValueError, BadRequest):  # msgspec's errors are ValueErrors
        known = msgspec.json.decode(path.read_bytes(), type=_Remembered[kind])  # type: ignore[valid-type]
        if known.format == FORMAT:
            return known.found
    found = find()
    with suppress(OSError, BadRequest):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, msgspec.json.format(msgspec.json.encode(_Remembered(FORMAT, found))))
    return found


def _processor() -> str:
    """The model of the processor, as far as the system tells: a home folder may be shared between machines."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return f"{platform.machine()} {platform.processor()}"
