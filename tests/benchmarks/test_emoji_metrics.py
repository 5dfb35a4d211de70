"""`benchmarks/emoji_metrics.py`: figures whose value is known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.emoji_metrics import (
    F32,
    F64,
    Gallery,
    Gaussian,
    by_prompt,
    frechet,
    psnr,
    recall,
    squared_error,
)


def pictures(count: int, side: int = 8, seed: int = 0) -> F32:
    """Random pictures."""
    return np.random.default_rng(seed).uniform(-1, 1, (count, 3, side, side)).astype(np.float32)


def covariance(size: int, seed: int) -> F64:
    """A random one of full rank."""
    root = np.random.default_rng(seed).normal(size=(size, size))
    return root @ root.T + 0.1 * np.eye(size)


def rotation(size: int, seed: int) -> F64:
    """A random orthogonal matrix."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def test_shuffled_copies_are_found() -> None:
    """Copies in another order, slightly changed, are each nearest to their original."""
    known, order = pictures(20), np.random.default_rng(1).permutation(20)
    copies = known[order] + 0.05 * pictures(20, seed=2)
    nearest = Gallery(known).nearest(copies)
    assert nearest.tolist() == order.tolist()
    assert recall(nearest, order) == 1.0


def test_recall_is_a_share() -> None:
    """Of four pictures asked for, the two that came count a half."""
    known = pictures(4)
    assert recall(Gallery(known).nearest(known[[0, 1, 3, 2]]), [0, 1, 2, 3]) == 0.5


def test_one_of_equal_pictures_is_named() -> None:
    """Where two pictures are the same, the first is the nearest."""
    known = np.repeat(pictures(1), 3, axis=0)
    assert Gallery(known).nearest(known).tolist() == [0, 0, 0]


def test_nearest_is_by_squared_error() -> None:
    """The nearest is the picture of the smallest error, not of the smallest largest difference or the largest size."""
    known, made = pictures(30), pictures(12, seed=3)
    least = [int(np.argmin([squared_error(one[None], other)[0] for other in known])) for one in made]
    assert Gallery(known).nearest(made).tolist() == least


def test_squared_error_of_a_constant_difference() -> None:
    """A difference of d everywhere is an error of d squared, for one wanted picture and for many."""
    wanted = np.zeros((2, 3, 4, 4), np.float32)
    made = np.stack([np.full((3, 4, 4), 0.5, np.float32), np.full((3, 4, 4), -1.0, np.float32)])
    assert squared_error(made, wanted).tolist() == [0.25, 1.0]
    assert squared_error(made, wanted[0]).tolist() == [0.25, 1.0]


@pytest.mark.parametrize(("error", "decibels"), [(4.0, 0.0), (0.04, 20.0), (0.0, math.inf)])
def test_decibels(error: float, decibels: float) -> None:
    """The whole range wrong is 0 dB, a hundredth of it in power 20, nothing wrong infinite."""
    assert psnr(error) == pytest.approx(decibels)


def test_distance_of_two_normals_on_a_line() -> None:
    """In one dimension it is (m - m')^2 + (s - s')^2."""
    one, other = Gaussian(np.array([1.0]), np.array([[4.0]])), Gaussian(np.array([-2.0]), np.array([[25.0]]))
    assert frechet(one, other) == pytest.approx(3**2 + (2 - 5) ** 2)


def test_distance_where_axes_are_shared() -> None:
    """Covariances with common axes, turned together, are as far apart as their deviations are, axis by axis."""
    turn, s, other_s = rotation(5, 0), np.arange(1.0, 6.0), np.array([2.0, 2.0, 0.5, 7.0, 0.0])
    one = Gaussian(np.zeros(5), turn @ np.diag(s**2) @ turn.T)
    other = Gaussian(np.full(5, 3.0), turn @ np.diag(other_s**2) @ turn.T)
    assert frechet(one, other) == pytest.approx(5 * 9 + np.square(s - other_s).sum())


def test_distance_of_crossed_covariances() -> None:
    """Where covariances share no axes, the trace of (C C')^(1/2) is the sum of the roots of C C''s eigenvalues."""
    one, other = Gaussian(np.zeros(4), covariance(4, 1)), Gaussian(np.ones(4), covariance(4, 2))
    roots = np.sqrt(np.linalg.eigvals(one.covariance @ other.covariance).real).sum()
    expected = 4 + np.trace(one.covariance) + np.trace(other.covariance) - 2 * roots
    assert frechet(one, other) == pytest.approx(expected)


def test_distance_is_symmetric_and_zero_to_itself() -> None:
    """It does not matter which comes first, and a distribution is at no distance from itself."""
    one, other = Gaussian(np.zeros(6), covariance(6, 3)), Gaussian(np.ones(6), covariance(6, 4))
    assert frechet(one, other) == pytest.approx(frechet(other, one))
    assert frechet(one, one) == pytest.approx(0, abs=1e-9)


def test_distance_of_flat_sets() -> None:
    """Fewer pictures than features, so that covariances have no inverse, are no trouble."""
    rows = np.random.default_rng(5).normal(size=(4, 10))
    assert frechet(Gaussian.of(rows), Gaussian.of(rows + 2)) == pytest.approx(10 * 4)


def test_a_normal_is_fitted() -> None:
    """Mean and unbiased covariance of a handful of points, worked out by hand."""
    fitted = Gaussian.of(np.array([[0.0, 0.0], [2.0, 0.0], [1.0, 3.0]]))
    assert fitted.mean.tolist() == [1.0, 1.0]
    assert fitted.covariance == pytest.approx(np.array([[1.0, 0.0], [0.0, 3.0]]))


def test_fitted_normals_come_near_the_true_distance() -> None:
    """Samples of two normals are about as far apart as the normals."""
    rng = np.random.default_rng(6)
    drawn = rng.normal(size=(20_000, 3)), 1 + 2 * rng.normal(size=(20_000, 3))
    assert frechet(*(Gaussian.of(rows) for rows in drawn)) == pytest.approx(3 * (1 + 1), rel=0.05)


def test_error_of_a_mean_is_over_prompts() -> None:
    """Samples that repeat each other within a prompt make the mean no surer."""
    once = np.array([[1.0], [0.0], [1.0], [0.0]])
    often = by_prompt(np.repeat(once, 50, axis=1))
    assert often == by_prompt(once)
    assert often == {"mean": 0.5, "stderr": pytest.approx(math.sqrt(1 / 3) / 2, abs=1e-5), "prompts": 4}
