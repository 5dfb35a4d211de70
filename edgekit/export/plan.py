"""What an export will cost, said before anything is loaded: read from configs and safetensors headers alone."""

from __future__ import annotations

import msgspec

from edgekit.bundle.manifest import Count, TensorSpec
from edgekit.bundle.recipe import Name


class _Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Frozen and validated."""


class PartPlan(_Value, frozen=True):
    """One graph to be made: its inputs and outputs (names are dynamic axes) and the bytes of its weights on disk."""

    name: Name
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    bytes: Count
    parameters: Count = 0


class ExportPlan(_Value, frozen=True):
    """The whole export.

    `disk_bytes` is the finished bundle; `peak_bytes` the largest resident memory of any one process on the way;
    `seconds` is None where nothing measured supports a figure. `notes` are sentences for the person who asked.
    """

    family: str
    task: str
    precision: str
    parts: tuple[PartPlan, ...]
    disk_bytes: Count
    peak_bytes: Count
    seconds: float | None = None
    notes: tuple[str, ...] = ()
