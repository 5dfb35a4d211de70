"""The scan: exact where the graph is linear, resumable, and additive enough to plan with."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.errors import BadRequest
from edgekit.quant.choices import get_choice
from edgekit.quant.graph import Unit
from edgekit.quant.metrics import NSR, PICTURE_METRICS, Metric, errors, spearman
from edgekit.quant.scan import scan
from edgekit.quant.scores import Scores
from edgekit.quant.targets import TARGETS, Target
from edgekit.quant.trial import TrialSession, open_trial
from edgekit.quant.weights import restore, store
from edgekit.quant.workload import GraphWorkload, measure, reference_of
from edgekit.runtime.backends import Session
from tests.quant.trial_graphs import built, feeds, linear, opened, ranges_on, tiny, units_of

CPU, CUDA = TARGETS["cpu:any"], TARGETS["cuda"]


class CountingWorkload:
    """A workload that remembers what it was run with, and may be cut off."""

    def __init__(self, inner: GraphWorkload, most: int = 10**9) -> None:
        self.inner, self.most = inner, most
        self.metrics = inner.metrics
        self.tried: list[Mapping[str, str]] = []

    def run(self, replaced: Mapping[str, Session]) -> tuple[np.ndarray, ...]:
        session = replaced.get("net")
        if isinstance(session, TrialSession):
            if len(self.tried) == self.most:
                raise KeyboardInterrupt
            self.tried.append(session.overrides)
        return self.inner.run(replaced)


def linear_workload(weight: np.ndarray, requests: int = 3) -> tuple[ir.Model, GraphWorkload]:
    model = linear(weight)
    rng = np.random.default_rng(1)
    given = [{"x": rng.standard_normal((5, len(weight)), dtype=np.float32)} for _ in range(requests)]
    return model, GraphWorkload("net", opened(model), given, "y", (NSR,))


@cache
def denoiser() -> tuple[ir.Model, tuple[Unit, ...], dict[str, tuple[float, float]]]:
    model = tiny()
    units = units_of(model)
    return model, units, ranges_on(model, units, feeds(2))


def workload(seed: int = 0, metrics: tuple[Metric, ...] = (*PICTURE_METRICS, NSR)) -> GraphWorkload:
    return GraphWorkload("net", opened(denoiser()[0]), feeds(2, seed), "out", metrics)


@cache
def scanned(target: Target = CPU) -> Scores:
    model, units, ranges = denoiser()
    return scan(workload(), "net", model, units, ranges, target, threads=1)


def scan_tiny(work: Any, **options: Any) -> Scores:
    model, units, ranges = denoiser()
    return scan(work, "net", model, units, ranges, CPU, threads=1, **options)


def session_for(folder: Path, target: Target = CPU) -> TrialSession:
    model, units, ranges = denoiser()
    return open_trial(model, units, ranges, target, folder, form="override", threads=1)


def test_a_linear_graph_is_scanned_exactly() -> None:
    """For y = x W the error of a choice is |x dW|^2 / |x W|^2 as a mean over requests, and vectors are x dW itself."""
    weight = np.random.default_rng(0).standard_normal((64, 24)).astype(np.float32)
    model, work = linear_workload(weight)
    units = units_of(model)
    scores = scan(work, "net", model, units, {}, CUDA, threads=1)
    assert scores.method == "scan"
    assert scores.units == (units[0].id,)
    assert set(scores.choices) == set(CUDA.allowed(units[0]))
    for column, name in enumerate(scores.choices):
        change = (restore(store(weight.T, get_choice(name), code_bits=8)) - weight.T).T.astype(np.float64)
        vectors = [
            (each["x"] @ change).ravel() / np.linalg.norm(each["x"].astype(np.float64) @ weight) for each in work.feeds
        ]
        wanted = np.mean([vector @ vector for vector in vectors])
        assert scores.errors("nsr")[0, column] == pytest.approx(wanted, rel=1e-2 if wanted < 1e-6 else 1e-4, abs=1e-13)
        if wanted > 1e-6:
            found = scores.vectors["nsr"][0, column]
            np.testing.assert_allclose(found, np.concatenate(vectors) / np.sqrt(3), atol=1e-4 * np.abs(found).max())


def test_scores_are_the_errors_of_single_trials(tmp_path: Path) -> None:
    """Every entry is the metric's value with that one unit changed, and what is not allowed is NaN."""
    units, scores, work = denoiser()[1], scanned(), workload()
    references = reference_of(work)
    session = session_for(tmp_path)
    for row, unit in enumerate(units):
        for column, choice in enumerate(scores.choices):
            if choice not in CPU.allowed(unit):
                assert np.isnan(scores.errors("nsr")[row, column])
                continue
            session.set({unit.id: choice})
            for name, wanted in measure(work, references, {"net": session}).items():
                # Sketched to 1024 of 1536 numbers: a squared length is off by some sqrt(2 / 1024) at most.
                assert scores.errors(name)[row, column] == pytest.approx(wanted, rel=0.25, abs=1e-11), (unit.id, choice)


