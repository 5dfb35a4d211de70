"""The page about precisions says what the code does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgekit.export.language import choose
from edgekit.export.language.weights import Checkpoint
from edgekit.quant.precision import AUTO, PRECISIONS

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "language-models.md").read_text(encoding="utf-8")


def rows_of(heading: str) -> dict[str, list[str]]:
    """The table whose first line starts with `heading`: name -> the other cells."""
    lines = PAGE[PAGE.index(heading) :].split("\n\n")[0].splitlines()
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    return {name.strip("`"): rest for name, *rest in cells}


TABLE = rows_of("| name | bits per weight | matrices")


def test_the_table_has_every_precision() -> None:
    """One row per precision in the order of PRECISIONS, then auto; the bits are those declared."""
    assert list(TABLE) == [*PRECISIONS, AUTO]
    assert {name: float(TABLE[name][0]) for name in PRECISIONS} == {name: row.bits for name, row in PRECISIONS.items()}


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_weight_error_is_that_of_the_shipped_model(name: str) -> None:
    """Packing and unpacking the matrices of models/pycode changes them by what the page says."""
    checkpoint, row = Checkpoint(ROOT / "models" / "pycode"), PRECISIONS[name]
    changed = total = 0.0
    for tensor in checkpoint.entries:
        if len(checkpoint.shape(tensor)) == 2 and "embed" not in tensor:
            weight = checkpoint.read(tensor).astype(np.float32)
            changed += float(np.square(row.unpack(row.pack(weight), weight.shape[1]) - weight).sum())
            total += float(np.square(weight).sum())
    error, said = (changed / total) ** 0.5, TABLE[name][4]
    if said.startswith("below"):
        assert error < float(said.removeprefix("below"))
    else:
        assert error == pytest.approx(float(said), abs=6e-5)


def test_the_figures_of_auto_are_the_codes() -> None:
    """Acceptance, noise, rows and bytes of layers on the page are the constants that decide."""
    section = PAGE[PAGE.index("### `auto`") :]
    assert f"probability {choose.ACCEPTANCE} each" in section
    assert f"over n = {', '.join(map(str, choose.ROWS))}" in section
    assert f"within {choose.NOISE:.0%}".replace("%", " %") in section
    assert f"at least {choose.LEAST_LAYERS >> 20} MB" in section
    assert len(choose.CANDIDATES) == 5
