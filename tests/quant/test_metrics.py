"""Metrics: linear error vectors that add up, adjoints that pull back, and the measures that are only reported."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.ndimage
import scipy.special
import scipy.stats
from hypothesis import given, settings

from edgekit.bundle.manifest import TensorSpec
from edgekit.errors import BadRequest
from edgekit.quant import metrics
from edgekit.quant.metrics import CONTENT, KL, LANGUAGE_METRICS, NSR, OTHER_METRICS, PICTURE_METRICS, QUALITY, Metric
from edgekit.quant.workload import GraphWorkload, measure, reference_of
from edgekit.runtime.backends.fake import FakeSession

SHAPES = {
    "nsr": [(7,), (2, 5), (3, 4, 4)],
    "content": [(3, 16, 16), (2, 3, 19, 33), (1, 8, 8), (2, 4, 5)],
    "quality": [(3, 16, 16), (2, 3, 19, 33), (1, 16, 24)],
    "kl": [(5, 11), (2, 3, 7), (1, 2)],
}
CASES = [(metric, shape) for metric in (NSR, CONTENT, QUALITY, KL) for shape in SHAPES[metric.name]]
SEEDS = st.integers(0, 2**32 - 1)


def pair(shape: tuple[int, ...], seed: int = 0, size: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """A reference, and the same with an error of a given size."""
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal(shape)
    return reference, reference + size * rng.standard_normal(shape)


def energy(array: np.ndarray) -> float:
    return float((np.asarray(array, np.float64) ** 2).sum())


def averaged(array: np.ndarray) -> np.ndarray:
    """The low band as anyone would write it: every cell of an 8 x 8 grid becomes its mean."""
    low = np.empty_like(array, dtype=np.float64)
    height, width = array.shape[-2:]
    rows, columns = min(8, height), min(8, width)
    for row in range(rows):
        for column in range(columns):
            tall = slice(row * height // rows, (row + 1) * height // rows)
            wide = slice(column * width // columns, (column + 1) * width // columns)
            low[..., tall, wide] = array[..., tall, wide].mean((-2, -1), keepdims=True)
    return low


@pytest.mark.parametrize(("metric", "shape"), CASES)
def test_vectors_have_the_declared_length(metric: Metric, shape: tuple[int, ...]) -> None:
    """`dim` is the length of what `vector` gives, in float64, and `pull` gives the reference's shape."""
    reference, output = pair(shape)
    vector = metric.vector(reference.astype("f"), output.astype("f"))
    assert vector.shape == (metric.dim(reference),)
    assert vector.dtype == np.float64
    assert metric.pull(reference, vector).shape == shape


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, case=st.sampled_from(CASES))
def test_pull_is_the_adjoint_of_vector(seed: int, case: tuple[Metric, tuple[int, ...]]) -> None:
    """<vector(reference + e), v> = <e, pull(v)> for all e and v."""
    metric, shape = case
    reference, output = pair(shape, seed)
    v = np.random.default_rng(seed + 1).standard_normal(metric.dim(reference))
    left = metric.vector(reference, output) @ v
    right = ((output - reference) * metric.pull(reference, v)).sum()
    assert left == pytest.approx(right, rel=1e-9, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, case=st.sampled_from(CASES), a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_vectors_are_linear_in_the_error(seed: int, case: tuple[Metric, tuple[int, ...]], a: float, b: float) -> None:
    """The vector of a sum of errors is the sum of their vectors: what predicts mixes."""
    metric, shape = case
    reference, one = pair(shape, seed)
    other = reference + np.random.default_rng(seed + 2).standard_normal(shape)
    mixed = reference + a * (one - reference) + b * (other - reference)
    wanted = a * metric.vector(reference, one) + b * metric.vector(reference, other)
    np.testing.assert_allclose(metric.vector(reference, mixed), wanted, atol=1e-9)


@pytest.mark.parametrize("shape", [*SHAPES["content"], *SHAPES["quality"], (2, 3, 40, 23)])
def test_content_is_the_error_of_cell_means(shape: tuple[int, ...]) -> None:
    """Content equals the averaged error's energy over the averaged reference's, also where 8 does not divide a side."""
    reference, output = pair(shape)
    wanted = energy(averaged(output - reference)) / energy(averaged(reference))
    assert energy(CONTENT.vector(reference, output)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES["quality"])
def test_content_and_quality_add_up_to_the_whole(shape: tuple[int, ...]) -> None:
    """The two bands' error energies sum to the error's, since the low band is an orthogonal projection."""
    reference, output = pair(shape)
    low = averaged(reference)
    parts = energy(CONTENT.vector(reference, output)) * energy(low)
    parts += energy(QUALITY.vector(reference, output)) * energy(reference - low)
    assert parts == pytest.approx(energy(output - reference), rel=1e-12)


def test_bands_see_only_themselves() -> None:
    """A change of a cell's mean is no quality error, and texture with no mean in any cell is no content error."""
    reference, _ = pair((3, 32, 32))
    shifted = reference + np.kron(np.random.default_rng(1).standard_normal((8, 8)), np.ones((4, 4)))
    texture = reference + np.tile([[1.0, -1.0], [-1.0, 1.0]], (16, 16))
    assert energy(QUALITY.vector(reference, shifted)) < 1e-24
    assert energy(CONTENT.vector(reference, texture)) < 1e-24
    assert energy(CONTENT.vector(reference, shifted)) > 0.1
    assert energy(QUALITY.vector(reference, texture)) > 0.1


def test_nsr_is_noise_over_signal() -> None:
    """The plain ratio, in float64 from float32 arrays: an error of 1e-4 of the signal is 1e-8 to six digits."""
    reference = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert energy(NSR.vector(reference, reference.astype(np.float64) * 1.0001)) == pytest.approx(1e-8, rel=1e-6)


@pytest.mark.parametrize("factor", [1 / 255, 2.0, 1e4])
@pytest.mark.parametrize("metric", [NSR, *PICTURE_METRICS], ids=lambda metric: metric.name)
def test_errors_do_not_depend_on_the_scale_of_pictures(metric: Metric, factor: float) -> None:
    """Pictures in 0..255 and in 0..1 have the same errors, vectors and all."""
    reference, output = pair((3, 16, 24))
    wanted = metric.vector(reference, output)
    np.testing.assert_allclose(metric.vector(factor * reference, factor * output), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reference", [np.zeros((3, 16, 16)), np.ones((3, 16, 16))], ids=["black", "flat"])
@pytest.mark.parametrize("metric", [NSR, *PICTURE_METRICS], ids=lambda metric: metric.name)
def test_flat_references_give_finite_errors(metric: Metric, reference: np.ndarray) -> None:
    """A reference without a band to measure against gives a finite error, and none for itself."""
    vector = metric.vector(reference, reference + 0.1 * np.random.default_rng(0).standard_normal(reference.shape))
    assert np.isfinite(vector).all()
    assert energy(metric.vector(reference, reference)) == 0


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, size=st.sampled_from([1e-2, 1e-3, 1e-4]))
def test_kl_is_the_divergence_to_second_order(seed: int, size: float) -> None:
    """|vector|^2 differs from the true mean KL by a third-order term."""
    reference, output = pair((6, 20), seed, size)
    wanted = metrics.kl_mean(reference, output)
    assert energy(KL.vector(reference, output)) == pytest.approx(wanted, rel=10 * size, abs=1e-15)


def test_kl_does_not_see_a_shift_of_all_logits() -> None:
    """Adding one number to all logits of a token changes no probability, and no error."""
    reference, _ = pair((4, 9))
    assert energy(KL.vector(reference, reference + np.arange(4)[:, None])) < 1e-24


def test_kl_agrees_with_scipy() -> None:
    """Token divergences, their mean and their quantile are those of scipy's entropy."""
    reference, output = pair((50, 30), size=1.0)
    p, q = scipy.special.softmax(reference, -1), scipy.special.softmax(output, -1)
    wanted = scipy.stats.entropy(p, q, axis=-1)
    np.testing.assert_allclose(metrics.kl_tokens(reference, output), wanted, rtol=1e-9)
    assert metrics.kl_mean(reference, output) == pytest.approx(wanted.mean())
    assert metrics.kl_q99(reference, output) == pytest.approx(np.quantile(wanted, 0.99))


def test_large_logits_do_not_overflow() -> None:
    """Logits in the thousands, and -inf-like masks, give finite divergences and vectors."""
    reference = np.array([[3000.0, 0.0, -1e9], [5.0, 4.0, -1e9]])
    output = reference + np.array([[1.0, 0.0, 0.0], [0.5, 0.0, 0.0]])
    assert np.isfinite(metrics.kl_tokens(reference, output)).all()
    assert np.isfinite(KL.vector(reference, output)).all()


def test_agreement_and_perplexity_of_known_logits() -> None:
    """Half of the most likely tokens agree; a uniform guess among 8 has perplexity 8."""
    a = np.array([[1.0, 2.0], [2.0, 1.0]])
    b = np.array([[1.0, 2.0], [1.0, 2.0]])
    assert metrics.top1_agreement(a, b) == 0.5
    assert metrics.perplexity(np.zeros((5, 8)), np.arange(5)) == pytest.approx(8)
    logits = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]]))
    assert metrics.perplexity(logits, np.array([[1, 1]])) == pytest.approx(math.exp(-0.5 * math.log(0.25 * 0.8)))


