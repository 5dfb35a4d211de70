"""Probes are held to trials, trials are kept, and all parts end in one set of tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.errors import UnsupportedModel
from edgekit.quant.calibrate import calibrate
from edgekit.quant.choices import CHOICES
from edgekit.quant.graph import find_units, load_graph
from edgekit.quant.latency import LatencyTable
from edgekit.quant.measure import AGREEMENT, FEWEST_TRIED, measure_sensitivity, scan_part, study_of
from edgekit.quant.metrics import NSR, Metric
from edgekit.quant.mixed import Measured
from edgekit.quant.pictures import Call
from edgekit.quant.prepare import Prepared
from edgekit.quant.rewrite import Constants
from edgekit.quant.scores import Scores
from edgekit.quant.targets import TARGETS, Target
from edgekit.quant.workload import GraphWorkload
from edgekit.runtime.backends import open_session
from tests.quant.tiny_graphs import Graph, normal_form

CPU = TARGETS["cpu:any"]


class Told:
    """What was reported."""

    def __init__(self, most: int = 10**9) -> None:
        self.lines: list[str] = []
        self.most = most

    def __call__(self, what: str, share: float) -> None:
        self.lines.append(what)
        if self.trials > self.most:
            raise KeyboardInterrupt

    @property
    def trials(self) -> int:
        """How many runs of a choice were begun."""
        return sum("trying" in line for line in self.lines)


class Estimate:
    """A probe that answers with fixed scores and counts."""

    def __init__(self, scores: Scores) -> None:
        self.scores, self.asked = scores, 0

    def __call__(
        self, part: Prepared, metrics: Sequence[Metric], target: Target, report: Callable[[str, float], None]
    ) -> Scores:
        self.asked += 1
        assert [metric.name for metric in metrics] == list(self.scores.metrics)
        return self.scores


@pytest.fixture(scope="module")
def unet(small_measured: Measured) -> Prepared:
    return next(part for part in small_measured.parts if part.part == "unet")


@pytest.fixture(scope="module")
def truth(unet: Prepared) -> Scores:
    """Everything tried."""
    return scan_part(unet, CPU)


def reversed_order(scores: Scores) -> Scores:
    """Vectors whose lengths fall where those of the truth rise: what a wrong probe says."""
    vectors = {}
    for name, array in scores.vectors.items():
        squares = np.square(array.astype(np.float64)).sum(-1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            vectors[name] = np.where(squares > 0, array / squares * 1e-6, array).astype(np.float32)
    return Scores(scores.units, scores.choices, vectors, "probe")


def test_without_probes_everything_is_tried(unet: Prepared, truth: Scores, tmp_path: Path) -> None:
    """Each unit at each of its choices, by trials alone."""
    told = Told()
    found = measure_sensitivity(unet, CPU, None, tmp_path, told)
    allowed = np.array([[name in CPU.allowed(unit) for name in found.scores.choices] for unit in unet.units])
    np.testing.assert_array_equal(found.scores.known(), allowed)
    assert (found.scores.method, found.agreement, found.trials) == ("scan", {}, int(allowed.sum()))
    assert told.trials == int(allowed.sum()) - len(unet.units), "plain weights have no error to run for"
    np.testing.assert_allclose(found.scores.errors("content"), truth.errors("content"), rtol=1e-4, atol=1e-12)


def test_probes_that_agree_save_trials(unet: Prepared, truth: Scores, tmp_path: Path) -> None:
    """A few units are tried, the rest is taken from the probes, on the scale of the trials."""
    probe = Estimate(Scores(truth.units, truth.choices, {k: 3 * v for k, v in truth.vectors.items()}, "probe"))
    told = Told()
    found = measure_sensitivity(unet, CPU, probe, tmp_path, told)
    assert found.scores.method == "probe+scan"
    assert all(value > 0.999 for value in found.agreement.values())
    assert FEWEST_TRIED < found.trials < int(truth.known().sum())
    np.testing.assert_array_equal(found.scores.known(), truth.known())
    ours, true = (each.errors("quality")[truth.known()] for each in (found.scores, truth))
    np.testing.assert_allclose(ours, true, rtol=1e-3, atol=1e-12)


def test_probes_that_disagree_are_not_believed(unet: Prepared, truth: Scores, tmp_path: Path) -> None:
    """Then all is tried, and how far they agreed is told."""
    found = measure_sensitivity(unet, CPU, Estimate(reversed_order(truth)), tmp_path, Told())
    assert min(found.agreement.values()) < AGREEMENT
    assert found.scores.method == "scan"
    np.testing.assert_allclose(found.scores.errors("content"), truth.errors("content"), rtol=1e-4, atol=1e-12)


def test_a_graph_that_has_no_gradients_is_tried(unet: Prepared, tmp_path: Path) -> None:
    """The reason is told."""

    def probe(*_: object) -> Scores:
        raise UnsupportedModel("an operator without a gradient")

    told = Told()
    assert measure_sensitivity(unet, CPU, probe, tmp_path, told).scores.method == "scan"
    assert told.lines[0] == "no probes (an operator without a gradient)"


def test_what_was_measured_is_not_measured_again(unet: Prepared, truth: Scores, tmp_path: Path) -> None:
    """Neither probes nor trials; on other inputs both."""
    probe = Estimate(truth)
    first = measure_sensitivity(unet, CPU, probe, tmp_path, Told())
    told = Told()
    again = measure_sensitivity(unet, CPU, probe, tmp_path, told)
    assert (probe.asked, told.trials) == (1, 0)
    np.testing.assert_array_equal(again.scores.errors("content"), first.scores.errors("content"))
    measure_sensitivity(replace(unet, calls=unet.calls[::-1]), CPU, probe, tmp_path, told)
    assert probe.asked == 2


def test_a_stopped_scan_goes_on(unet: Prepared, truth: Scores, tmp_path: Path) -> None:
    """Units that were finished are not tried again, and the end is the same."""
    stopped = Told(most=30)
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(unet, CPU, None, tmp_path, stopped)
    told = Told()
    found = measure_sensitivity(unet, CPU, None, tmp_path, told)
    total = int(truth.known().sum()) - len(unet.units)
    assert total - 31 <= told.trials < total - 20
    np.testing.assert_allclose(found.scores.errors("content"), truth.errors("content"), rtol=1e-4, atol=1e-12)


def test_tables_of_a_study(small_measured: Measured, truth: Scores, unet: Prepared) -> None:
    """Bytes are the choice's own, errors the trials', NaN where not allowed, and the rest of the bundle is fixed."""
    study = small_measured.study
    units = {(part.part, unit.id): unit for part in small_measured.parts for unit in part.units}
    assert [(row.part, row.units) for row in study.rows] == [(part, (unit,)) for part, unit in units]
    for row, size, time in zip(study.rows, study.bytes, study.milliseconds, strict=True):
        unit = units[row.part, row.units[0]]
        assert (row.shape, row.params) == ((unit.n, unit.k), unit.params)
        for column, name in enumerate(study.choices):
            allowed = name in CPU.allowed(unit)
            assert np.isfinite(time[column]) == allowed
            wanted = CPU.choice(name).weight.bytes(unit.n, unit.k) if allowed else np.nan
            np.testing.assert_equal(size[column], wanted)
    rows = [at for at, row in enumerate(study.rows) if row.part == "unet"]
    columns = [study.choices.index(name) for name in truth.choices]
    np.testing.assert_allclose(
        study.errors["content"][np.ix_(rows, columns)], truth.errors("content"), rtol=1e-3, atol=1e-10
    )
    for name, table in study.errors.items():
        lengths = np.square(study.vectors[name].astype(np.float64)).sum(-1)
        known = np.isfinite(table)
        np.testing.assert_allclose(lengths[known], table[known], rtol=1e-4, atol=1e-12)


def test_errors_of_two_parts_share_no_dimension(small_measured: Measured) -> None:
    """Nothing is known of how they add, so they neither add nor cancel."""
    study = small_measured.study
    for vectors in study.vectors.values():
        owners: dict[str, np.ndarray] = {}
        for row, vector in zip(study.rows, np.nan_to_num(vectors), strict=True):
            used = (vector != 0).any(0)
            owners[row.part] = owners.get(row.part, np.zeros_like(used)) | used
        assert (np.sum(list(owners.values()), axis=0) <= 1).all()


def tied(folder: Path) -> Prepared:
    """Two products of one weight, and one of another."""
    make = Graph(0)
    weight = make.constant("shared", make.normal(16, 16))
    first = make("Tanh", make("MatMul", "x", weight, name="one"))
    second = make("Tanh", make("MatMul", first, weight, name="two"))
    make("MatMul", second, make.normal(16, 16), name="y")
    model = normal_form(make.done({"x": ("batch", 16)}, {"y": ("batch", 16)}))
    path = folder / "net.onnx"
    ir.save(model, path, external_data="net.onnx.data")
    units = find_units(load_graph(path))
    session = open_session(path, threads=1)
    feeds = [{"x": np.random.default_rng(seed).standard_normal((4, 16), np.float32)} for seed in range(3)]
    calls = tuple(Call(each, session.run(each)) for each in feeds)
    found = calibrate(load_graph(path), units, calls, lambda what, share: None)
    work = GraphWorkload("net", session, feeds, "y", (NSR,))
    return Prepared("net", path, units, (), Constants(), calls, calls[0], 3.0, work, {"nsr": {"nsr": 0.25}}, found)


def test_products_that_share_a_weight_are_one_row(tmp_path: Path) -> None:
    """Stored once, chosen once; their errors are one vector, and their times are added, of all runs."""
    part = tied(tmp_path)
    found = measure_sensitivity(part, CPU, None, tmp_path, Told())
    table = LatencyTable(CPU, tmp_path / "latency.json", threads=1)
    study = study_of([(part, found)], ["nsr"], CPU, table, 10_000, Told())
    assert [row.units for row in study.rows] == [("node.one", "node.two"), ("node.y",)]
    fp32, four = (study.choices.index(name) for name in ("fp32", "w4a16-32"))
    assert study.bytes[:, fp32].tolist() == [1024, 1024]
    assert study.fixed_bytes == 10_000 - 2048
    summed = found.scores.vectors["nsr"][:2, four].sum(0)
    assert study.errors["nsr"][0, four] == pytest.approx(0.25 * float(np.square(summed).sum()), rel=1e-4)
    times = table.measure(part.model(), part.units, part.found.shapes, Told())[:, list(CHOICES).index("fp32")]
    assert study.milliseconds[:, fp32] == pytest.approx([3 * times[:2].sum(), 3 * times[2]])
