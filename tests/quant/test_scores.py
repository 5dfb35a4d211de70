"""Scores: sketches keep what is needed, files keep everything, and two tables become one."""

from __future__ import annotations

import zipfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from edgekit.errors import BadRequest
from edgekit.quant.scores import Method, Scores, merge, rank_correlation, sketch

UNITS, CHOICES = ("a", "b", "c", "d"), ("fp32", "fp16", "w8a8")
SEEDS = st.integers(0, 2**32 - 1)


def table(seed: int = 0, length: int = 6, method: Method = "scan", metrics: tuple[str, ...] = ("content",)) -> Scores:
    """Random scores: fp32 is without error, unit d has no w8a8."""
    rng = np.random.default_rng(seed)
    vectors = {}
    for name in metrics:
        array = rng.standard_normal((len(UNITS), len(CHOICES), length)).astype(np.float32)
        array[:, 0] = 0
        array[3, 2] = np.nan
        vectors[name] = array
    return Scores(UNITS, CHOICES, vectors, method)


def same(a: Scores, b: Scores) -> bool:
    return (a.units, a.choices, a.method, a.metrics) == (b.units, b.choices, b.method, b.metrics) and all(
        np.array_equal(a.vectors[name], b.vectors[name], equal_nan=True) for name in a.metrics
    )


def test_errors_are_squared_lengths() -> None:
    """A pair's error is the sum of squares of its vector, NaN where it has none, 0 for plain weights."""
    scores = table()
    errors = scores.errors("content")
    assert errors.shape == (4, 3)
    assert errors[1, 2] == pytest.approx(sum(float(x) ** 2 for x in scores.vectors["content"][1, 2]))
    assert np.isnan(errors[3, 2])
    assert not errors[:, 0].any()
    np.testing.assert_array_equal(scores.known(), ~np.isnan(errors))


def test_known_needs_every_metric() -> None:
    """An entry that one metric lacks is not known."""
    scores = table(metrics=("content", "quality"))
    scores.vectors["quality"][0, 1] = np.nan
    assert not scores.known()[0, 1]
    assert scores.known()[1, 1]


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, dim=st.sampled_from([16, 64]), a=st.floats(-4, 4), b=st.floats(-4, 4))
def test_sketches_are_linear(seed: int, dim: int, a: float, b: float) -> None:
    """The sketch of a sum is the sum of the sketches, which is what lets them predict mixes."""
    x, y = np.random.default_rng(seed).standard_normal((2, 500))
    mixed = sketch(a * x + b * y, dim, seed)
    np.testing.assert_allclose(mixed, a * sketch(x, dim, seed) + b * sketch(y, dim, seed), atol=2e-4)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, size=st.integers(1, 64))
def test_short_vectors_stay_themselves(seed: int, size: int) -> None:
    """A vector that is no longer than the sketch is not changed at all."""
    x = np.random.default_rng(seed).standard_normal(size)
    np.testing.assert_array_equal(sketch(x, 64, 5), x.astype(np.float32))


def test_a_sketch_is_buckets_with_signs() -> None:
    """Every coordinate lands in exactly one bucket with sign +1 or -1, so a unit vector keeps its length exactly."""
    columns = np.stack([sketch(row, 32, 9) for row in np.eye(200)])
    assert (np.count_nonzero(columns, axis=1) == 1).all()
    assert set(np.abs(columns[columns != 0])) == {1.0}
    assert 0.3 < (columns.sum(1) > 0).mean() < 0.7


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_sketches_keep_lengths_and_angles(seed: int) -> None:
    """Squared lengths and inner products stay within five standard deviations, sqrt(2 / dim) and sqrt(1 / dim)."""
    dim = 1024
    x, y = np.random.default_rng(seed).standard_normal((2, 20_000))
    y = 0.6 * x + 0.8 * y
    small_x, small_y = (sketch(each, dim, seed).astype(np.float64) for each in (x, y))
    assert small_x @ small_x == pytest.approx(x @ x, rel=5 * np.sqrt(2 / dim))
    assert abs(small_x @ small_y - x @ y) < 5 * np.sqrt(2 / dim) * np.linalg.norm(x) * np.linalg.norm(y)