@pytest.mark.parametrize("shape", [(16, 16), (3, 20, 31), (2, 3, 16, 16)])
def test_ssim_agrees_with_windows_written_out(shape: tuple[int, ...]) -> None:
    """Every 7 x 7 window's SSIM by the formula, averaged, equals the fast one."""
    reference, output = pair(shape, size=0.4)
    found = []
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    for top in range(shape[-2] - 6):
        for left in range(shape[-1] - 6):
            a, b = (each[..., top : top + 7, left : left + 7] for each in (reference, output))
            ma, mb = a.mean((-2, -1)), b.mean((-2, -1))
            va, vb = a.var((-2, -1)), b.var((-2, -1))
            both = ((a - ma[..., None, None]) * (b - mb[..., None, None])).mean((-2, -1))
            found.append((2 * ma * mb + c1) * (2 * both + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    assert metrics.ssim(reference, output, 2.0) == pytest.approx(np.mean(found), rel=1e-10)


def test_ssim_agrees_with_a_uniform_filter() -> None:
    """The windowed means are scipy's uniform filter, away from the border."""
    reference, output = pair((24, 24), size=0.3)
    means = [scipy.ndimage.uniform_filter(each, 7)[3:-3, 3:-3] for each in (reference, output)]
    squares = [scipy.ndimage.uniform_filter(each**2, 7)[3:-3, 3:-3] for each in (reference, output)]
    cross = scipy.ndimage.uniform_filter(reference * output, 7)[3:-3, 3:-3] - means[0] * means[1]
    spread = [square - mean**2 for square, mean in zip(squares, means, strict=True)]
    light = (2 * means[0] * means[1] + 1e-4) / (means[0] ** 2 + means[1] ** 2 + 1e-4)
    wanted = light * (2 * cross + 9e-4) / (spread[0] + spread[1] + 9e-4)
    assert metrics.ssim(reference, output, 1.0) == pytest.approx(wanted.mean(), rel=1e-9)


@pytest.mark.parametrize("window", [7, None])
def test_ssim_is_one_for_the_same_and_small_errors_are_seen(window: int | None) -> None:
    """Equal pictures give 1, and an error of 1e-5 still moves it, which float32 would not show."""
    reference = np.random.default_rng(0).random((3, 32, 32)).astype(np.float32)
    assert metrics.ssim(reference, reference, 1.0, window) == pytest.approx(1, abs=1e-14)
    rng = np.random.default_rng(1)
    lost = [
        1 - metrics.ssim(reference, reference + size * rng.standard_normal(reference.shape), 1.0, window)
        for size in (1e-5, 1e-4)
    ]
    assert 1e-12 < lost[0] < 1e-8
    assert lost[1] == pytest.approx(100 * lost[0], rel=0.2)


def test_psnr_of_a_known_error() -> None:
    """An error of a tenth of the range everywhere is 20 dB, none at all is infinite."""
    reference = np.zeros((3, 4, 4))
    assert metrics.psnr_db(reference, reference + 0.1, 1.0) == pytest.approx(20)
    assert metrics.psnr_db(reference, reference + 25.5, 255) == pytest.approx(20)
    assert metrics.psnr_db(reference, reference, 1.0) == math.inf


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=30))
def test_spearman_agrees_with_scipy(values: list[tuple[int, int]]) -> None:
    """Rank correlation equals scipy's, ties included; of a constant list it is NaN."""
    a, b = (np.array(each) for each in zip(*values, strict=True))
    ours = metrics.spearman(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(ours)
    else:
        assert ours == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)


