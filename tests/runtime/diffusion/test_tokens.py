"""Draws of tokens, and parallel decoding by confidence: against aMUSEd's scheduler and MAGNeT's loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgekit.errors import BadRequest
from edgekit.runtime.diffusion.tokens import TokenRow, masked_share, masked_tokens
from edgekit.runtime.random import PhiloxNoise, Purpose, TorchNoise, philox_uniform, race, softmax, truncate
from tests.runtime.diffusion.cases import LAW

GOLDEN = Path(__file__).parents[2] / "golden" / "tokens.npz"
BATCH, LENGTH, VALUES = 2, 48, 17
MASK = VALUES


class Plain:
    """Uniforms of numpy's generator: fast for large batches, where no image has to be the same alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def uniform(self, shape: Sequence[int], draw: int, purpose: Purpose) -> np.ndarray:
        return 1 - np.random.default_rng((self.seed, draw, int(purpose))).random(shape)


def far(counts: np.ndarray, law: np.ndarray) -> float:
    """Total variation between drawn counts and a law, over what a perfect sampler keeps below but once in 1e9 tries."""
    draws = counts.sum()
    usual = 0.5 * np.sqrt(law * (1 - law) / draws).sum()  # bounds the mean; the rest is McDiarmid's inequality
    return float(0.5 * np.abs(counts / draws - law).sum() / (usual + np.sqrt(np.log(1e9) / (2 * draws))))


def net(tokens: np.ndarray, at: TokenRow | float) -> np.ndarray:
    """Logits that depend on each token, its left neighbour, its place and the row or time."""
    rng, number = np.random.default_rng(3), at.row if isinstance(at, TokenRow) else at
    pairs = 2 * rng.standard_normal((VALUES + 1, VALUES))
    places = rng.standard_normal((tokens.shape[-1], VALUES))
    return (pairs[tokens] + np.roll(pairs[tokens], 1, -2) + places * np.cos(number)).astype(np.float32)


def masks(batch: int = BATCH, length: int = LENGTH) -> np.ndarray:
    return np.full((batch, length), MASK)


def last(rows: Any) -> np.ndarray:
    *_, (state, _) = rows
    return state


# ---------------------------------------------------------------------------------------------------- uniforms


@LAW
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**28 - 9), st.sampled_from(Purpose))
def test_the_purpose_stands_above_the_image(seed: int, draw: int, image: int, purpose: Purpose) -> None:
    """A uniform's stream is purpose * 2^28 + image; normals keep theirs, which is the image alone."""
    noise = PhiloxNoise(seed, image)
    if purpose == Purpose.NORMAL:
        normals = np.stack([PhiloxNoise(seed, image + k).normal((1, 5), draw)[0] for k in (0, 1)])
        assert np.array_equal(noise.normal((2, 5), draw), normals)
        return
    wanted = [philox_uniform((5,), seed, draw, int(purpose) * 2**28 + image + k) for k in (0, 1)]
    assert np.array_equal(noise.uniform((2, 5), draw, purpose), wanted)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: PhiloxNoise(1).uniform((1, 4), 0, Purpose.NORMAL), "repeat"),
        (lambda: PhiloxNoise(1, 2**28 - 1).uniform((2, 4), 0, Purpose.TOKEN), "2\\^28"),
        (lambda: TorchNoise(1).uniform((1, 4), 0, Purpose.TOKEN), "philox"),
    ],
)
def test_uniforms_that_do_not_exist_are_refused(ask: Callable[[], Any], words: str) -> None:
    """Words of normals, images past the last stream, and torch's generator."""
    with pytest.raises(BadRequest, match=words):
        ask()


def test_a_race_draws_from_its_law() -> None:
    """Two hundred thousand races are as near the law as a perfect sampler, unnormalised and with a zero in it."""
    p = np.array([3.0, 0.0, 1.0, 0.5, 1.5])
    counts = np.bincount(race(p, Plain(1).uniform((200_000, 5), 0, Purpose.TOKEN)), minlength=5)
    assert counts[1] == 0
    assert far(counts, p / p.sum()) < 1
    assert far(counts, np.array([0.48, 0, 0.18, 0.09, 0.25])) > 1  # and the measure can tell


