"""The precision plan: a JSON file that says what every unit becomes, and what that was predicted and measured to cost.

A person can read it, change a line and feed it back (`edgekit export --plan`). It holds no numbers a graph needs beyond
activation ranges, so one plan lowers to every target that allows its choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from edgekit.errors import BadRequest
from edgekit.quant.choices import CHOICES

PLAN_FORMAT = 1
RewriteName = Literal["bos", "shortcut", "smooth"]


class _Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Frozen and validated."""


class Rewrite(_Value, frozen=True):
    """An exact change of a graph before it is quantized.

    `node` is the product it concerns; `input` the graph input that a guard watches (bos).
    """

    kind: RewriteName
    node: str
    input: str = ""


class Error(_Value, frozen=True):
    """One metric on one set of inputs: what the sum of single-unit errors predicts, and what the graphs gave."""

    metric: str
    predicted: float | None = None
    measured: float | None = None


class PartChoices(_Value, frozen=True):
    """One graph: the choice of every unit, and the ranges of the activations that are stored as integers.

    `ranges` are (lowest, highest) by value name, over the whole calibration trajectory. `model` is the sha256 of the
    graph and its data.
    """

    units: dict[str, str]
    ranges: dict[str, tuple[float, float]] = {}
    rewrites: tuple[Rewrite, ...] = ()
    model: str = ""


class PrecisionPlan(_Value, frozen=True, omit_defaults=False):
    """The whole plan. Every field is written, `format` above all: another edgekit has another default.

    Attributes:
        target: the row of TARGETS it was made for.
        parts: by name, what their units become.
        budgets: what was asked: bytes, milliseconds, bits; by name.
        caps: most error allowed, by metric.
        bytes: of all weights as stored.
        milliseconds: predicted, of one run of each part; None where nothing was measured.
        errors: by metric, on inputs the plan was not made on.
        calibration: sha256 of prompts, seeds and steps.
        method: how sensitivity was measured.
        notes: sentences for whoever reads it.
    """

    target: str
    parts: dict[str, PartChoices]
    format: Annotated[int, msgspec.Meta(ge=1)] = PLAN_FORMAT
    budgets: dict[str, float] = {}
    caps: dict[str, float] = {}
    bytes: int = 0
    milliseconds: float | None = None
    errors: tuple[Error, ...] = ()
    calibration: str = ""
    method: str = ""
    notes: tuple[str, ...] = ()


def parse_plan(raw: bytes, where: str) -> PrecisionPlan:
    """Read a plan.

    Raises:
        BadRequest: not a plan, of another format, or with a choice that does not exist; it says where.
    """
    try:
        plan = msgspec.json.decode(raw, type=PrecisionPlan)
    except msgspec.DecodeError as why:
        raise BadRequest(f"{where} is no precision plan: {why}. `edgekit plan` writes one.") from why
    if plan.format != PLAN_FORMAT:
        raise BadRequest(f"{where} has format {plan.format}; this edgekit reads {PLAN_FORMAT}. Make it again.")
    for part, choices in plan.parts.items():
        for unit, choice in choices.units.items():
            if choice not in CHOICES:
                raise BadRequest(f"{where}: {part}/{unit} is to be {choice!r}; known: {', '.join(CHOICES)}")
    return plan


def read_plan(path: Path) -> PrecisionPlan:
    """Read a plan's file.

    Raises:
        BadRequest: it is not there, or not a plan.
    """
    try:
        raw = path.read_bytes()
    except OSError as why:
        raise BadRequest(f"{path}: {why.strerror}; name a plan that `edgekit plan` or an export wrote") from why
    return parse_plan(raw, str(path))


def encode_plan(plan: PrecisionPlan) -> bytes:
    """Canonical bytes: indented, keys in declaration order."""
    return msgspec.json.format(msgspec.json.encode(plan), indent=1) + b"\n"


def counts(units: Mapping[str, str]) -> dict[str, int]:
    """How many units take each choice, most accurate first."""
    return {name: total for name in CHOICES if (total := sum(choice == name for choice in units.values()))}