def test_plain_weights_have_no_error() -> None:
    """The fp32 column is zero by definition, whatever the session's own rounding."""
    scores = scanned()
    for metric in scores.metrics:
        assert not scores.vectors[metric][:, scores.choices.index("fp32")].any()


def test_short_outputs_are_not_sketched_and_long_ones_are() -> None:
    """A metric's vectors have the length of its own, up to store_dim for each request."""
    scores = scan_tiny(workload(), only=[("query", "fp16")], store_dim=512)
    assert scores.vectors["content"].shape[-1] == 2 * 2 * 3 * 64
    assert scores.vectors["quality"].shape[-1] == 2 * 512
    exact = scan_tiny(workload(), only=[("query", "fp16")], store_dim=10_000)
    assert exact.vectors["quality"].shape[-1] == 2 * 2 * 3 * 256
    row, column = exact.units.index("query"), exact.choices.index("fp16")
    assert scores.errors("quality")[row, column] == pytest.approx(exact.errors("quality")[row, column], rel=0.3)


def test_only_what_is_asked_for_is_run() -> None:
    """`only` runs its pairs and no others; the rest is NaN, plain weights aside."""
    work = CountingWorkload(workload())
    scores = scan_tiny(work, only=[("query", "w8a16"), ("inner", "w8a8"), ("inner", "fp32")])
    assert work.tried == [{"inner": "w8a8"}, {"query": "w8a16"}]
    known = {(scores.units[row], scores.choices[column]) for row, column in np.argwhere(scores.known())}
    assert {pair for pair in known if pair[1] != "fp32"} == {("query", "w8a16"), ("inner", "w8a8")}
    np.testing.assert_array_equal(
        scores.vectors["nsr"][scores.units.index("query"), scores.choices.index("w8a16")],
        scanned().vectors["nsr"][scores.units.index("query"), scores.choices.index("w8a16")],
    )


def test_forms_give_the_same_scores() -> None:
    """Scanning with overrides or with deltas gives the same table, to what float rounding leaves of small errors."""
    pairs = [(unit, choice) for unit in ("query", "wide") for choice in ("w8a16", "w4a16-32", "w2a16-32")]
    one, other = (scan_tiny(workload(), only=pairs, form=form).errors("nsr") for form in ("override", "delta"))
    np.testing.assert_allclose(one, other, rtol=0.02)