@LAW
@given(st.lists(st.integers(-6, 6), min_size=1, max_size=9), st.integers(0, 10), st.floats(0, 1))
@example([0, 0, 0, 0], 0, 0.5)  # two of four reach the half exactly
@example([1, 3, 1, 1], 2, 0.0)  # three tie with the second
def test_truncation_is_the_obvious_loop(scores: list[int], top_k: int, top_p: float) -> None:
    """Top-k with its ties, then top-p, value by value from the best, as the definition says it."""
    logits = np.array(scores, np.float64) / 2
    kept = set(range(len(scores)))
    if top_k and top_k < len(scores):
        kept = {i for i in kept if logits[i] >= sorted(logits)[-top_k]}
    if 0 < top_p < 1:
        p, total, nucleus = softmax(np.where([i in kept for i in range(len(scores))], logits, -np.inf)), 0.0, set()
        for i in sorted(kept, key=lambda i: (-logits[i], i)):
            if total < top_p:
                nucleus.add(i)
            total += p[i]
        kept = nucleus
    assert set(np.flatnonzero(np.isfinite(truncate(logits[None], top_k, top_p)[0]))) == kept


# ------------------------------------------------------------------------------------------ aMUSEd's scheduler


@dataclass(frozen=True)
class Case:
    """AmusedScheduler at one setting; `given` tokens are known from the start."""

    steps: int
    schedule: str = "cosine"
    temperature: Any = (2, 0)
    share: float = 1.0
    given: int = 0

    @property
    def name(self) -> str:
        return f"{self.steps} {self.schedule} {self.temperature} {self.share} {self.given}"

    def start(self) -> np.ndarray:
        tokens = masks()
        tokens[:, LENGTH - self.given :] = np.arange(self.given) % VALUES
        return tokens


CASES = {
    case.name: case
    for case in (
        *(Case(steps, schedule) for steps in (1, 2, 3, 4, 5, 6, 7, 8, 12) for schedule in ("cosine", "linear")),
        Case(6, temperature=(4.5, 1)),
        Case(6, temperature=(0, 0)),
        Case(7, temperature=3),
        Case(5, share=0.6),
        Case(8, given=30),
        Case(8, "linear", share=0.375, given=30),
    )
}


def ours(case: Case) -> np.ndarray:
    """The tokens after every row, and the clean ones before it, (steps, 2, batch, length)."""
    ends = case.temperature if isinstance(case.temperature, tuple) else (case.temperature, 0.01)
    rows = masked_tokens(
        case.start(),
        net,
        PhiloxNoise(7),
        mask_id=MASK,
        steps=case.steps,
        schedule=case.schedule,  # type: ignore[arg-type]
        choice_temperature=ends,
        start_share=case.share,
    )
    return np.array(list(rows), np.int8)


def reference(case: Case) -> np.ndarray:
    """The same from diffusers, whose two sources of randomness are given our uniforms."""
    import torch
    from diffusers import AmusedScheduler
    from diffusers.schedulers import scheduling_amused

    scheduler = AmusedScheduler(mask_token_id=MASK, masking_schedule=case.schedule)
    scheduler.set_timesteps(case.steps, case.temperature)
    tokens, rows = torch.from_numpy(case.start()), []
    for row, t in enumerate(scheduler.timesteps):
        race_u = torch.from_numpy(PhiloxNoise(7).uniform((BATCH, LENGTH, VALUES), 1 + row, Purpose.TOKEN))
        choice_u = torch.from_numpy(PhiloxNoise(7).uniform((BATCH, LENGTH), 1 + row, Purpose.GUMBEL))

        def multinomial(p: Any, count: int, generator: Any = None, u: Any = race_u) -> Any:
            return (p / -torch.log(u.reshape(p.shape))).argmax(-1, keepdim=True)

        def gumbel(like: Any, generator: Any = None, u: Any = choice_u) -> Any:
            return (-torch.log((-torch.log(u.clamp(1e-20))).clamp(1e-20))).float()

        logits = torch.from_numpy(net(tokens.numpy(), TokenRow(row, 0, 1.0)))
        with mock.patch("torch.multinomial", multinomial), mock.patch.object(scheduling_amused, "gumbel_noise", gumbel):
            done = scheduler.step(logits, t, tokens, starting_mask_ratio=case.share)
        tokens = done.prev_sample
        rows.append((tokens.numpy(), done.pred_original_sample.numpy()))
    return np.array(rows, np.int8)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    """Every row of every case by diffusers 0.42, written by `freeze` below."""
    with np.load(GOLDEN) as stored:
        return dict(stored)


