"""Importing the package and asking for help are immediate, measured in processor time so that load does not count."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.house.source import ROOT

LIMIT = 0.3  # seconds of processor time, user and system, of a whole process, interpreter start included: best of five
ROUNDS = 5
COMMANDS = {"import": ["-c", "import edgekit"], "help": ["-m", "edgekit.cli", "--help"]}
NOT_LOADED = ("torch", "onnx", "onnx_ir", "onnxruntime", "transformers", "diffusers", "numpy", "tokenizers")
SPY = "import sys\n{act}\nprint(*sorted(set(sys.modules) & {names!r}))"
HELP = """
from edgekit.cli import app
try:
    app(["--help"], standalone_mode=True)
except SystemExit as done:
    assert not done.code
"""


def run(*arguments: str) -> tuple[float, str]:
    """Processor seconds of one process, and its output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    before = os.times()
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    after = os.times()
    return (after.children_user - before.children_user) + (after.children_system - before.children_system), done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_it_answers_at_once(name: str) -> None:
    """The best of five runs stays under the limit; the figure is printed."""
    best = min(run(*COMMANDS[name])[0] for _ in range(ROUNDS))
    sys.stdout.write(f"{name}: {best:.3f} s of processor time\n")
    assert best < LIMIT


@pytest.mark.parametrize(
    "act", ["import edgekit", "import edgekit.bundle.store", HELP], ids=["import", "store", "help"]
)
def test_nothing_heavy_is_loaded(act: str) -> None:
    """Neither the package, nor its bundle layer, nor the help page loads arrays, engines or models."""
    out = run("-c", SPY.format(act=act, names=set(NOT_LOADED)))[1]
    assert out.splitlines()[-1].split() == []


def test_help_names_every_verb() -> None:
    """The help page is a help page."""
    out = run(*COMMANDS["help"])[1]
    for verb in ("export", "run", "inspect", "doctor", "demo"):
        assert verb in out
