"""Sampling: transformers' filters, the exact distribution, and noise that depends on its address alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import BadRequest, SessionFailed
from edgekit.runtime.llm.probs import Sampling, gumbel, penalize, survivors, uniforms
from edgekit.runtime.random import philox_u32, philox_uniform


def row(seed: int, size: int = 500, spread: float = 4.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=size) * spread).astype(np.float32)


@pytest.mark.torch
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 20},
        {"top_p": 0.9},
        {"top_p": 0.3},
        {"min_p": 0.05},
        {"top_k": 40, "top_p": 0.8},
        {"top_k": 50, "top_p": 0.95, "min_p": 0.1},
        {"top_p": 0.999, "min_p": 0.01},
    ],
)
def test_filters_are_those_of_transformers(seed, temperature, filters):
    """The same tokens survive as in the processors that transformers' `generate` builds from the same settings."""
    torch = pytest.importorskip("torch")
    from transformers import GenerationConfig, GenerationMixin

    config = GenerationConfig(do_sample=True, temperature=temperature, **{"top_k": 0, "top_p": 1.0, **filters})
    config._eos_token_tensor = None
    mixin = type("Mixin", (GenerationMixin,), {"config": None})()
    warpers = mixin._get_logits_processor(config)
    logits = row(seed)
    scores = warpers(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(logits)[None])[0].numpy()
    mine = survivors(logits / np.float32(temperature), **filters)
    assert mine.tolist() == np.flatnonzero(np.isfinite(scores)).tolist()


@pytest.mark.torch
@pytest.mark.parametrize("penalty", [0.8, 1.0, 1.3])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    """Every token of the text counts once, however often it occurs; the given row is left alone."""
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, context = row(1), (3, 7, 7, 400, 3)
    before = logits.copy()
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([context]), torch.from_numpy(logits.copy())[None])
    np.testing.assert_array_equal(penalize(logits, context, penalty), theirs[0].numpy())
    np.testing.assert_array_equal(logits, before)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.floats(0.01, 0.999), st.sampled_from([0.3, 4.0, 40.0]))
def test_the_nucleus_is_the_smallest_that_suffices(seed, top_p, spread):
    """Found by looking near the best first, equal to sorting everything; flat and peaked rows alike."""
    scores = row(seed, 300, spread)
    probs = np.exp(scores.astype(np.float64) - scores.max())
    order = np.argsort(-probs, kind="stable")
    sums = np.cumsum(probs[order]) / probs.sum()
    size = int(np.argmax(sums >= top_p)) + 1
    margin = np.abs(sums[max(0, size - 2) : size] - top_p).min()
    if margin > 1e-6:  # float32 weights cannot tell closer ones apart
        assert survivors(scores, top_p=top_p).tolist() == sorted(order[:size].tolist())


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.8}])
def test_draws_have_the_distribution_they_should(filters):
    """5,000 draws from one row: frequencies within five standard errors of the filtered softmax, nothing else drawn."""
    logits = np.array([2.0, 1.5, 1.0, 0.2, -0.5, -1.0, 0.0], np.float32)
    sampling = Sampling(temperature=0.8, seed=5, **filters)
    kept = survivors(logits / np.float32(0.8), **filters)
    expected = np.zeros(len(logits))
    expected[kept] = np.exp(logits[kept] / 0.8)
    expected /= expected.sum()
    count = 5_000
    # The context's content does not matter, its length is the position.
    positions = [(0,) * length for length in range(200)]
    drawn = [
        Sampling(temperature=0.8, seed=seed, **filters)(logits, context)
        for seed in range(count // len(positions))
        for context in positions
    ]
    assert sampling(logits, positions[3]) == sampling(logits, (1, 2, 3))
    found = np.bincount(drawn, minlength=len(logits)) / count
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / count)).all()


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31), st.sets(st.integers(0, 4000), min_size=1, max_size=40))
def test_noise_has_an_address(seed, position, tokens):
    """A token's noise is the documented function of (seed, position, token): not of which others are drawn with it."""
    ids = np.array(sorted(tokens))
    uniform = philox_uniform((4001,), seed, draw=position)
    expected = -np.log(-np.log(uniform[ids]))
    np.testing.assert_array_equal(gumbel(ids, seed, position), expected)
    np.testing.assert_array_equal(gumbel(np.arange(4001), seed, position)[ids], expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(0, 99), st.sampled_from([0.3, 1.0, 30.0]))
def test_leaving_out_hopeless_tokens_changes_no_draw(seed, length, spread):
    """Tokens that no noise could save are not drawn; the result is that of noise on every token."""
    logits = row(seed, 3000, spread)
    noisy = logits.astype(np.float64) + gumbel(np.arange(3000), seed, length)
    assert Sampling(temperature=1.0, seed=seed)(logits, (0,) * length) == noisy.argmax()


