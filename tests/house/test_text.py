"""No committed text knows where it was written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.house.source import ROOT, repository_files

# Absolute folders of one machine. Spelt in two halves, so that this file passes its own test.
PLACES = ["/wo" + "rk/", "/tm" + "p/", "/op" + "t/", "/ro" + "ot/", "/ho" + "me/", "/Us" + "ers/"]
MACHINE_PATH = re.compile(r"(?<![\w.$}~*\-])(?:" + "|".join(map(re.escape, PLACES)) + ")")
WORDS = ["TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"]
LEFTOVER = re.compile(r"\b(?:" + "|".join(WORDS) + r")\b")
WORKPLACE = re.compile(
    r"\b(?:" + "|".join(["Cla" + "ude", "Anthro" + "pic", "sub-?ag" + "ent", "brief sa" + "ys"]) + r")\b", re.I
)
TEXT_LIMIT = 2 * 2**20
BINARY = {".png", ".jpg", ".safetensors", ".onnx", ".data", ".npz", ".npy", ".zip", ".woff2", ".ttf", ".gif", ".webp"}


def texts() -> list[Path]:
    """Repository files that people read: not binary, not a vocabulary, not a licence."""
    return [
        path
        for path in repository_files()
        if path.suffix not in BINARY
        and path.stat().st_size <= TEXT_LIMIT
        and path.name not in ("LICENSE", "tokenizer.json")
    ]


def hits(pattern: re.Pattern[str], path: Path) -> list[str]:
    """Lines of a file that match."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        pytest.fail(f"{path.relative_to(ROOT)} is neither UTF-8 text nor of a known binary kind")
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def test_no_text_names_a_folder_of_one_machine() -> None:
    """Absolute paths of somebody's disk do not belong in a repository."""
    assert [hit for path in texts() for hit in hits(MACHINE_PATH, path)] == []


def test_no_text_speaks_of_its_making() -> None:
    """Who or what typed a line is no business of its reader."""
    assert [hit for path in texts() for hit in hits(WORKPLACE, path)] == []


def test_nothing_is_left_for_later() -> None:
    """What is not done is an entry in a tracker, not a word in a file."""
    assert [hit for path in texts() if path.suffix in (".py", ".md", ".toml") for hit in hits(LEFTOVER, path)] == []


def test_text_is_unix_text() -> None:
    """Line feeds only, one at the end, no trailing blanks in code."""
    for path in texts():
        raw = path.read_bytes()
        assert b"\r\n" not in raw, path
        if path.suffix == ".py" and raw:
            assert raw.endswith(b"\n"), path
            assert not raw.endswith(b"\n\n"), path


@pytest.mark.parametrize(("line", "found"), [("see " + PLACES[0] + "x", True), ("http://h" + PLACES[1] + "x", False)])
def test_the_pattern_knows_a_path_from_an_address(line: str, found: bool) -> None:
    """The check can fail, and does not take a web address for a path."""
    assert bool(MACHINE_PATH.search(line)) == found
