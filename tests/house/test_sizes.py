"""Short files, short functions, as many lines of tests as of source. The figures are printed (`pytest -rP`)."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest

from tests.house.source import PACKAGE, ROOT, functions, length, lines, modules

FILE, LONGEST, PERCENTILE_95 = 400, 80, 45
SOURCES = sorted(PACKAGE.rglob("*.py"))
EVERYTHING = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]


def relative(path: Path) -> str:
    """A path as a test's name."""
    return path.relative_to(ROOT).as_posix()


def report(figures: str) -> None:
    """Shown with `pytest -rP`, and whenever the test fails."""
    sys.stdout.write(figures + "\n")


@pytest.mark.parametrize("path", EVERYTHING, ids=relative)
def test_no_file_and_no_function_is_long(path: Path) -> None:
    """A file is read in one sitting, tests included, and a function fits a screen and a half at the very most."""
    assert lines(path) <= FILE, f"{relative(path)} has {lines(path)} lines; split it by what its parts are for"
    assert {function.name: length(function) for function in functions(path) if length(function) > LONGEST} == {}


def test_nearly_all_functions_fit_a_screen() -> None:
    """The 95th percentile, where clarity is lost or kept."""
    sizes = [length(function) for path in modules().values() for function in functions(path)]
    p95 = statistics.quantiles(sizes, n=20, method="inclusive")[-1]
    files = [lines(path) for path in SOURCES]
    report(f"functions: {len(sizes)}, median {statistics.median(sizes):.0f}, p95 {p95:.0f}, longest {max(sizes)} lines")
    report(f"files: {len(files)}, median {statistics.median(files):.0f}, longest {max(files)} lines")
    assert p95 <= PERCENTILE_95


def test_as_many_tests_as_source() -> None:
    """Lines of tests against lines of the package."""
    source = sum(lines(path) for path in SOURCES)
    tests = sum(lines(path) for path in EVERYTHING) - source
    report(f"source {source} lines, tests {tests} lines, ratio {tests / source:.2f}")
    assert tests >= source
