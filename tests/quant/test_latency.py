"""The table of timings: measured once for an operator, a shape and a choice, kept in its file, never asked of tables.

What is asserted is what is measured and remembered, not how long anything takes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.errors import BadRequest
from edgekit.quant import latency
from edgekit.quant.choices import CHOICES
from edgekit.quant.graph import Unit, find_units, normalised
from edgekit.quant.latency import LatencyTable, Timing, boundaries, timed
from edgekit.quant.targets import get_target
from edgekit.runtime.backends.fake import FakeSession
from tests.quant.lowering import attention_graph, convolution, linear, table_graph

TARGET = get_target("cpu:any")
LINEAR, CONV, TABLE = normalised(linear(32, 64)), normalised(convolution(16, 8, 3)), normalised(table_graph())
ROWS, PICTURE = (1, 5, 64), (1, 8, 9, 7)


@pytest.fixture(autouse=True)
def _few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.0)


def only(model: ir.Model, role: str = "linear") -> Unit:
    """The model's one unit, in a role that takes integers."""
    (unit,) = find_units(model)
    return replace(unit, role=role)  # type: ignore[arg-type]


def keys(file: Path) -> set[str]:
    """What is in a table's file."""
    return set(json.loads(file.read_text()))


# --------------------------------------------------------------------------------------------------- one unit


@pytest.mark.parametrize("choice", TARGET.allowed(only(LINEAR)))
def test_a_product_is_run_at_every_choice(choice: str) -> None:
    """Each lowers and runs alone, for as many runs as there must be."""
    found = LatencyTable(TARGET).time(LINEAR, only(LINEAR), ROWS, choice)
    assert found.runs >= latency.LEAST_RUNS
    assert found.median > 0


@pytest.mark.parametrize("choice", TARGET.allowed(only(CONV, "conv")))
def test_a_convolution_is_run_at_every_choice(choice: str) -> None:
    """Alike, with the padding of its own node."""
    assert LatencyTable(TARGET).time(CONV, only(CONV, "conv"), PICTURE, choice).runs >= latency.LEAST_RUNS


def test_a_choice_that_a_unit_may_not_take_is_not_timed() -> None:
    """Lowering refuses it, whatever the table was asked."""
    with pytest.raises(BadRequest, match="cannot be w4a16-32"):
        LatencyTable(TARGET).time(CONV, only(CONV, "conv"), PICTURE, "w4a16-32")


def test_a_table_of_rows_takes_no_time() -> None:
    """Gathering is not timed at any choice, and nothing is remembered of it."""
    table = LatencyTable(TARGET)
    for choice in CHOICES:
        assert table.time(TABLE, only(TABLE), (2, 3), choice) == Timing(0.0, 0.0, 0)


def test_runs_are_counted_and_medians_taken() -> None:
    """A session is warmed up, then run; what is told is of the runs that were measured."""
    calls = []
    session = FakeSession(lambda feeds: calls.append(feeds) or {}, (), ())  # type: ignore[func-returns-value]
    found = timed(session, {})
    assert len(calls) == found.runs + latency.WARM_UP
    assert found.runs == latency.LEAST_RUNS
    assert found.spread >= 0


# --------------------------------------------------------------------------------------------------- memory


def test_what_was_measured_is_remembered() -> None:
    """The second question has the first one's answer to the last digit."""
    table = LatencyTable(TARGET)
    assert table.time(LINEAR, only(LINEAR), ROWS, "w8a8") is table.time(LINEAR, only(LINEAR), ROWS, "w8a8")


def test_a_file_keeps_what_was_measured(tmp_path: Path) -> None:
    """Another table reads it, and measures nothing that is in it; a folder is made, no draft is left."""
    file = tmp_path / "made" / "latency.json"
    first = LatencyTable(TARGET, file).time(LINEAR, only(LINEAR), ROWS, "w8a16")
    assert LatencyTable(TARGET, file).time(LINEAR, only(LINEAR), ROWS, "w8a16") == first
    assert list(file.parent.iterdir()) == [file]
    told = json.loads(file.read_text())
    (key,) = told
    told[key] = [123.5, 4.5, 9]
    file.write_text(json.dumps(told))
    assert LatencyTable(TARGET, file).time(LINEAR, only(LINEAR), ROWS, "w8a16") == Timing(123.5, 4.5, 9)