@pytest.mark.parametrize("vocabulary", [2048, 2049, 40_001])
@pytest.mark.parametrize("spread", [0.0, 0.3, 4.0, 300.0])
@pytest.mark.parametrize("shift", [0.0, -3e4])
def test_bounded_noise_changes_no_draw(vocabulary, spread, shift):
    """Large vocabularies get bounds first, span by span: flat or steep, far from zero, with tokens shut out or tied."""
    for seed in range(6):
        logits = (row(seed, vocabulary, spread) + shift).astype(np.float32)
        logits[np.random.default_rng(seed).integers(0, vocabulary, 50)] = -np.inf
        temperature = (0.05, 0.7, 1.9)[seed % 3]
        noisy = (logits / np.float32(temperature)).astype(np.float64) + gumbel(np.arange(vocabulary), seed, 7)
        assert Sampling(temperature=temperature, seed=seed)(logits, (0,) * 7) == noisy.argmax()


def test_drawing_writes_to_nothing_shared():
    """The list of all tokens is shared by every draw, so it cannot be written to."""
    with pytest.raises(ValueError, match="read-only"):
        survivors(row(0))[0] = 1


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 999),
    st.sampled_from([0.4, 1.0, 1.7]),
    st.sampled_from([{}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 30, "top_p": 0.9, "min_p": 0.01}]),
    st.sampled_from([1.0, 1.4]),
)
def test_the_law_is_the_softmax_of_what_the_filters_leave(seed, temperature, filters, penalty):
    """In float64: penalty, then temperature, then the filters, and nothing else has any mass."""
    logits, context = row(seed, 200), (3, 9, 9, 150)
    law = Sampling(temperature=temperature, repetition_penalty=penalty, seed=seed, **filters).law(logits, context)
    scores = penalize(logits, context, penalty) / np.float32(temperature)
    kept = survivors(scores, **filters)
    weights = np.exp(scores[kept].astype(np.float64))
    assert law.dtype == np.float64
    assert np.flatnonzero(law).tolist() == kept.tolist()
    np.testing.assert_allclose(law[kept], weights / weights.sum(), rtol=1e-12)
    assert law.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}])
def test_draws_over_seeds_follow_the_law(filters):
    """Pearson's statistic of 3,000 draws over seeds is within four standard deviations of its mean."""
    logits, context = row(3, 8, 1.0), (5, 5)
    law = Sampling(temperature=0.9, repetition_penalty=1.2, **filters).law(logits, context)
    draws = [Sampling(0.9, repetition_penalty=1.2, seed=seed, **filters)(logits, context) for seed in range(3000)]
    found = np.bincount(draws, minlength=len(law))
    assert not found[law == 0].any()
    expected, freedom = 3000 * law[law > 0], (law > 0).sum() - 1
    statistic = ((found[law > 0] - expected) ** 2 / expected).sum()
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom) + 1


def test_the_greedy_law_is_certain():
    """One token has it all, the first of the best, whatever the filters; the penalty counts."""
    logits = np.array([0.0, 3.0, 1.0, 3.0], np.float32)
    assert Sampling(top_k=2, top_p=0.5).law(logits, (0,)).tolist() == [0, 1, 0, 0]
    assert Sampling(repetition_penalty=1.5).law(logits, (1,)).tolist() == [0, 0, 0, 1]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31), st.integers(1, 9))
def test_uniforms_have_an_address(seed, position, count):
    """Number k is the documented function of words 2k and 2k + 1 of stream 1, however many are asked for."""
    words = philox_u32((2 * count,), seed, draw=position, stream=1).tolist()
    expected = [((words[2 * k] >> 5) * 2**26 + (words[2 * k + 1] >> 6)) / 2**53 for k in range(count)]
    assert uniforms(count, seed, position).tolist() == expected
    assert uniforms(count + 3, seed, position)[:count].tolist() == expected


def test_greedy_is_the_largest_and_of_equals_the_first():
    """Temperature 0 has no noise, whatever the filters and the seed."""
    logits = np.array([0.0, 3.0, 1.0, 3.0], np.float32)
    assert {Sampling(seed=s, top_k=2, top_p=0.5)(logits, (1,) * s) for s in range(5)} == {1}


def test_the_penalty_reaches_the_greedy_choice():
    """A token already in the text loses to the runner-up."""
    logits = np.array([1.0, 3.0, 2.5], np.float32)
    assert Sampling(repetition_penalty=1.5)(logits, (1,)) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(bad):
    """An overflowed model is reported, not sampled from."""
    with pytest.raises(SessionFailed, match="overflowed"):
        Sampling()(np.array([0.0, bad, 1.0], np.float32), (1,))
    with pytest.raises(SessionFailed, match="overflowed"):
        Sampling(temperature=1.0).law(np.array([0.0, bad, 1.0], np.float32), (1,))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_options_out_of_range_are_named(name, value):
    """Refused at birth, with the name and the range."""
    with pytest.raises(BadRequest, match=f"{name} is .*must be"):
        Sampling(**{name: value})