def test_sketches_are_right_on_average() -> None:
    """Over many seeds the mean squared length is the true one to within its standard error."""
    x = np.random.default_rng(0).standard_normal(300)
    found = [float((sketch(x, 32, seed).astype(np.float64) ** 2).sum()) for seed in range(600)]
    assert np.mean(found) == pytest.approx(x @ x, abs=4 * np.std(found) / np.sqrt(600))


def test_sketches_depend_on_the_seed_alone() -> None:
    """The same seed gives the same sketch, another seed another."""
    x = np.random.default_rng(0).standard_normal(300)
    np.testing.assert_array_equal(sketch(x, 32, 1), sketch(x.copy(), 32, 1))
    assert not np.array_equal(sketch(x, 32, 1), sketch(x, 32, 2))


def test_a_file_keeps_everything(tmp_path: Path) -> None:
    """Saved and loaded scores are the same, names, NaN and float32 included."""
    scores = table(metrics=("content", "quality"), method="probe")
    scores.save(tmp_path / "scores.npz")
    loaded = Scores.load(tmp_path / "scores.npz")
    assert same(loaded, scores)
    assert loaded.vectors["quality"].dtype == np.float32


def rewritten(path: Path, **changes: np.ndarray | None) -> None:
    """Exchange or drop entries of an .npz."""
    with np.load(path) as file:
        entries = {name: file[name] for name in file.files}
    entries |= {name.replace("__", ":"): value for name, value in changes.items()}
    np.savez(path, **{name: value for name, value in entries.items() if value is not None})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"units": None},
        {"method": np.array("guess")},
        {"choices": np.array(["fp32", "fp16", "int3"])},
        {"choices": np.array(["fp32", "fp16"])},
        {"units": np.array(["a", "b", "c", "a"])},
        {"vectors__content": np.zeros((4, 3), np.float32)},
        {"vectors__content": np.zeros((4, 3, 2), complex)},
        {"format": np.array(99)},
        {"format": np.array("one")},
        {"units": np.array(["a", None], dtype=object)},
    ],
    ids=str,
)
def test_damaged_files_are_refused(tmp_path: Path, changes: dict[str, np.ndarray | None]) -> None:
    """A file with a missing, strange, misshapen or pickled entry is refused with its name."""
    path = tmp_path / "scores.npz"
    table().save(path)
    rewritten(path, **changes)
    with pytest.raises(BadRequest, match=r"scores|format 99"):
        Scores.load(path)


