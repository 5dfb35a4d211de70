"""Each way to spoil a language bundle is refused; the contract is held against both dialects."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from edgekit.bundle.store import read_bundle
from edgekit.errors import BadManifest, TableMismatch, UnfedInput
from tests.bundle import tiny
from tests.hostile.spoil import Case, at, refused, told
from tests.hostile.test_hostile import IMAGE_CASES


def sliding(m: dict[str, Any]) -> None:
    """Declare a sliding bias without a window to compute it from."""
    spec = next(spec for spec in m["parts"]["decoder"]["inputs"] if spec["name"] == "attention_bias")
    spec["name"] = "attention_bias_sliding"


def without_rows(m: dict[str, Any]) -> None:
    """Leave an input of the dialect undeclared."""
    specs = m["parts"]["decoder"]["inputs"]
    specs.remove(next(spec for spec in specs if spec["name"] == "rows"))


TEXT_CASES = [
    Case("a sliding bias without window", told(sliding), UnfedInput, "attention_bias_sliding"),
    Case("an input of no dialect", at("parts/decoder/inputs/0/name", "inputs_embeds"), UnfedInput, "inputs_embeds"),
    Case("no rows", told(without_rows), BadManifest, "'rows'"),
    Case("one layer too many", at("decoding/kv/layers", 3), BadManifest, "past.2.key"),
    Case("one layer too few", at("decoding/kv/layers", 1), UnfedInput, "past.1.key"),
    Case("other heads", at("decoding/kv/heads", 7), BadManifest, "past.0.key"),
    Case("another cache type", at("decoding/kv/dtype", "float16"), BadManifest, "float16"),
    Case("half-precision logits", at("parts/decoder/outputs/0/dtype", "float16"), BadManifest, "logits"),
    Case("no such part", at("decoding/part", "model"), BadManifest, "'model'"),
    Case("no decoding block", told(lambda m: m.pop("decoding")), BadManifest, "decoding"),
    Case("a recipe as well", at("recipe", {"stages": []}), BadManifest, "recipe"),
    Case(
        "a table of no recipe",
        at("tables", [{"stage": "x", "steps": 1, "init_scale": 1, "rows": [[0] * 10]}]),
        TableMismatch,
        "none",
    ),
]


@pytest.mark.parametrize("case", TEXT_CASES, ids=lambda case: case.name)
def test_a_spoilt_language_bundle_is_refused(text_bundle: Path, tmp_path: Path, case: Case) -> None:
    """The language contract is held against both dialects."""
    folder = tmp_path / "spoilt.bundle"
    shutil.copytree(text_bundle, folder)
    case.spoil(folder)
    refused(folder, case)


def test_other_dialect_is_refused(text_bundle: Path, tmp_path: Path) -> None:
    """A graph of one dialect under the other's name has inputs that nothing feeds."""
    folder = tmp_path / "swapped.bundle"
    shutil.copytree(text_bundle, folder)
    tiny.edit(folder, lambda m: m["decoding"].update(dialect={"ort": "std", "std": "ort"}[m["decoding"]["dialect"]]))
    with pytest.raises(UnfedInput, match="does not feed"):
        read_bundle(folder)


def test_names_are_unique() -> None:
    """Every case has a name of its own, so a failure names one attack."""
    names = [case.name for case in (*IMAGE_CASES, *TEXT_CASES)]
    assert len(set(names)) == len(names)
    assert len(names) > 100
