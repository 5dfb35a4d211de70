"""Autoregression by blocks and in parallel: exact laws of toy chains, slow twins, and what the network is handed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgekit.errors import BadRequest
from edgekit.runtime.diffusion.blocks import ar_blocks, jacobi_tokens
from edgekit.runtime.random import PhiloxNoise, Purpose, softmax
from tests.runtime.diffusion.test_tokens import Plain, far

VALUES, LENGTH = 4, 4
CHAIN = 1.2 * np.random.default_rng(0).standard_normal((VALUES + 1, VALUES)).astype(np.float32)  # last row: the start
START = VALUES


def chain_law(length: int = LENGTH, laws: np.ndarray | None = None) -> np.ndarray:
    """The probability of every sequence of the Markov chain, by running through them all."""
    p = softmax(CHAIN.astype(np.float64)) if laws is None else laws
    law = np.zeros((VALUES,) * length)
    for sequence in np.ndindex(*law.shape):
        law[sequence] = np.prod([p[before, now] for before, now in zip((START, *sequence), sequence, strict=False)])
    return law


def counted(tokens: np.ndarray) -> np.ndarray:
    """How often every sequence was drawn."""
    counts = np.zeros((VALUES,) * tokens.shape[1])
    np.add.at(counts, tuple(tokens.T), 1)
    return counts


def last(rows: Any) -> np.ndarray:
    *_, (state, _) = rows
    return state


# ----------------------------------------------------------------------------------------------- block by block


def token_by_token(batch: int, noise: Any, length: int = LENGTH, **settings: Any) -> Any:
    """The chain, one token a block; the network is fed the token before."""
    return ar_blocks(
        np.full((batch, 1), START),
        None,
        lambda tokens, carry, block: (CHAIN[tokens], carry),
        lambda tokens, block: tokens,
        noise,
        **{"sizes": (1,) * length, **settings},
    )


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({}, lambda p: p),
        ({"temperature": 0.5}, lambda p: p**2),
        ({"top_k": 2}, lambda p: p * (p >= np.sort(p)[..., -2, None])),
    ],
)
def test_blocks_of_one_are_the_chain(settings: dict[str, Any], change: Any) -> None:
    """Twenty thousand sequences are as near the chain's law as a perfect sampler's, sharpened and truncated too."""
    p = change(softmax(CHAIN.astype(np.float64)))
    law = chain_law(laws=p / p.sum(-1, keepdims=True))
    drawn = counted(last(token_by_token(20_000, Plain(2), **settings)))
    assert far(drawn, law) < 1
    assert far(drawn, np.roll(law, 1)) > 1


def test_blocks_are_handed_what_they_ask_for() -> None:
    """Inputs, carry and number go to the network, tokens and number to what makes the next inputs."""
    seen: list[Any] = []

    def answer(inputs: str, carry: int, block: int) -> tuple[np.ndarray, int]:
        seen.append((inputs, carry, block))
        logits = np.full((2, 6, 3), -9, np.float32)
        logits[:, -1, block] = logits[:, -2, 2 - block] = 9  # certain tokens: (2 - block, block) at the end
        return logits, carry + 10

    def following(tokens: np.ndarray, block: int) -> str:
        return f"{tokens[0].tolist()} after {block}"

    rows = list(ar_blocks("first", 1, answer, following, PhiloxNoise(0), sizes=(1, 2, 2)))
    assert seen == [("first", 1, 0), ("[0] after 0", 11, 1), ("[1, 1] after 1", 21, 2)]
    assert [(state[0].tolist(), block[0].tolist()) for state, block in rows] == [
        ([0], [0]),
        ([0, 1, 1], [1, 1]),
        ([0, 1, 1, 0, 2], [0, 2]),
    ]


def test_tokens_of_a_block_are_drawn_apart() -> None:
    """A block's tokens, of one scale say, follow the product of their laws, given the blocks before."""
    inputs = np.full((20_000, 1), START)

    def answer(tokens: np.ndarray, carry: None, block: int) -> tuple[np.ndarray, None]:
        return np.repeat(CHAIN[tokens[:, -1:]], 1 + block, axis=1), None

    pairs = last(ar_blocks(inputs, None, answer, lambda tokens, block: tokens, Plain(3), sizes=(1, 2)))
    p = softmax(CHAIN.astype(np.float64))
    assert far(counted(pairs), p[START][:, None, None] * p[:VALUES, :, None] * p[:VALUES, None, :]) < 1


