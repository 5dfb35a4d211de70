"""Renoising and the absorbing posterior: against slow twins, and against the laws they must draw from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgekit.errors import BadRequest
from edgekit.runtime.diffusion.tokens import discrete_posterior, masked_tokens, random_tokens, renoise_tokens
from edgekit.runtime.random import PhiloxNoise, Purpose, softmax
from tests.runtime.diffusion.test_tokens import LENGTH, MASK, VALUES, Plain, far, last, masks, net

STRATEGIES = (None, "cap", "rescale", "confidence", "loop")


@pytest.mark.parametrize("renoise_steps", [None, 5, 2, 0])
def test_renoising_is_paellas_loop(renoise_steps: int | None) -> None:
    """Token by token: draw at the row's temperature, then put the initial token back where u <= t of the next row."""
    noise, times = PhiloxNoise(9), []
    start = random_tokens((1, LENGTH), VALUES, noise)

    def answer(tokens: np.ndarray, t: float) -> np.ndarray:
        times.append(t)
        return net(tokens, t)

    rows = renoise_tokens(start, answer, noise, steps=5, temperature=(1.0, 0.2), renoise_steps=renoise_steps)
    state = start.copy()
    for i, (after, clean) in enumerate(rows):
        p = softmax(net(state, times[i]) / np.float32(1 - 0.2 * i))
        u, coin = (noise.uniform(s, 1 + i, w) for s, w in ((p.shape, Purpose.TOKEN), ((1, LENGTH), Purpose.ACCEPT)))
        for k in range(LENGTH):
            drawn = int(np.argmax(p[0, k] / -np.log(u[0, k])))
            assert clean[0, k] == drawn
            back = i < (4 if renoise_steps is None else renoise_steps) and coin[0, k] <= 1 - (i + 1) / 5
            state[0, k] = start[0, k] if back else drawn
        assert np.array_equal(after, state)
    assert np.allclose(times, [1, 0.8, 0.6, 0.4, 0.2])


def slow_posterior(start: np.ndarray, noise: PhiloxNoise, steps: int, remask: str | None, eta: float) -> Any:
    """ReMDM's equations element by element: q for a masked token, q for a decided one, psi kept in a dictionary."""

    def alpha(t: float) -> float:
        if remask != "loop":
            return 1 - t
        return float(np.interp(t, [0, 0.05, 0.55, 1], [1, 0.9, 0.9, 0]))

    state, given, psi = start.copy()[0], start[0] != MASK, {}
    for i in range(steps):
        t, s = 1 - i / steps, 1 - (i + 1) / steps
        a, b = alpha(t), alpha(s)
        top = min(1, (1 - b) / a) if a else 1.0
        p = softmax(net(state[None], t).astype(np.float64))[0]
        coin = noise.uniform((1, LENGTH), 1 + i, Purpose.ACCEPT)[0]
        u = noise.uniform((1, LENGTH, VALUES), 1 + i, Purpose.TOKEN)[0]
        weight = {k: np.exp(-value) for k, value in psi.items()}
        flat = {None: 0, "cap": min(eta, top), "rescale": eta * top, "loop": min(eta, top) * (0.05 < t <= 0.55)}
        for k, token in enumerate(state.copy()):
            own = eta * top * weight.get(k, 0) / sum(weight.values() or [1])
            sigma = own if remask == "confidence" else flat[remask]
            stays_masked = (1 - b - sigma * a) / (1 - a)
            drawn = int(np.argmax(p[k] / -np.log(u[k])))
            if token == MASK and coin[k] >= 1 - stays_masked:
                continue
            if token == MASK:
                state[k], psi[k] = drawn, p[k, drawn]
            elif not given[k] and coin[k] < sigma:
                state[k] = MASK
                psi.pop(k)
        yield state[None].copy()


@pytest.mark.parametrize("remask", STRATEGIES)
@pytest.mark.parametrize(("seed", "known", "steps", "eta"), [(4, 0, 21, 0.3), (5, 7, 43, 0.1), (6, 0, 60, 1.0)])
def test_the_posterior_is_the_papers(remask: Any, seed: int, known: int, steps: int, eta: float) -> None:
    """Every strategy against its equations, written out token by token, after every row."""
    start = masks(1)
    start[:, :known] = 3
    settings = {"mask_id": MASK, "steps": steps, "remask": remask, "eta": eta}
    rows = discrete_posterior(start, net, PhiloxNoise(seed), **settings)
    for (state, _), wanted in zip(rows, slow_posterior(start, PhiloxNoise(seed), steps, remask, eta), strict=True):
        assert np.array_equal(state, wanted)


