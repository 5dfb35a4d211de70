"""Gradient probes estimate what trying every unit at every choice measures; on linear graphs they are exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.errors import BadRequest, MemoryLimit, UnsupportedModel
from edgekit.export.probes import probe_scores
from edgekit.quant.choices import CHOICES
from edgekit.quant.graph import Unit, find_units, from_matrix, initializer, load_graph, normalised, weight_matrix
from edgekit.quant.metrics import CONTENT, NSR, QUALITY, Metric, spearman
from edgekit.quant.pictures import Call
from edgekit.quant.scores import Scores
from edgekit.quant.targets import TARGETS, Target
from edgekit.quant.trial import open_trial
from edgekit.quant.weights import restore, store
from tests.export.toy_graphs import (
    SIDE,
    TEXT,
    TOKENS,
    calls_of,
    chain_feeds,
    linear_chain,
    ranges_of,
    run_ort,
    toy_unet,
)

pytestmark = pytest.mark.torch

CPU = TARGETS["cpu:any"]
Range = tuple[float, float]
Allowed = dict[str, tuple[str, ...]]


def allowed_on(target: Target, units: Sequence[Unit]) -> Allowed:
    """What a target allows each unit."""
    return {unit.id: target.allowed(unit) for unit in units}


def tried(
    model: ir.Model,
    units: Sequence[Unit],
    allowed: Allowed,
    calls: Sequence[Call],
    metrics: Sequence[Metric],
    ranges: Mapping[str, Range],
    target: Target,
    folder: Path,
) -> dict[tuple[str, str], dict[str, float]]:
    """The slow twin: ONNX Runtime runs every unit alone at every choice; errors by unit and choice, by metric."""
    session = open_trial(model, units, ranges, target, folder, threads=1)
    references = [next(iter(session.run(call.feeds).values())) for call in calls]
    found = {}
    for unit in units:
        for choice in allowed[unit.id]:
            session.set({unit.id: choice})
            answers = [next(iter(session.run(call.feeds).values())) for call in calls]
            found[unit.id, choice] = {
                metric.name: float(
                    np.mean([np.sum(metric.vector(*pair) ** 2) for pair in zip(references, answers, strict=True)])
                )
                for metric in metrics
            }
    return found


def ranks(
    scores: Scores, truth: Mapping[tuple[str, str], Mapping[str, float]], metric: str, only: str = ""
) -> tuple[float, float]:
    """Spearman's correlation with the truth, and the median ratio to it; of one choice or of all."""
    errors = scores.errors(metric)
    pairs = [
        (errors[scores.units.index(unit), scores.choices.index(choice)], error[metric])
        for (unit, choice), error in truth.items()
        if choice != "fp32" and only in ("", choice)
    ]
    estimated, measured = np.array(pairs).T
    return spearman(estimated, measured), float(np.median(estimated / measured))


@cache
def toy() -> tuple[ir.Model, tuple[Unit, ...], tuple[Call, ...], dict[str, Range]]:
    """The denoiser, two recorded runs, and their ranges."""
    random = np.random.default_rng(1)
    model = toy_unet()
    feeds = [
        {
            "sample": random.standard_normal((1, 4, SIDE, SIDE)).astype(np.float32),
            "text": random.standard_normal((1, TOKENS, TEXT)).astype(np.float32),
        }
        for _ in range(2)
    ]
    calls = calls_of(feeds)
    return model, find_units(model), calls, ranges_of(model, calls)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Scores, dict[tuple[str, str], dict[str, float]]]:
    """Probes and trials of the toy denoiser, on a CPU."""
    model, units, calls, ranges = toy()
    allowed, metrics = allowed_on(CPU, units), (CONTENT, QUALITY)
    scores = probe_scores(model, units, allowed, calls, metrics, target=CPU, ranges=ranges)
    return scores, tried(model, units, allowed, calls, metrics, ranges, CPU, tmp_path_factory.mktemp("trial"))


@pytest.mark.parametrize("metric", ["content", "quality"])
@pytest.mark.parametrize("choice", ["w8a16", "w8a8", "w8a8-row", "w4a16-32", "w2a16-32", "fp16", ""])
def test_probes_rank_units_like_trials(compared: Any, metric: str, choice: str) -> None:
    """Spearman of 0.9 and more, at every choice and over all of them, from eight probes of two runs."""
    rank, ratio = ranks(*compared, metric, choice)
    assert rank >= 0.9
    assert 0.6 <= ratio <= 1.6


def changed(model: ir.Model, unit: Unit, choice: str, target: Target = CPU) -> ir.Model:
    """The graph with the weights of one unit as a choice restores them, its activations as they are."""
    copy = model.clone()
    weight = initializer(model, unit.weight)
    matrix = restore(store(weight_matrix(model, unit), CHOICES[choice], code_bits=target.code_bits))
    shape = tuple(int(size) for size in weight.shape)
    copy.graph.initializers[unit.weight].const_value = ir.tensor(from_matrix(matrix, unit, shape), name=unit.weight)
    return copy


CUDA = TARGETS["cuda"]  # products of float activations
PLAIN = ("fp32", "fp16", "w8a16", "w4a16-32", "w2a16-32")