def test_guidance_climbs_over_the_blocks() -> None:
    """FlexVAR's ramp: (1 + w) c - w u with w from 0 to 1.5, block by block, against the formula."""
    rng, sizes = np.random.default_rng(5), (1, 4, 9, 16)
    plain, prompted = ([rng.standard_normal((3, n, 8)).astype(np.float32) for n in sizes] for _ in range(2))
    rows = ar_blocks(
        0,
        0,
        lambda inputs, carry, block: ((plain[block], prompted[block]), carry),
        lambda tokens, block: 0,
        PhiloxNoise(6),
        sizes=sizes,
        guidance=(1.0, 2.5),
    )
    for block, (_, tokens) in enumerate(rows):
        w = 1.5 * block / 3
        p = softmax((1 + w) * prompted[block].astype(np.float64) - w * plain[block])
        u = PhiloxNoise(6).uniform(p.shape, 1 + block, Purpose.TOKEN)
        assert np.array_equal(tokens, np.argmax(p / -np.log(u), -1))


@pytest.mark.parametrize(
    ("logits", "settings", "words"),
    [
        (np.zeros((1, 2, 3), np.float32), {"sizes": (3,)}, "block 0 has 3 tokens"),
        (np.zeros((1, 2, 3), np.float32), {"sizes": (1,), "guidance": (1, 2)}, "needs logits without and with"),
        ((np.zeros((1, 2, 3), np.float32),) * 2, {"sizes": (1,)}, "no guidance"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(logits: Any, settings: dict[str, Any], words: str) -> None:
    """Too few logits, one array where guidance needs two, two where nothing joins them."""
    rows = ar_blocks(0, 0, lambda *_: (logits, 0), lambda *_: 0, PhiloxNoise(0), **settings)
    with pytest.raises(BadRequest, match=words):
        next(rows)


# -------------------------------------------------------------------------------------------------- in parallel


def window_net(window: int, calls: list[np.ndarray] | None = None) -> Any:
    """The chain for `jacobi_tokens`: logits of `window` tokens from the first undecided one on, by the token before."""

    def answer(tokens: np.ndarray, decided: np.ndarray) -> np.ndarray:
        if calls is not None:
            calls.append(decided)
        before = np.concatenate([np.full((len(tokens), 1), START), tokens], 1)
        at = np.minimum(decided[:, None] + np.arange(window), tokens.shape[1])
        return CHAIN[np.take_along_axis(before, at, 1)]

    return answer


def jacobi(batch: int, noise: Any, window: int, calls: list[np.ndarray] | None = None, **settings: Any) -> Any:
    settings = {"length": LENGTH, "vocabulary": VALUES, **settings}
    return jacobi_tokens(window_net(window, calls), noise, batch=batch, window=window, **settings)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 7])
def test_guesses_do_not_change_the_law(window: int) -> None:
    """Twenty thousand sequences of any window are as near the chain's law as a perfect sampler's, in fewer calls."""
    calls: list[np.ndarray] = []
    drawn = counted(last(jacobi(20_000, Plain(11), window, calls)))
    assert far(drawn, chain_law()) < 1
    assert far(drawn, np.roll(chain_law(), 1)) > 1
    needed = np.mean([(decided < LENGTH) for decided in calls], axis=1).sum()  # calls a sequence takes, on average
    assert needed == LENGTH if window == 1 else needed < 0.85 * LENGTH


def test_truncation_is_part_of_the_law() -> None:
    """With top-k and a temperature the sequences follow the sharpened, truncated chain: dropped tokens never appear."""
    p = softmax(CHAIN.astype(np.float64)) ** 2
    p *= p >= np.sort(p)[..., -3, None]
    law = chain_law(laws=p / p.sum(-1, keepdims=True))
    drawn = counted(last(jacobi(20_000, Plain(12), 3, temperature=0.5, top_k=3)))
    assert not drawn[law == 0].any()
    assert far(drawn, law) < 1


def slow_jacobi(noise: PhiloxNoise, length: int, window: int) -> tuple[list[int], int]:
    """Speculative Jacobi decoding of one image with lists: guesses, their laws, one at a time."""
    p = softmax(CHAIN.astype(np.float64))
    first = noise.uniform((1, length), 0, Purpose.TOKEN)[0]
    decided: list[int] = []
    queue: list[tuple[int, np.ndarray]] = []  # guesses and what each was drawn from
    calls = 0
    while len(decided) < length:
        while len(queue) < min(window, length - len(decided)):
            place = len(decided) + len(queue)
            queue.append((int(first[place] * VALUES), np.full(VALUES, 1 / VALUES)))
        coin = noise.uniform((1, window), 1 + calls, Purpose.ACCEPT)[0]
        clock = -np.log(noise.uniform((1, window, VALUES), 1 + calls, Purpose.TOKEN)[0])
        calls += 1
        given = [START if not decided else decided[-1], *(guess for guess, _ in queue)]
        laws = [p[before] for before in given[:-1]]
        for j, (guess, q) in enumerate(queue):
            if coin[j] < min(1, laws[j][guess] / q[guess]):
                decided.append(guess)
                continue
            decided.append(int(np.argmax(np.maximum(laws[j] - q, 0) / clock[j])))
            queue = [(int(np.argmax(laws[k] / clock[k])), laws[k]) for k in range(j + 1, len(queue))]
            break
        else:
            queue = []
    return decided, calls


@pytest.mark.parametrize("window", [1, 3, 8, 40])
def test_many_images_are_one_image_many_times(window: int) -> None:
    """Every image of a batch is what the slow loop draws for it alone, call for call, each at its own pace."""
    rows = list(jacobi(5, PhiloxNoise(21), window, length=30))
    for k in range(5):
        tokens, calls = slow_jacobi(PhiloxNoise(21, k), 30, window)
        assert rows[-1][0][k].tolist() == tokens
        alone = list(jacobi(1, PhiloxNoise(21, k), window, length=30))
        assert len(alone) == calls
        for (state, guess), (one, one_guess) in zip(rows, alone, strict=False):
            assert np.array_equal(state[k], one[0])
            assert np.array_equal(guess[k], one_guess[0])


def test_every_call_decides_something() -> None:
    """Decided tokens grow by one to a window a call, never change again, and the guesses agree with them."""
    before = np.full((6, 20), -1)
    for state, guess in jacobi(6, PhiloxNoise(2), 5, length=20):
        known = before >= 0
        assert np.array_equal(state[known], before[known])
        grown = (state >= 0).sum(1) - known.sum(1)
        assert ((grown >= 1) | (known.sum(1) == 20)).all()
        assert (grown <= 5).all()
        assert np.array_equal(guess[state >= 0], state[state >= 0])
        assert ((guess >= 0) & (guess < VALUES)).all()
        before = state
    assert (before >= 0).all()


def test_certain_tokens_take_a_call_a_window() -> None:
    """Where the law leaves no choice and the guesses hit it by then, a call decides its whole window."""
    certain = np.zeros((1, 1, 1), np.float32)
    rows = jacobi_tokens(
        lambda tokens, decided: np.repeat(certain, 4, 1), PhiloxNoise(0), batch=1, length=10, window=4, vocabulary=1
    )
    assert [int((state >= 0).sum()) for state, _ in rows] == [4, 8, 10]


# ------------------------------------------------------------------------------------------------------ of both


def test_an_image_is_the_same_alone_and_in_a_batch() -> None:
    """Image 2 of a batch of blocks is the batch of one that starts at 2, after every block."""
    together, alone = (list(token_by_token(n, PhiloxNoise(8, first), 9)) for n, first in ((3, 0), (1, 2)))
    for (state, block), (one, one_block) in zip(together, alone, strict=True):
        assert np.array_equal(state[2:], one)
        assert np.array_equal(block[2:], one_block)
    assert not np.array_equal(together[-1][0][0], together[-1][0][2])


@pytest.mark.parametrize(
    ("kernel", "change", "words"),
    [
        ("blocks", {"sizes": ()}, "sizes"),
        ("blocks", {"sizes": (1, 0)}, "sizes"),
        ("blocks", {"temperature": 0}, "temperature"),
        ("blocks", {"top_p": -0.1}, "top_p"),
        ("jacobi", {"batch": 0}, "batch"),
        ("jacobi", {"length": 0}, "length"),
        ("jacobi", {"window": 0}, "window"),
        ("jacobi", {"vocabulary": 0}, "vocabulary"),
        ("jacobi", {"temperature": -1}, "temperature"),
        ("jacobi", {"top_k": -1}, "top_k"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(kernel: str, change: dict[str, Any], words: str) -> None:
    """At the call, before any row."""
    call = {
        "blocks": lambda **new: token_by_token(1, PhiloxNoise(0), **new),
        "jacobi": lambda **new: jacobi(new.pop("batch", 1), PhiloxNoise(0), new.pop("window", 2), **new),
    }[kernel]
    with pytest.raises(BadRequest, match=words):
        call(**change)
