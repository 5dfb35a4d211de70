"""Noise: known answers, addresses that mean the same everywhere, and torch's stream without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import BadRequest
from edgekit.runtime.random import (
    NOISE,
    PhiloxNoise,
    TorchCPUNormal,
    TorchNoise,
    open_noise,
    philox4x32,
    philox_normal,
    philox_u32,
    philox_uniform,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "torch_randn.npz"
LAW = settings(max_examples=40, deadline=None)

# Random123 1.09, kat_vectors: philox4x32 10 rounds; counter, key -> words
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

# torch.randn shapes and seeds: whole blocks, a redrawn tail, one block and a bit, a seed beyond 32 bits
TORCH_DRAWS = [(0, (1, 4, 8, 8)), (7, (2, 3, 5, 5)), (123456789, (17,)), (2**32 + 5, (16,)), (2**63, (3, 50))]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    """The known-answer vectors of Random123."""
    assert tuple(int(word) for word in philox4x32(counter, key)) == words


def test_the_address_is_the_counter_and_the_seed_is_the_key() -> None:
    """Block, draw and stream stand in the counter, the seed in the key, low word first."""
    seed, draw, stream = 0x299F31D0A4093822, 5, 9
    words = philox_u32((8,), seed, draw, stream)
    assert words[4:].tolist() == [int(w) for w in philox4x32((1, 0, draw, stream), (0xA4093822, 0x299F31D0))]


@LAW
@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(0, 9),
)
def test_more_values_do_not_change_the_first(seed: int, draw: int, stream: int, size: int, more: int) -> None:
    """Every element has its own address: asking for more, or in another shape, moves nothing."""
    long = philox_normal((size + more,), seed, draw, stream)
    assert np.array_equal(philox_normal((size,), seed, draw, stream), long[:size])
    assert np.array_equal(philox_normal((1, size, 1), seed, draw, stream).ravel(), long[:size])


@LAW
@given(st.integers(0, 2**64 - 1), st.integers(0, 500), st.integers(1, 5), st.integers(0, 4))
def test_an_image_is_the_same_alone_and_in_any_batch(seed: int, draw: int, batch: int, number: int) -> None:
    """Image k of a batch is a batch of one that starts at k."""
    together = PhiloxNoise(seed).normal((number + batch, 2, 3, 3), draw)
    assert np.array_equal(PhiloxNoise(seed, number).normal((batch, 2, 3, 3), draw), together[number:])


def test_seeds_draws_and_streams_are_different_noise() -> None:
    """Changing any part of the address changes all of the noise."""
    base = philox_u32((64,), 1, 1, 1)
    for other in ((2, 1, 1), (1 + 2**32, 1, 1), (1, 2, 1), (1, 1, 2)):
        assert not (philox_u32((64,), *other) == base).any()


def test_normals_are_normal() -> None:
    """A million draws have the first four moments of a unit normal and its tail, within five standard errors."""
    z = philox_normal((1_000_000,), 3).astype(np.float64)
    for power, moment, error in ((1, 0.0, 1.0), (2, 1.0, 2**0.5), (3, 0.0, 15**0.5), (4, 3.0, 96**0.5)):
        assert abs((z**power).mean() - moment) < 5 * error / 1000
    assert abs((np.abs(z) > 3).mean() - 0.0026998) < 5 * (0.0027**0.5) / 1000


def test_uniforms_never_touch_their_ends() -> None:
    """The smallest and the largest word stay inside (0, 1), so logarithms of them and of their complements exist."""
    u = philox_uniform((100_000,), 11)
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    assert 0 < (0 + 0.5) * 2.0**-32
    assert (2**32 - 1 + 0.5) * 2.0**-32 < 1


def torch_draws(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Three draws one after another, as torch makes them."""
    import torch

    generator = torch.Generator("cpu").manual_seed(seed)
    return np.stack([torch.randn(shape, generator=generator).numpy() for _ in range(3)])


@pytest.fixture(scope="module")
def frozen() -> dict[str, np.ndarray]:
    """Draws of torch 2.13, written by `freeze` below."""
    with np.load(GOLDEN) as stored:
        return dict(stored)


@pytest.mark.parametrize(("seed", "shape"), TORCH_DRAWS)
def test_torchs_stream_without_torch(seed: int, shape: tuple[int, ...], frozen: dict[str, np.ndarray]) -> None:
    """Three draws in a row equal torch's to the last bits of a logarithm and a cosine."""
    mine = TorchCPUNormal(seed)
    drawn = np.stack([mine.normal(shape) for _ in range(3)])
    assert np.abs(drawn - frozen[f"{seed}"]).max() < 1e-6


@pytest.mark.torch
@pytest.mark.parametrize(("seed", "shape"), TORCH_DRAWS)
def test_torch_still_draws_it(seed: int, shape: tuple[int, ...], frozen: dict[str, np.ndarray]) -> None:
    """The installed torch gives the frozen draws."""
    pytest.importorskip("torch")
    assert np.abs(torch_draws(seed, shape) - frozen[f"{seed}"]).max() < 1e-6


def test_torch_mode_counts_calls_not_addresses() -> None:
    """One generator fills the whole batch, draw after draw."""
    source, stream = TorchNoise(5), TorchCPUNormal(5)
    assert np.array_equal(source.normal((2, 4, 4), 0), stream.normal((2, 4, 4)))
    assert np.array_equal(source.normal((2, 4, 4), 3), stream.normal((2, 4, 4)))


@pytest.mark.parametrize("mode", NOISE)
def test_every_mode_repeats_itself(mode: str) -> None:
    """The same seed gives the same noise, float32, of the shape asked for."""
    first, again = (open_noise(mode, 42).normal((2, 3, 4), 0) for _ in range(2))
    assert np.array_equal(first, again)
    assert first.dtype == np.float32
    assert first.shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: open_noise("dice", 0), "dice"),
        (lambda: open_noise("philox", -1), "seed"),
        (lambda: open_noise("torch-cpu", 2**64), "seed"),
        (lambda: open_noise("torch-cpu", 0, first=1), "alone"),
        (lambda: open_noise("torch-cpu", 0).normal((3, 5), 0), "16"),
        (lambda: philox_u32((4,), 2**64), "seed"),
        (lambda: philox_u32((4,), 0, draw=2**32), "draw"),
        (lambda: philox_u32((4,), 0, stream=-1), "stream"),
    ],
)
def test_what_has_no_noise_is_refused(make: object, words: str) -> None:
    """Unknown modes, numbers out of range and draws torch makes by another path."""
    with pytest.raises(BadRequest, match=words):
        make()  # type: ignore[operator]


def freeze() -> None:
    """Write torch's draws: `python -m tests.runtime.test_random`."""
    np.savez_compressed(GOLDEN, **{f"{seed}": torch_draws(seed, shape) for seed, shape in TORCH_DRAWS})


if __name__ == "__main__":
    freeze()