def test_layers_alike_are_one_entry(tmp_path: Path) -> None:
    """Names and weights are not what time depends on."""
    file = tmp_path / "latency.json"
    table = LatencyTable(TARGET, file)
    other = normalised(linear(32, 64, seed=9))
    other.graph[0].name = "another"
    table.time(LINEAR, only(LINEAR), ROWS, "fp32")
    table.time(other, only(other), ROWS, "fp32")
    assert len(keys(file)) == 1


@pytest.mark.parametrize(
    "ask",
    [
        lambda table: table.time(LINEAR, only(LINEAR), ROWS, "w8a8"),
        lambda table: table.time(LINEAR, only(LINEAR), (1, 6, 64), "fp32"),
        lambda table: table.time(model := normalised(linear(16, 64)), only(model), ROWS, "fp32"),
        lambda table: table.time(model := normalised(linear(32, 32)), only(model), (1, 5, 32), "fp32"),
        lambda table: table.time(CONV, only(CONV, "conv"), PICTURE, "fp32"),
        lambda table: table.boundary(ROWS),
    ],
    ids=["choice", "shape", "outputs", "inputs", "operator", "boundary"],
)
def test_what_takes_another_time_is_another_entry(tmp_path: Path, ask: Callable[[LatencyTable], object]) -> None:
    """Operator, sizes, the data's shape and the choice are all in the key."""
    file = tmp_path / "latency.json"
    table = LatencyTable(TARGET, file)
    table.time(LINEAR, only(LINEAR), ROWS, "fp32")
    first = keys(file)
    ask(table)
    assert len(keys(file)) == 2
    assert first < keys(file)


def test_a_convolutions_stride_is_in_its_key(tmp_path: Path) -> None:
    """Two convolutions of the same weights do different work."""
    file = tmp_path / "latency.json"
    table = LatencyTable(TARGET, file)
    for stride in (1, 2):
        model = normalised(convolution(16, 8, 3, stride))
        table.time(model, only(model, "conv"), PICTURE, "fp32")
    assert len(keys(file)) == 2


def test_targets_do_not_share_timings(tmp_path: Path) -> None:
    """One file may hold several."""
    file = tmp_path / "latency.json"
    for name in ("cpu:any", "cpu:vnni"):
        table = LatencyTable(get_target(name), file)
        table.time(LINEAR, only(LINEAR), ROWS, "fp32")
        table.boundary(ROWS)
    assert sorted(key.partition(" ")[0] for key in keys(file)) == ["cpu:any", "cpu:any", "cpu:vnni", "cpu:vnni"]


def test_a_boundary_is_measured_once(tmp_path: Path) -> None:
    """By the shape that is rounded and widened."""
    file = tmp_path / "latency.json"
    table = LatencyTable(TARGET, file)
    assert table.boundary((1, 8, 16)) == table.boundary((1, 8, 16)) > 0
    assert LatencyTable(TARGET, file).boundary((1, 8, 16)) == table.boundary((1, 8, 16))
    assert len(keys(file)) == 1


# --------------------------------------------------------------------------------------------------- many units


def test_a_model_is_measured_as_a_table() -> None:
    """A row for each unit, a column for each of CHOICES, NaN where a choice is not allowed, progress to the end."""
    model = normalised(attention_graph())
    units = find_units(model)
    picture, tokens = {"x": (1, 4, 8, 8)}, {"out": (1, 64, 16), "bent": (1, 64, 64)}
    shapes = {unit.data: tokens.get(unit.data, (1, 64, 16)) if unit.op == "MatMul" else (1, 16, 8, 8) for unit in units}
    told: list[float] = []
    table = LatencyTable(TARGET)
    found = table.measure(model, units, {**shapes, **picture}, lambda _, share: told.append(share))
    assert found.shape == (len(units), len(CHOICES))
    for unit, row in zip(units, found, strict=True):
        assert {name for name, value in zip(CHOICES, row, strict=True) if np.isfinite(value)} == set(
            TARGET.allowed(unit)
        )
    assert told == [(row + 1) / len(units) for row in range(len(units))]


def test_neighbours_are_found() -> None:
    """Where a unit reads what another made, with nothing in between; elsewhere there is no boundary to save."""
    units = find_units(normalised(attention_graph()))
    names = [unit.id for unit in units]
    assert [(names[a], names[b]) for a, b in boundaries(units)] == [("first", "conv1"), ("conv1", "conv2")]
    assert boundaries(units[1:2]) == ()
