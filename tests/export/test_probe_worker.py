"""Probes in a process of their own: the same scores, the child's own errors, and its memory limit."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.errors import EdgekitError, MemoryLimit, UnsupportedModel
from edgekit.export import probe_worker
from edgekit.export.probe_worker import probe_apart
from edgekit.export.probes import probe_scores
from edgekit.quant.calibrate import calibrate
from edgekit.quant.graph import find_units, load_graph
from edgekit.quant.metrics import NSR
from edgekit.quant.pictures import Call, CallsWorkload
from edgekit.quant.prepare import Prepared
from edgekit.quant.rewrite import Constants
from edgekit.quant.targets import TARGETS
from edgekit.runtime.backends import open_session
from tests.quant.tiny_graphs import Graph, normal_form

pytestmark = [pytest.mark.torch, pytest.mark.slow]

CPU = TARGETS["cpu:any"]


def part(folder: Path, *, last: str = "Tanh", calls: int = 3, gain: float = 1.0) -> Prepared:
    """Two products, and an operator behind them."""
    make = Graph(0)
    hidden = make("Gelu", make("MatMul", "x", make.normal(16, 32), name="up"))
    made = make("MatMul", hidden, make.normal(32, 16), name="down")
    make(last, made, name="y")
    path = folder / "net.onnx"
    shape = ("batch", 16)
    ir.save(normal_form(make.done({"x": shape}, {"y": shape})), path, external_data="net.onnx.data")
    units = find_units(load_graph(path))
    session = open_session(path, threads=1)
    feeds = [{"x": np.random.default_rng(seed).standard_normal((4, 16), np.float32)} for seed in range(calls)]
    runs = tuple(Call(each, session.run(each), {"nsr": gain}) for each in feeds)
    found = calibrate(load_graph(path), units, runs, lambda what, share: None)
    work = CallsWorkload("net", runs, ["nsr"])
    scale = {"nsr": {"nsr": 1.0}}
    return Prepared("net", path, units, (), Constants(), runs, runs[0], 1.0, work, scale, found)


def test_a_child_gives_what_the_parent_would(tmp_path: Path) -> None:
    """The same units, choices and errors as in process; progress comes through."""
    given, told = part(tmp_path, gain=0.5), []
    found = probe_apart(None)(given, (NSR,), CPU, lambda what, share: told.append((what, share)))
    allowed = {unit.id: CPU.allowed(unit) for unit in given.units}
    here = probe_scores(
        given.model(), given.units, allowed, list(given.calls), [NSR], target=CPU, ranges=given.found.ranges
    )
    assert (found.units, found.choices, found.method) == (here.units, here.choices, "probe")
    np.testing.assert_allclose(found.errors("nsr"), here.errors("nsr"), rtol=1e-4)
    assert told
    assert all(0 <= share <= 1 for _, share in told)


def test_its_errors_come_back_as_themselves(tmp_path: Path) -> None:
    """An operator without a gradient here: the class that the child raised, and its words."""
    with pytest.raises(EdgekitError, match="Sinh") as why:
        probe_apart(None)(part(tmp_path, last="Sinh"), (NSR,), CPU, lambda what, share: None)
    assert type(why.value) is UnsupportedModel


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        (
            "echo first >&2; echo torch is broken >&2; exit 7",
            EdgekitError,
            r"of net ended with status 7:\nfirst\ntorch is",
        ),
        ("kill -9 $$", MemoryLimit, "the system killed the probes of net"),
    ],
    ids=["status", "killed"],
)
def test_a_child_that_ends_badly_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, kind: type, words: str
) -> None:
    """The end of what it wrote, where it raised nothing of ours; a kill is the system's way to say memory."""
    child = tmp_path / "python"
    child.write_text(f"#!/bin/sh\n{script}\n")
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    with pytest.raises(EdgekitError, match=words) as why:
        probe_apart(None)(part(tmp_path), (NSR,), CPU, lambda what, share: None)
    assert type(why.value) is kind


def test_a_stop_stops_the_child(tmp_path: Path) -> None:
    """An interrupt while it reports: the child is gone, and the interrupt goes on."""

    def stop(what: str, share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe_apart(None)(part(tmp_path), (NSR,), CPU, stop)


def test_memory_is_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that may not hold one run of the graph says so; what any child may hold at least is lowered for this."""
    monkeypatch.setattr(probe_worker, "MEMORY", 16 * 1000)
    with pytest.raises(MemoryLimit, match="for one run of this graph"):
        probe_apart(1)(part(tmp_path), (NSR,), CPU, lambda what, share: None)