def test_every_case_is_frozen(golden: dict[str, np.ndarray]) -> None:
    """A case cannot enter the list without its vector; the file stays small."""
    assert set(golden) == set(CASES)
    assert GOLDEN.stat().st_size < 100_000


@pytest.mark.parametrize("name", CASES)
def test_parallel_decoding_is_amuseds(name: str, golden: dict[str, np.ndarray]) -> None:
    """Token for token, masked and clean, after every row, with the same uniforms."""
    assert np.array_equal(ours(CASES[name]), golden[name])


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")
@pytest.mark.parametrize("name", CASES)
def test_amused_still_decodes_it(name: str, golden: dict[str, np.ndarray]) -> None:
    """The installed diffusers gives the frozen tokens."""
    pytest.importorskip("diffusers")
    assert np.array_equal(reference(CASES[name]), golden[name])


@pytest.mark.torch
def test_counts_of_masks_are_torchs() -> None:
    """floor(N share) is torch's for all N and rows a model may have, whole numbers such as N cos(pi/3) included."""
    torch = pytest.importorskip("torch")
    sizes = np.array([16, 48, 64, 100, 256, 300, 576, 750, 1024, 1500, 4096], np.float32)
    for rows in range(1, 65):
        for row in range(1, rows):
            ratio = torch.tensor([[row]]) / rows
            grid = torch.linspace(0, 1, rows)[row]
            for schedule, share in (
                ("cosine", torch.cos(ratio * np.pi / 2)),
                ("linear", 1 - ratio),
                ("cosine_closed", torch.cos(grid * np.pi * 0.5)),
            ):
                wanted = (torch.from_numpy(sizes) * share).floor().numpy().ravel()
                mine = np.floor(sizes * np.float32(masked_share(schedule, row, rows)))  # type: ignore[arg-type]
                assert np.array_equal(mine, wanted), (schedule, row, rows)


# ------------------------------------------------------------------------------------------ parallel decoding