def test_the_fitting_metrics_are_picked() -> None:
    """Pictures get content and quality, small or flat arrays and texts the plain ratio, logits the divergence."""
    picture, sound, small = np.zeros((1, 3, 64, 64)), np.zeros((2, 4000)), np.zeros((1, 4, 8, 64))
    video, text = np.zeros((1, 4, 3, 32, 32)), np.zeros((2, 77, 768))
    assert metrics.metrics_for([video]) == PICTURE_METRICS
    assert metrics.metrics_for([text]) == metrics.metrics_for([picture, text]) == OTHER_METRICS
    assert metrics.metrics_for([picture, np.zeros((1, 4, 16, 16))]) == PICTURE_METRICS
    assert metrics.metrics_for([picture, small]) == OTHER_METRICS
    assert metrics.metrics_for([sound]) == OTHER_METRICS
    assert metrics.metrics_for([np.zeros((256, 1000))], logits=True) == LANGUAGE_METRICS
    assert [metric.name for metric in (*PICTURE_METRICS, *OTHER_METRICS, *LANGUAGE_METRICS)] == [
        "content",
        "quality",
        "nsr",
        "kl",
    ]


def test_errors_are_means_over_requests() -> None:
    """A metric's value is the mean of its requests' errors, whatever their shapes."""
    pairs = [pair((3, 16, 16), 1), pair((3, 24, 16), 2, 0.5)]
    found = metrics.errors(PICTURE_METRICS, [a for a, _ in pairs], [b for _, b in pairs])
    assert found["content"] == pytest.approx(np.mean([energy(CONTENT.vector(*each)) for each in pairs]))
    assert found["quality"] == pytest.approx(np.mean([energy(QUALITY.vector(*each)) for each in pairs]))