def test_a_killed_scan_goes_on(tmp_path: Path) -> None:
    """A scan cut off at its fifth trial keeps the units that were done, runs what is missing, and gives the same."""
    pairs = [(unit, choice) for unit in ("inner", "query", "key") for choice in CPU.allowed(denoiser()[1][4])]
    pairs = [(unit, choice) for unit, choice in pairs if unit != "inner" or choice in ("fp32", "fp16", "w8a8")]
    whole = CountingWorkload(workload())
    wanted = scan_tiny(whole, only=pairs)
    cut = CountingWorkload(workload(), most=5)
    with pytest.raises(KeyboardInterrupt):
        scan_tiny(cut, only=pairs, cache=tmp_path)
    rest = CountingWorkload(workload())
    resumed = scan_tiny(rest, only=pairs, cache=tmp_path)
    assert [*cut.tried[:2], *rest.tried] == whole.tried  # the unit that was cut off begins anew
    again = CountingWorkload(workload())
    repeated = scan_tiny(again, only=pairs, cache=tmp_path)
    assert again.tried == []
    for scores in (resumed, repeated):
        for metric in wanted.metrics:
            np.testing.assert_array_equal(scores.vectors[metric], wanted.vectors[metric])


def test_more_choices_add_to_what_is_there(tmp_path: Path) -> None:
    """A later scan for more choices of a unit runs those alone and keeps the earlier ones."""
    scan_tiny(workload(), only=[("query", "fp16")], cache=tmp_path)
    more = CountingWorkload(workload())
    scan_tiny(more, only=[("query", "fp16"), ("query", "w8a16")], cache=tmp_path)
    assert more.tried == [{"query": "w8a16"}]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("change", ["requests", "range", "store", "dim", "metrics", "at", "target"])
def test_results_of_other_questions_are_not_taken(tmp_path: Path, change: str) -> None:
    """Another workload, range, rounding, sketch, metric, base point or target finds nothing in the cache."""
    model, units, ranges = denoiser()
    pair = [("inner", "w8a8")]
    scan(workload(), "net", model, units, ranges, CPU, only=pair, cache=tmp_path, threads=1)
    options: dict[str, Any] = {
        "store": {"store_name": "other"},
        "dim": {"store_dim": 100},
        "at": {"at": {"query": "fp16"}},
    }.get(change, {})
    work = CountingWorkload(
        workload(seed=int(change == "requests"), metrics=(NSR,) if change == "metrics" else (*PICTURE_METRICS, NSR))
    )
    moved = {**ranges, "inner": (-9.0, 9.0)} if change == "range" else ranges
    target = TARGETS["cpu:vnni"] if change == "target" else CPU
    scan(work, "net", model, units, moved, target, only=pair, cache=tmp_path, threads=1, **options)
    assert {"inner": "w8a8"}.items() <= work.tried[-1].items()


def test_what_does_not_matter_is_not_asked_again(tmp_path: Path) -> None:
    """A range that a unit does not read leaves its results valid."""
    model, units, ranges = denoiser()
    options: dict[str, Any] = {"only": [("inner", "w8a8")], "cache": tmp_path, "threads": 1}
    scan(workload(), "net", model, units, ranges, CPU, **options)
    work = CountingWorkload(workload())
    scan(work, "net", model, units, {**ranges, "query": (-99.0, 99.0)}, CPU, **options)
    assert work.tried == []


@pytest.mark.parametrize("damage", [b"", b"junk", b"PK\x03\x04"])
def test_a_damaged_result_is_measured_again(tmp_path: Path, damage: bytes) -> None:
    """A result file that cannot be read is measured again and written over."""
    options: dict[str, Any] = {"only": [("query", "fp16")], "cache": tmp_path}
    wanted = scan_tiny(workload(), **options)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage)
    work = CountingWorkload(workload())
    found = scan_tiny(work, **options)
    assert len(work.tried) == 1
    np.testing.assert_array_equal(found.vectors["nsr"], wanted.vectors["nsr"])


def test_progress_names_the_trial_and_grows() -> None:
    """Progress tells each trial by name with a share that grows from 0 to 1."""
    told: list[tuple[str, float]] = []
    scan_tiny(
        workload(), only=[("query", "fp16"), ("key", "fp16")], progress=lambda what, share: told.append((what, share))
    )
    assert [what for what, _ in told] == [
        "running the reference",
        "trying query at fp16",
        "trying key at fp16",
        "scanned",
    ]
    assert [share for _, share in told] == [0.0, 0.0, 0.5, 1.0]


