"""Exact rewrites that make a graph easier to quantize, and how a plan repeats them.

    rows = find_constant_rows(texts)                                  # what a graph input was fed
    done = split_rows(model, find_units(model), {"encoder_hidden_states": rows})
    done += split_shortcuts(model, find_units(model))
    done += smooth(model, find_units(model), channel_max)             # largest |x| by channel

Every pass changes a normalised graph in place, leaves weights lazy, and tells what it did as `Rewrite`s for the plan.
Those hold no numbers: `apply_rewrites` takes `Constants`, which calibration finds again or an .npz beside the plan has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np
import onnx_ir as ir

from edgekit.errors import BadRequest
from edgekit.quant.bos import BETWEEN, ConstantRows, find_constant_rows, split_bos, split_rows
from edgekit.quant.graph import find_units
from edgekit.quant.plan import Rewrite
from edgekit.quant.shortcut import split_shortcuts
from edgekit.quant.smooth import F64, divide, smooth, smoothing_factors

__all__ = [
    "ConstantRows",
    "Constants",
    "apply_rewrites",
    "divide",
    "find_constant_rows",
    "smooth",
    "smoothing_factors",
    "split_bos",
    "split_rows",
    "split_shortcuts",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Constants:
    """Numbers of rewrites: rows by graph input, factors of smoothing (k,) by value name."""

    rows: Mapping[str, ConstantRows] = field(default_factory=dict)
    factors: Mapping[str, F64] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write them to an .npz, only leading rows."""
        arrays: dict[str, Any] = {f"rows/{name}": each.values for name, each in self.rows.items() if each.are_leading}
        arrays |= {f"factors/{name}": each for name, each in self.factors.items()}
        with path.open("wb") as file:
            np.savez(file, **arrays)

    @staticmethod
    def load(path: Path) -> Constants:
        """Read what `save` wrote.

        Raises:
            BadRequest: it is not there, or something else.
        """
        rows, factors = {}, {}
        try:
            with path.open("rb") as file, np.load(file) as stored:
                for key in stored.files:
                    kind, _, name = key.partition("/")
                    if kind == "rows":
                        rows[name] = ConstantRows(tuple(range(len(stored[key]))), stored[key])
                    elif kind == "factors":
                        factors[name] = stored[key]
                    else:
                        raise ValueError(f"an array {key!r} is none of theirs")
        except (OSError, ValueError, TypeError, EOFError, BadZipFile) as why:
            raise BadRequest(f"{path} holds no constants of rewrites: {why}. Plan again.") from why
        return Constants(rows, factors)


def apply_rewrites(model: ir.Model, rewrites: Sequence[Rewrite], constants: Constants | None = None) -> None:
    """Repeat on a normalised graph what the passes said they did.

    The rows of a text encoder that is itself quantized are not those it had when the plan was made: give those of the
    encoder that ships, or the guard refuses it.

    Raises:
        BadRequest: a rewrite's product is not there, cannot be rewritten, or has no constants.
    """
    given = constants or Constants()
    for kind in dict.fromkeys(each.kind for each in rewrites):
        asked = [each for each in rewrites if each.kind == kind]
        wanted = {each.node for each in asked}
        every = find_units(model)
        units = [unit for unit in every if unit.id in wanted]
        if kind == "shortcut":
            done = split_shortcuts(model, units)
        elif kind == "bos":
            names = {name for each in asked for name in each.input.split(BETWEEN)}
            done = split_rows(model, units, {name: _numbers(given.rows, name) for name in sorted(names)})
        else:
            done = divide(model, every, {unit.data: _numbers(given.factors, unit.data) for unit in units})
        if missing := sorted(wanted - {each.node for each in done}):
            raise BadRequest(
                f"rewrite {kind!r} of {', '.join(missing)}: this graph has nothing of the kind there. It is not the "
                "graph the plan was made for; plan again."
            )


def _numbers(by_name: Mapping[str, T], name: str) -> T:
    if name not in by_name:
        raise BadRequest(f"a rewrite of {name!r} has no constants; calibrate, or plan again")
    return by_name[name]