def test_a_workload_measures_against_its_own_graph() -> None:
    """A graph's workload answers with what takes its graph's place, and `measure` is the mean over requests."""
    spec = TensorSpec("x", "float32", ("n",)), TensorSpec("y", "float32", ("n",))
    plain = FakeSession(lambda fed: {"y": fed["x"] * 2}, spec[:1], spec[1:])
    changed = FakeSession(lambda fed: {"y": fed["x"] * 2.2}, spec[:1], spec[1:])
    given = [{"x": np.arange(1, 5, dtype=np.float32)}, {"x": np.ones(3, np.float32)}]
    work = GraphWorkload("net", plain, given, "y", (NSR,))
    references = reference_of(work)
    np.testing.assert_array_equal(references[0], [2, 4, 6, 8])
    assert measure(work, references, {}) == {"nsr": 0}
    assert measure(work, references, {"other": changed}) == {"nsr": 0}
    assert measure(work, references, {"net": changed})["nsr"] == pytest.approx(0.01, rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_workload_that_is_broken_is_no_reference(bad: float) -> None:
    """A reference that is not finite, or no request at all, is refused before anything is measured."""
    spec = TensorSpec("x", "float32", ("n",)), TensorSpec("y", "float32", ("n",))
    session = FakeSession(lambda fed: {"y": np.where(fed["x"] > 1, np.float32(bad), fed["x"])}, spec[:1], spec[1:])
    given = [{"x": np.ones(3, np.float32)}, {"x": np.full(3, 2, np.float32)}]
    with pytest.raises(BadRequest, match=r"requests \[1\] give infinite"):
        reference_of(GraphWorkload("net", session, given, "y", (NSR,)))
    with pytest.raises(BadRequest, match="without requests"):
        reference_of(GraphWorkload("net", session, [], "y", (NSR,)))


def test_metrics_are_found_by_name() -> None:
    """Every metric is found by the name that plans and reports write, and no other name is."""
    for metric in (*PICTURE_METRICS, *OTHER_METRICS, *LANGUAGE_METRICS):
        assert metrics.metric_called(metric.name) is metric
    with pytest.raises(BadRequest, match="no metric 'fid'"):
        metrics.metric_called("fid")


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_probes_by_the_adjoint_estimate_the_error(seed: int) -> None:
    """For random signs v the mean of <pull(v), e>^2 is the error: what a gradient probe relies on (Hutchinson 1990)."""
    reference, output = pair((1, 16, 16), seed)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (400, QUALITY.dim(reference)))
    found = [((output - reference) * QUALITY.pull(reference, v)).sum() ** 2 for v in signs]
    wanted = energy(QUALITY.vector(reference, output))
    assert np.mean(found) == pytest.approx(wanted, rel=6 * np.sqrt(2 / 400))


def test_what_cannot_be_compared_is_refused() -> None:
    """Other shapes, other numbers of outputs, and windows larger than the picture are refused by name."""
    a, b = np.zeros((3, 16, 16)), np.zeros((3, 16, 17))
    for metric in (NSR, CONTENT, QUALITY, KL):
        with pytest.raises(BadRequest, match=r"shape \(3, 16, 17\)"):
            metric.vector(a, b)
    with pytest.raises(BadRequest, match="0 outputs"):
        metrics.errors(PICTURE_METRICS, [], [])
    with pytest.raises(BadRequest, match="1 outputs to be measured against 2"):
        metrics.errors(PICTURE_METRICS, [a, a], [a])
    with pytest.raises(BadRequest, match="window of 33"):
        metrics.ssim(a, a, 1.0, 33)


def test_small_pictures_have_a_cell_per_pixel() -> None:
    """A side shorter than the grid has cells of one pixel, so all of the error is content and none is quality."""
    reference, output = pair((2, 4, 5))
    assert energy(CONTENT.vector(reference, output)) == pytest.approx(energy(output - reference) / energy(reference))
    assert energy(QUALITY.vector(reference, output)) < 1e-20
