"""`--budget` and `--metric-cap` in numbers: 300MB, 4.5bits, 20ms, 0.6x; content=0.01."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from edgekit.errors import BadRequest
from edgekit.quant.metrics import metric_called

UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
BUDGET = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """What a plan may cost; None is no limit.

    Attributes:
        bytes: of the whole bundle, its report aside.
        bits: mean bits of a weight, scales included.
        milliseconds: of one picture at the bundle's defaults, or one token.
        times: milliseconds as a share of those of the unquantized bundle.
        caps: the most error, by metric.
    """

    bytes: float | None = None
    bits: float | None = None
    milliseconds: float | None = None
    times: float | None = None
    caps: dict[str, float] = field(default_factory=dict)

    @property
    def limits_size(self) -> bool:
        """Whether bytes or bits are limited."""
        return self.bytes is not None or self.bits is not None

    @property
    def limits_time(self) -> bool:
        """Whether milliseconds are limited."""
        return self.milliseconds is not None or self.times is not None


def parse_budget(budgets: Iterable[str], caps: Iterable[str] = ()) -> Budget:
    """What was typed after `--budget` and `--metric-cap`, each any number of times.

    Raises:
        BadRequest: no number, no known unit or metric, or the same unit or metric twice.
    """
    limits = _once("--budget", budgets, _limit)
    return Budget(**limits, caps=_once("--metric-cap", caps, _cap))


def _once(option: str, texts: Iterable[str], read: Callable[[str], tuple[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in texts:
        name, number = read(text)
        if name in found:
            raise BadRequest(f"{option} {text!r}: {name} is limited twice; one limit of a kind is enough")
        found[name] = number
    return found


def _limit(text: str) -> tuple[str, float]:
    match = BUDGET.fullmatch(text)
    name = _unit(match[2].lower()) if match else None
    number = float(match[1]) * UNITS.get(match[2].lower(), 1.0) if match else math.nan
    if name is None or not 0 < number < math.inf:
        raise BadRequest(f"--budget {text!r}: write a size (300MB), bits a weight (4.5bits), a time (20ms) or 0.6x")
    return name, number


def _unit(text: str) -> str | None:
    if text in UNITS:
        return "bytes"
    return {"bit": "bits", "bits": "bits", "ms": "milliseconds", "x": "times"}.get(text)


def _cap(text: str) -> tuple[str, float]:
    name, equals, number = text.partition("=")
    try:
        cap = float(number)
    except ValueError:
        cap = math.nan
    if not equals or not name or not 0 < cap < math.inf:
        raise BadRequest(f"--metric-cap {text!r}: write NAME=NUMBER, such as content=0.01")
    metric_called(name)
    return name, cap