def chain_scores(model: ir.Model, calls: Sequence[Call], **options: Any) -> tuple[tuple[Unit, ...], Scores]:
    """The chain's units, and their scores at weight-only choices."""
    units = find_units(model)
    given = {"target": CUDA, "ranges": {}, "probes": 4, **options}
    return units, probe_scores(model, units, dict.fromkeys((unit.id for unit in units), PLAIN), calls, (NSR,), **given)


def test_coordinates_are_projections_of_the_true_error_vectors() -> None:
    """Of a linear graph each number is <v, error vector> of the trial, with the very v of its seed."""
    model, calls = linear_chain(), chain_feeds()
    units, scores = chain_scores(model, calls, seed=5)
    assert scores.vectors["nsr"].shape == (2, len(PLAIN), 8)
    for row, unit in enumerate(units):
        for column, choice in enumerate(scores.choices):
            twin = changed(model, unit, choice, CUDA)
            wanted: list[float] = []
            for number, call in enumerate(calls):
                (before,), (after,) = run_ort(model, call.feeds), run_ort(twin, call.feeds)
                generator = np.random.default_rng((5, number, 0))
                vector = NSR.vector(before, after)
                wanted += [float(generator.standard_normal(vector.size) @ vector) for _ in range(4)]
            size = max(map(abs, wanted), default=0) / math.sqrt(8)
            found = scores.vectors["nsr"][row, column]
            np.testing.assert_allclose(found, np.array(wanted) / math.sqrt(8), atol=2e-3 * size + 1e-7)


def test_many_probes_give_the_error_itself_and_the_products_between_units() -> None:
    """Of a linear graph the expectation is exact: lengths, and the inner products that mixes are predicted with."""
    model, calls = linear_chain(), chain_feeds(1)
    units, scores = chain_scores(model, calls, probes=1000)
    (before,) = run_ort(model, calls[0].feeds)
    vectors = [NSR.vector(before, run_ort(changed(model, unit, "w2a16-32", CUDA), calls[0].feeds)[0]) for unit in units]
    column = scores.choices.index("w2a16-32")
    wanted = np.array([[a @ b for a in vectors] for b in vectors])
    sketched = scores.vectors["nsr"][:, column].astype(np.float64)
    scale = np.sqrt(np.outer(wanted.diagonal(), wanted.diagonal()))
    assert np.abs(sketched @ sketched.T - wanted).max() < 5 * math.sqrt(2 / 1000) * scale.max()
    np.testing.assert_allclose(scores.errors("nsr")[:, column], wanted.diagonal(), rtol=5 * math.sqrt(2 / 1000))


def test_gains_weigh_runs() -> None:
    """A run whose errors are carried on with energy 9 counts nine times; one without a gain for a metric once."""
    model, (first, second) = linear_chain(), chain_feeds()
    _, plain = chain_scores(model, (first, second))
    _, weighed = chain_scores(model, (replace(first, gain={"nsr": 9.0}), replace(second, gain={"content": 4.0})))
    np.testing.assert_allclose(weighed.vectors["nsr"][..., :4], 3 * plain.vectors["nsr"][..., :4], rtol=1e-6)
    np.testing.assert_array_equal(weighed.vectors["nsr"][..., 4:], plain.vectors["nsr"][..., 4:])