@pytest.mark.parametrize("remask", [None, "cap", "rescale", "loop"])
def test_remasking_keeps_the_marginals(remask: Any) -> None:
    """Of independent tokens, each follows its law at the end and a share alpha of them is clean at every time."""
    draws, logits = 20_000, 1.5 * np.random.default_rng(2).standard_normal((3, 5)).astype(np.float32)
    fixed = lambda tokens, t: np.broadcast_to(logits, (len(tokens), 3, 5))  # noqa: E731
    rows = discrete_posterior(masks(draws, 3), fixed, Plain(6), mask_id=MASK, steps=10, remask=remask, eta=0.2)
    for i, (state, _) in enumerate(rows):
        s = 0.9 - i / 10
        alpha = np.interp(s, [0, 0.05, 0.55, 1], [1, 0.9, 0.9, 0]) if remask == "loop" else 1 - s
        assert abs((state != MASK).mean() - alpha) < 6 * np.sqrt(0.25 / (3 * draws))
    for place in range(3):
        assert far(np.bincount(state[:, place], minlength=5), softmax(logits[place].astype(np.float64))) < 1


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_posterior_of_a_pair_is_exact(steps: int) -> None:
    """Two dependent tokens are revealed in one row in 1/K of the cases, and then drawn apart; else from their law."""
    law = np.random.default_rng(8).dirichlet(np.full(9, 0.4)).reshape(3, 3)

    def exact(tokens: np.ndarray, t: float) -> np.ndarray:
        left = np.vstack([law.T, law.sum(1)])[np.minimum(tokens[:, 1], 3)]
        right = np.vstack([law, law.sum(0)])[np.minimum(tokens[:, 0], 3)]
        return np.log(np.stack([left, right], 1)).astype(np.float32)

    pairs = last(discrete_posterior(masks(40_000, 2), exact, Plain(3), mask_id=MASK, steps=steps))
    counts = np.bincount(pairs @ [3, 1], minlength=9)
    apart = np.outer(law.sum(1), law.sum(0))
    assert far(counts, ((1 - 1 / steps) * law + apart / steps).ravel()) < 1
    assert far(counts, law.ravel()) > 1


def test_a_time_above_zero_ends_in_the_likeliest_tokens() -> None:
    """What is masked after the last row is filled by one more call, and the mask's own logit is never used."""
    times: list[float] = []

    def answer(tokens: np.ndarray, t: float) -> np.ndarray:
        times.append(t)
        return np.concatenate([net(tokens, t), np.full((*tokens.shape, 1), 99, np.float32)], -1)

    *_, (before, _), (filled, _) = discrete_posterior(
        masks(), answer, PhiloxNoise(2), mask_id=MASK, steps=3, times=(1.0, 0.4)
    )
    assert np.allclose(times, [1, 0.8, 0.6, 0.4])
    assert (before == MASK).any()
    assert np.array_equal(filled, np.where(before == MASK, net(before, 0.4).argmax(-1), before))


# ------------------------------------------------------------------------------------------------ all of them

KERNELS: dict[str, Callable[[int, Any], Any]] = {
    "masked": lambda batch, noise: masked_tokens(masks(batch), net, noise, mask_id=MASK, steps=4),
    "renoise": lambda batch, noise: renoise_tokens(random_tokens((batch, LENGTH), VALUES, noise), net, noise, steps=4),
    **{
        f"posterior {remask}": lambda batch, noise, remask=remask: discrete_posterior(
            masks(batch), net, noise, mask_id=MASK, steps=6, remask=remask, eta=0.3
        )
        for remask in STRATEGIES
    },
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_image_is_the_same_alone_and_in_a_batch(kernel: str) -> None:
    """Image 2 of a batch is the batch of one that starts at 2, after every row; its neighbours are others."""
    together, alone = (list(KERNELS[kernel](n, PhiloxNoise(8, first))) for n, first in ((3, 0), (1, 2)))
    for (state, clean), (one, one_clean) in zip(together, alone, strict=True):
        assert np.array_equal(state[2:], one)
        assert np.array_equal(clean[2:], one_clean)
    assert not np.array_equal(state[0], state[2])


@pytest.mark.parametrize(
    ("kernel", "change", "words"),
    [
        (masked_tokens, {"steps": (3, 3)}, "steps"),
        (masked_tokens, {"steps": 0}, "steps"),
        (masked_tokens, {"span": 5}, "divisor of the 48"),
        (masked_tokens, {"schedule": "cubic"}, "schedule"),
        (masked_tokens, {"temperature": (-1, 0)}, "temperature"),
        (masked_tokens, {"choice_temperature": (0, -1)}, "choice_temperature"),
        (masked_tokens, {"start_share": 0}, "start_share"),
        (masked_tokens, {"top_p": 1.5}, "top_p"),
        (masked_tokens, {"top_k": -1}, "top_k"),
        (renoise_tokens, {"times": (0, 1)}, "times"),
        (renoise_tokens, {"renoise_steps": 5}, "renoise_steps"),
        (discrete_posterior, {"remask": "dice"}, "remask"),
        (discrete_posterior, {"eta": 2}, "eta"),
        (discrete_posterior, {"t_on": 0.01}, "t_on"),
        (discrete_posterior, {"alpha_on": 1}, "alpha_on"),
        (discrete_posterior, {"temperature": 0}, "temperature"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(kernel: Any, change: dict[str, Any], words: str) -> None:
    """At the call, before any row."""
    settings = {"steps": 4} if kernel is renoise_tokens else {"steps": 4, "mask_id": MASK}
    with pytest.raises(BadRequest, match=words):
        kernel(masks(), net, PhiloxNoise(0), **{**settings, **change})