def test_weights_that_a_type_cannot_hold_are_no_choice(tmp_path: Path) -> None:
    """What does not fit into fp16, a weight or a block's scale, makes those choices NaN and leaves the scan running."""
    weight = np.random.default_rng(0).standard_normal((64, 24)).astype(np.float32)
    weight[0, 0] = 1e6
    model, work = linear_workload(weight)
    scores = scan(work, "net", model, units_of(model), {}, CUDA, threads=1)
    missing = dict(zip(scores.choices, np.isnan(scores.errors("nsr")[0]), strict=True))
    few_bits = {name for name in scores.choices if name.startswith(("w4", "w2"))}  # 1e6 over 8 or 2 steps
    assert missing == {name: name == "fp16" or name in few_bits for name in scores.choices}


def test_weights_on_the_grid_cost_no_run() -> None:
    """Weights that fp16 holds exactly are not run at fp16: their error is zero."""
    weight = np.random.default_rng(0).standard_normal((64, 24)).astype(np.float16).astype(np.float32)
    model, inner = linear_workload(weight)
    work = CountingWorkload(inner)
    scores = scan(work, "net", model, units_of(model), {}, CUDA, threads=1)
    tried = {choice for overrides in work.tried for choice in overrides.values()}
    assert scores.errors("nsr")[0, scores.choices.index("fp16")] == 0
    assert tried == set(scores.choices) - {"fp32", "fp16"}


def test_outputs_that_overflow_are_no_choice() -> None:
    """A choice whose outputs are not finite gives NaN for every metric."""
    model, inner = linear_workload(np.random.default_rng(0).standard_normal((64, 24)))

    class Overflowing(CountingWorkload):
        def run(self, replaced: Mapping[str, Session]) -> tuple[np.ndarray, ...]:
            outputs = super().run(replaced)
            session = replaced.get("net")
            broken = isinstance(session, TrialSession) and "w2a16-32" in session.overrides.values()
            return tuple(np.where(broken, np.inf, output) for output in outputs)

    scores = scan(Overflowing(inner), "net", model, units_of(model), {}, CUDA, threads=1)
    assert np.isnan(scores.errors("nsr")[0, scores.choices.index("w2a16-32")])
    assert np.isfinite(scores.errors("nsr")[0, scores.choices.index("w4a16-32")])


def test_a_base_point_moves_the_question(tmp_path: Path) -> None:
    """Around `at`, a vector is the error at the unit's choice less that at its plain weights, others as in `at`."""
    work, base = workload(metrics=(NSR,)), {"inner": "w8a8", "wide": "w4a16-32", "query": "w8a16"}
    scores = scan_tiny(work, only=[("wide", "w4a16-32"), ("key", "w4a16-32")], at=base, store_dim=10_000)
    references = reference_of(work)
    session = session_for(tmp_path)
    for unit in ("wide", "key"):
        outputs = []
        for choice in ("w4a16-32", "fp32"):
            session.set({**base, unit: choice})
            outputs.append(work.run({"net": session}))
        wanted = [
            NSR.vector(reference, here) - NSR.vector(reference, there)
            for reference, here, there in zip(references, *outputs, strict=True)
        ]
        found = scores.vectors["nsr"][scores.units.index(unit), scores.choices.index("w4a16-32")]
        np.testing.assert_allclose(found, np.concatenate(wanted) / np.sqrt(2), atol=1e-4 * np.abs(found).max())