def test_the_seed_decides() -> None:
    """The same seed gives the same vectors; another gives others of about the same lengths."""
    model, calls = linear_chain(), chain_feeds()
    found = [chain_scores(model, calls, seed=seed, probes=64)[1] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(found[0].vectors["nsr"], found[1].vectors["nsr"])
    assert np.abs(found[0].vectors["nsr"] - found[2].vectors["nsr"]).max() > 0
    lossy = [found[0].choices.index(name) for name in PLAIN if name != "fp32"]
    np.testing.assert_allclose(found[0].errors("nsr")[:, lossy], found[2].errors("nsr")[:, lossy], rtol=0.9)


def test_outputs_are_joined_as_workloads_join_them() -> None:
    """With two outputs the error is that of both beside each other; a unit behind one of them moves only that one."""
    model, calls = linear_chain(outputs=2), chain_feeds(1)
    units, scores = chain_scores(model, calls, probes=600)
    before = np.concatenate(run_ort(model, calls[0].feeds), 1)
    for row, unit in enumerate(units):
        after = np.concatenate(run_ort(changed(model, unit, "w4a16-32", CUDA), calls[0].feeds), 1)
        wanted = float(np.sum(NSR.vector(before, after) ** 2))
        found = scores.errors("nsr")[row, scores.choices.index("w4a16-32")]
        assert found == pytest.approx(wanted, rel=5 * math.sqrt(2 / 600))


def test_what_changes_nothing_costs_nothing_and_what_is_not_allowed_is_unknown() -> None:
    """fp32 has zeros, as has a unit of weights that a choice holds exactly; a choice that is not allowed has NaN."""
    model, calls = linear_chain(), chain_feeds()
    first, second = find_units(model)
    halves = changed(model, second, "fp16")
    scores = probe_scores(
        halves,
        (first, second),
        {first.id: ("fp32", "w4a16-32"), second.id: ("fp32", "fp16")},
        calls,
        (NSR,),
        target=CUDA,
        ranges={},
    )
    assert (scores.choices, scores.method) == (("fp32", "fp16", "w4a16-32"), "probe")
    errors = scores.errors("nsr")
    assert errors[0, 0] == errors[1, 0] == errors[1, 1] == 0
    assert errors[0, 2] > 0
    assert np.isnan(errors[[0, 1], [1, 2]]).all()


def test_less_memory_gives_the_same_scores() -> None:
    """With room for one run at a time, or for a few units of one, only the order of work changes."""
    model, units, calls, ranges = toy()
    allowed = {unit.id: ("fp32", "w8a8") if unit.op == "Conv" else ("fp32", "w8a8-row", "w4a16-32") for unit in units}
    said: list[list[float]] = []

    def scores(max_bytes: int) -> Scores:
        said.append([])
        return probe_scores(
            model,
            units,
            allowed,
            calls,
            (CONTENT,),
            target=CPU,
            ranges=ranges,
            probes=1,
            max_bytes=max_bytes,
            progress=lambda _, share: said[-1].append(share),
        )

    found = [scores(size) for size in (1 << 30, 6_000_000, 3_100_000)]
    for each in found[1:]:
        np.testing.assert_array_equal(found[0].vectors["content"], each.vectors["content"])
    assert [len(shares) for shares in said][:2] == [1, 2]
    assert len(said[2]) > 4
    assert all(shares == sorted(shares) and shares[-1] == 1 for shares in said)
    with pytest.raises(MemoryLimit, match=r"one run of this graph and has 0\.0"):
        scores(2_900_000)


def test_what_cannot_be_probed_is_said() -> None:
    """No runs, no probes, a unit of another graph, an activation that was not measured, an unknown operator."""
    model, calls = linear_chain(), chain_feeds()
    units = find_units(model)
    allowed: Allowed = {unit.id: ("fp32", "w8a8") for unit in units}
    given: dict[str, Any] = {"target": CPU, "ranges": {}}
    with pytest.raises(BadRequest, match="0 runs"):
        probe_scores(model, units, allowed, (), (NSR,), **given)
    with pytest.raises(BadRequest, match="0 probes"):
        probe_scores(model, units, allowed, calls, (NSR,), probes=0, **given)
    other = replace(units[0], id="elsewhere")
    with pytest.raises(BadRequest, match="'elsewhere'"):
        probe_scores(model, (other,), {"elsewhere": ("fp16",)}, calls, (NSR,), **given)
    with pytest.raises(BadRequest, match=r"no range of x"):
        probe_scores(model, units, allowed, calls, (NSR,), **given)
    model.graph.append(ir.node("Det", [next(iter(model.graph)).outputs[0]]))
    with pytest.raises(UnsupportedModel, match="Det"):
        probe_scores(model, units, allowed, calls, (NSR,), **given)


# The shipped model


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], ir.Model]:
    """The emoji denoiser's graph."""
    from edgekit.export.families import family_of
    from edgekit.export.sources import read_source
    from edgekit.export.worker import Task, run_task

    source, folder = Path(__file__).parents[2] / "models" / "emoji", tmp_path_factory.mktemp("emoji")
    model = read_source(source)
    jobs = tuple(job for job in family_of(model).jobs(model) if job.part == "unet")
    task = Task(kind="trace", jobs=jobs, source=str(source), graphs=str(folder), references=str(folder))
    return lambda: (run_task(task, lambda _: None), normalised(load_graph(folder / "unet.onnx")))[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
def test_the_shipped_denoiser(emoji: Callable[[], ir.Model], tmp_path: Path) -> None:
    """On the trained emoji model probes rank weights of 8, 4 and 2 bits and rounded activations like trials."""
    random = np.random.default_rng(0)
    model = emoji()
    units = find_units(model)
    feeds = {
        "sample": random.standard_normal((2, 12, 16, 16)).astype(np.float32),
        "timestep": np.full(2, 999, np.float32),
        "encoder_hidden_states": random.standard_normal((2, 16, 160)).astype(np.float32),
        "timestep_cond": random.standard_normal((2, 64)).astype(np.float32),
    }
    calls = calls_of([feeds])
    ranges, metrics = ranges_of(model, calls), (CONTENT, QUALITY)
    kept = ("w8a16", "w8a8", "w4a16-64", "w2a16-32")
    allowed = {unit.id: tuple(name for name in CPU.allowed(unit) if name in kept) for unit in units}
    units = tuple(unit for unit in units if allowed[unit.id])[::2]
    scores = probe_scores(model, units, allowed, calls, metrics, target=CPU, ranges=ranges)
    truth = tried(model, units, allowed, calls, metrics, ranges, CPU, tmp_path)
    for metric in ("content", "quality"):
        for choice in (*kept, ""):
            rank, ratio = ranks(scores, truth, metric, choice)
            assert rank >= 0.9, (metric, choice)
            assert 0.5 <= ratio <= 2