def magnet(uniforms: PhiloxNoise, books: int, steps: tuple[int, ...], span: int, heat: float, top_p: float) -> Any:
    """MAGNeT's own loop, which masks before it calls, span by span and draw by draw, with room for one image."""
    state, row = np.full((1, books, LENGTH), MASK), 0
    for book, rows in enumerate(steps):
        doubt = dict.fromkeys(range(LENGTH // span), 0.0)  # of the spans that are still open
        for i in range(rows):
            count = max(int(np.cos(np.pi / 2 * (i / max(rows - 1, 1) if rows > 1 else 0.0)) * (LENGTH // span)), 1)
            doubt = dict(sorted(doubt.items(), key=lambda item: -item[1])[:count])
            for place in doubt:
                state[0, book, place * span : (place + 1) * span] = MASK
            logits = net(state[:, book], TokenRow(row, book, 0)) / np.float32(max(heat * (rows - 1 - i) / rows, 0.01))
            p, law = softmax(logits)[0], softmax(truncate(logits, 0, top_p))[0]
            u = uniforms.uniform((1, LENGTH, VALUES), 1 + row, Purpose.TOKEN)[0]
            for place in doubt:
                at = range(place * span, (place + 1) * span)
                for k in at:
                    state[0, book, k] = max(range(VALUES), key=lambda v, k=k: law[k, v] / -np.log(u[k, v]))
                doubt[place] = 1 - max(p[k, state[0, book, k]] for k in at)
            row += 1
    return state


@pytest.mark.parametrize(("span", "top_p"), [(3, 0.9), (1, 1.0), (4, 0.5)])
def test_spans_and_codebooks_are_magnets(span: int, top_p: float) -> None:
    """One codebook after the other, each with its own step count, spans kept by their best token."""
    steps, seen = (13, 3, 2, 1), []  # thirteen rows of twelve spans mask the same number twice

    def answer(tokens: np.ndarray, at: TokenRow) -> np.ndarray:
        seen.append(at)
        return net(tokens[:, at.codebook], at)

    rows = masked_tokens(
        np.full((1, 4, LENGTH), MASK),
        answer,
        PhiloxNoise(5),
        mask_id=MASK,
        steps=steps,
        schedule="cosine_closed",
        temperature=(3.0, 0.0),
        anneal=True,
        choice_temperature=(0, 0),
        top_p=top_p,
        span=span,
    )
    assert np.array_equal(last(rows), magnet(PhiloxNoise(5), 4, steps, span, 3.0, top_p))
    assert [(at.row, at.codebook) for at in seen] == list(enumerate([0] * 13 + [1] * 3 + [2] * 2 + [3]))
    assert seen[6].masked == pytest.approx(np.cos(np.pi / 4))


@LAW
@given(st.integers(0, 99), st.integers(1, 9), st.sampled_from([1, 2, 4]), st.integers(0, LENGTH))
def test_rows_mask_what_the_schedule_says(seed: int, steps: int, span: int, known: int) -> None:
    """Given tokens stay; as many spans are masked as the schedule says, at least one and falling; the end is clean."""
    start = masks(1)
    start[:, :known] = 1
    settings = {"mask_id": MASK, "steps": steps, "span": span}
    before = (start == MASK).reshape(-1, span).any(-1).sum()
    for row, (state, clean) in enumerate(masked_tokens(start, net, PhiloxNoise(seed), **settings)):  # type: ignore[arg-type]
        hidden = (state == MASK).reshape(-1, span).any(-1).sum()
        wanted = int(np.float32(LENGTH // span) * np.float32(masked_share("cosine", row + 1, steps)))
        assert hidden == (0 if row + 1 == steps else min(before, max(1, min(before - 1, wanted))))
        assert (state[:, :known] == 1).all()
        assert not (clean == MASK).any()
        assert np.array_equal(clean[state != MASK], state[state != MASK])
        before = hidden
    assert hidden == 0


def test_a_learned_confidence_takes_back_what_was_decided() -> None:
    """The evaluator's lowest scores are masked, whenever they were decided; tokens given at the start are not."""
    start = masks(1)
    start[:, :8] = 2

    def evaluator(tokens: np.ndarray, at: TokenRow) -> np.ndarray:
        assert not (tokens == MASK).any()
        order = np.arange(LENGTH) if at.row % 2 else np.arange(LENGTH)[::-1]
        return ((order + 1) / LENGTH)[None].astype(np.float32)  # even rows doubt the end, odd ones the beginning

    settings = {"mask_id": MASK, "steps": 4, "choice_temperature": (0, 0), "confidence": evaluator}
    states = [state[0] == MASK for state, _ in masked_tokens(start, net, PhiloxNoise(1), **settings)]  # type: ignore[arg-type]
    assert np.flatnonzero(states[0]).tolist() == list(range(LENGTH - 39, LENGTH))
    assert np.flatnonzero(states[1]).tolist() == list(range(8, 8 + 33))
    assert not states[3].any()


def freeze() -> None:
    """Write diffusers' tokens: `python -m tests.runtime.diffusion.test_tokens`."""
    np.savez_compressed(GOLDEN, **{name: reference(case) for name, case in CASES.items()})  # type: ignore[arg-type]


if __name__ == "__main__":
    freeze()