@pytest.mark.parametrize("content", [None, b"", b"no zip", b"\x93NUMPY\x01\x00"])
def test_what_is_no_file_of_scores_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """A missing file, an empty one and other bytes are refused with the file's name."""
    path = tmp_path / "nothing.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadRequest, match=r"nothing\.npz"):
        Scores.load(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    """Half of a file is refused."""
    path = tmp_path / "half.npz"
    table(length=500).save(path)
    path.write_bytes(path.read_bytes()[:4000])
    assert not zipfile.is_zipfile(path)
    with pytest.raises(BadRequest, match=r"half\.npz"):
        Scores.load(path)


def test_merge_takes_what_was_measured() -> None:
    """Where the scan has an entry the merged error is the scan's, elsewhere the probe's on the scan's scale."""
    scan, probe = table(1), table(1, method="probe")
    probe.vectors["content"][...] *= 2  # probes four times too large in squares
    scan.vectors["content"][2, 1:] = np.nan
    merged = merge(probe, scan)
    assert merged.method == "probe+scan"
    truth = table(1).errors("content")
    np.testing.assert_allclose(merged.errors("content"), truth, rtol=1e-5)
    assert np.isnan(merged.errors("content")[3, 2])


def test_merge_scales_each_choice_by_its_own_median() -> None:
    """A choice's probes are scaled by the median ratio of that choice; one without overlap by the overall median."""
    probe, scan = table(2, method="probe"), table(2)
    scan.vectors["content"][:, 1] *= 3  # nine times the probes at fp16
    scan.vectors["content"][:, 2] = np.nan
    scan.vectors["content"][3, 1] = np.nan
    merged = merge(probe, scan).errors("content")
    alone = probe.errors("content")
    assert merged[3, 1] == pytest.approx(9 * alone[3, 1], rel=1e-5)
    np.testing.assert_allclose(merged[:3, 2], 9 * alone[:3, 2], rtol=1e-5)


def test_merge_keeps_the_cross_terms_within_a_kind() -> None:
    """Vectors of one kind keep their inner product, vectors of two kinds have none."""
    scan, probe = table(3), table(4, length=5, method="probe")
    scan.vectors["content"][2:] = np.nan
    merged = merge(probe, scan).vectors["content"].astype(np.float64)
    measured = scan.vectors["content"].astype(np.float64)
    assert merged[0, 1] @ merged[1, 2] == pytest.approx(measured[0, 1] @ measured[1, 2], rel=1e-5)
    assert merged[0, 1] @ merged[2, 1] == 0
    estimated = probe.vectors["content"].astype(np.float64)
    angle = merged[2, 1] @ merged[3, 1] / np.linalg.norm(merged[2, 1]) / np.linalg.norm(merged[3, 1])
    wanted = estimated[2, 1] @ estimated[3, 1] / np.linalg.norm(estimated[2, 1]) / np.linalg.norm(estimated[3, 1])
    assert angle == pytest.approx(wanted, rel=1e-5)


def test_merge_finds_units_and_choices_by_name() -> None:
    """A scan of some units in another order, with a choice the probes lack, lands where it belongs."""
    probe = table(5, method="probe")
    picked = Scores(("c", "a"), ("w8a8", "w4a16-32"), {"content": np.ones((2, 2, 4), np.float32)}, "scan")
    merged = merge(probe, picked)
    assert merged.units == UNITS
    assert merged.choices == (*CHOICES, "w4a16-32")
    errors = merged.errors("content")
    np.testing.assert_allclose(errors[[0, 2], 2], 4)
    np.testing.assert_allclose(errors[[0, 2], 3], 4)
    assert np.isnan(errors[1, 3])


def test_scores_of_different_graphs_are_not_merged() -> None:
    """Another unit or another metric is refused."""
    other = Scores(("z",), ("fp16",), {"content": np.zeros((1, 1, 2), np.float32)}, "scan")
    with pytest.raises(BadRequest, match="different graphs"):
        merge(table(), other)
    with pytest.raises(BadRequest, match="different graphs"):
        merge(table(), table(metrics=("kl",)))


def test_rank_correlation_counts_common_entries() -> None:
    """Equal tables correlate fully, reversed ones inversely; zeros and NaN are left out, units found by name."""
    scores = table(6)
    assert rank_correlation(scores, scores, "content") == pytest.approx(1)
    errors = scores.errors("content")
    inverse = np.zeros_like(scores.vectors["content"])
    inverse[..., 0] = 1 / np.sqrt(np.where(errors > 0, errors, np.nan))
    assert rank_correlation(scores, Scores(UNITS, CHOICES, {"content": inverse}, "probe"), "content") == pytest.approx(
        -1
    )
    order = [2, 0, 3, 1]
    moved = Scores(tuple(UNITS[i] for i in order), CHOICES, {"content": scores.vectors["content"][order]}, "probe")
    assert rank_correlation(scores, moved, "content") == pytest.approx(1)


def test_too_few_common_entries_say_nothing() -> None:
    """Fewer than three common entries, or an unknown metric, are refused."""
    few = table(7)
    few.vectors["content"][1:] = np.nan
    with pytest.raises(BadRequest, match="2 entries"):
        rank_correlation(few, table(7), "content")
    with pytest.raises(BadRequest, match="no scores for 'kl'"):
        rank_correlation(table(), table(), "kl")
    with pytest.raises(BadRequest, match="no scores for 'kl'"):
        table().errors("kl")


@pytest.mark.parametrize(
    ("units", "choices", "shape", "method"),
    [
        (("a",), ("fp32",), (1, 2, 3), "scan"),
        (("a",), ("fp32",), (1, 1), "scan"),
        (("a",), ("int3",), (1, 1, 3), "scan"),
        (("a",), ("fp32",), (1, 1, 3), "oracle"),
        (("a", "a"), ("fp32",), (2, 1, 3), "scan"),
    ],
)
def test_scores_are_checked_at_birth(
    units: tuple[str, ...], choices: tuple[str, ...], shape: tuple[int, ...], method: Method
) -> None:
    """Misshapen arrays, unknown choices or methods, and names given twice are refused."""
    with pytest.raises(BadRequest, match="scores"):
        Scores(units, choices, {"nsr": np.zeros(shape, np.float32)}, method)