def test_an_empty_base_point_is_none() -> None:
    """Starting from plain weights everywhere is the ordinary scan, without a run more."""
    work = CountingWorkload(workload())
    found = scan_tiny(work, only=[("key", "w4a16-32")], at={"query": "fp32"}, form="delta")
    assert work.tried == [{"key": "w4a16-32"}]
    row, column = found.units.index("key"), found.choices.index("w4a16-32")
    np.testing.assert_array_equal(found.vectors["nsr"][row, column], scanned().vectors["nsr"][row, column])


def test_sums_of_single_errors_rank_mixes(tmp_path: Path) -> None:
    """48 random mixes on other inputs: the sum of single-unit errors ranks them by Spearman >= 0.9, vector sums too."""
    units, scores, held = denoiser()[1], scanned(), workload(seed=5)
    references = reference_of(held)
    session = session_for(tmp_path)
    rng = np.random.default_rng(0)
    single = {name: np.nan_to_num(scores.errors(name)) for name in scores.metrics}
    predicted: dict[str, list[float]] = {name: [] for name in scores.metrics}
    summed: dict[str, list[float]] = {name: [] for name in scores.metrics}
    actual: dict[str, list[float]] = {name: [] for name in scores.metrics}
    for _ in range(48):
        plain = rng.choice([0.2, 0.5, 0.8])
        mix = {u.id: "fp32" if rng.random() < plain else str(rng.choice(CPU.allowed(u))) for u in units}
        mix["wide"] = "w8a16"  # so that no mix is without error
        pick = [scores.choices.index(mix[unit.id]) for unit in units]
        session.set(mix)
        found = errors(held.metrics, references, held.run({"net": session}))
        for name in scores.metrics:
            predicted[name].append(single[name][range(len(units)), pick].sum())
            vector = scores.vectors[name][range(len(units)), pick].astype(np.float64).sum(0)
            summed[name].append(vector @ vector)
            actual[name].append(found[name])
    for name in scores.metrics:
        assert spearman(np.array(predicted[name]), np.array(actual[name])) >= 0.9, name
        assert spearman(np.array(summed[name]), np.array(actual[name])) >= 0.9, name
        assert 0.3 < np.median(np.array(actual[name]) / np.array(predicted[name])) < 3


def test_wrong_requests_are_named() -> None:
    """Pairs and base points that are not there, missing ranges, no request and a broken reference are refused."""
    model, units, ranges = denoiser()
    with pytest.raises(BadRequest, match="'nobody' cannot be 'fp16'"):
        scan_tiny(workload(), only=[("nobody", "fp16")])
    with pytest.raises(BadRequest, match="'entry' cannot be 'w8a8'"):
        scan_tiny(workload(), only=[("entry", "w8a8")])
    for start, said in (
        ({"nobody": "fp16"}, "'nobody' cannot be 'fp16'"),
        ({"entry": "w8a8"}, "'entry' cannot be 'w8a8'"),
    ):
        with pytest.raises(BadRequest, match=said):
            scan_tiny(workload(), only=[("query", "fp16")], at=start)
    with pytest.raises(BadRequest, match="inner cannot be tried at w8a8: no range of entry, inner"):
        scan(workload(), "net", model, units, {}, CPU)
    empty = GraphWorkload("net", opened(model), [], "out", (NSR,))
    with pytest.raises(BadRequest, match="without requests"):
        scan(empty, "net", model, units, ranges, CPU)
    weight = np.full((64, 24), np.float32(3e38))
    broken_model, broken = linear_workload(weight)
    with pytest.raises(BadRequest, match="before anything was changed"):
        scan(broken, "net", broken_model, units_of(broken_model), {}, CUDA)


def test_a_graph_without_units_has_no_scores() -> None:
    """A graph with nothing to choose gives empty tables of the right lengths."""
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }"""
    model = built(text, {})
    work = GraphWorkload("net", opened(model), [{"x": np.ones((2, 4), np.float32)}], "y", (NSR,))
    scores = scan(work, "net", model, (), {}, CPU)
    assert scores.units == ()
    assert scores.vectors["nsr"].shape == (0, 0, 8)
