"""Noise that is the same on every device, in every batch, after every resume.

The default is counter-based: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Any
element of any draw is a pure function of its address, so there is no state to save:

    key = seed (64 bits)        counter = (block, block >> 32, draw, stream)        stream = purpose << 28 | image

Normals have purpose 0; token races, Gumbel noise and accept coins have their own, so that one draw can use all four.

The second mode rebuilds the stream of `torch.Generator("cpu")`, so that a seed gives the picture diffusers gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from edgekit.errors import BadRequest

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U32 = npt.NDArray[np.uint32]
Floats = TypeVar("Floats", F32, F64)

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_TORCH_BLOCK = 16  # torch fills normals in blocks of sixteen
_IMAGE_BITS = 28  # of a stream; the purpose stands above them


class Purpose(IntEnum):
    """What random numbers are for: the high bits of their stream."""

    NORMAL = 0  # unit normals
    TOKEN = 1  # the race that draws a token: argmax of p / -ln u
    GUMBEL = 2  # noise on the confidence of tokens
    ACCEPT = 3  # coins: accept a draft, mask or reveal a token


class UniformSource(Protocol):
    """Where a sampler of tokens gets its uniforms from."""

    def uniform(self, shape: Sequence[int], draw: int, purpose: Purpose) -> F64:
        """Uniforms in (0, 1); axis 0 counts images. Draw 0 starts a sample, draw 1 + i belongs to row i."""


class NoiseSource(UniformSource, Protocol):
    """Where a sampler's unit normals, and its uniforms if it has any, come from."""

    def normal(self, shape: Sequence[int], draw: int) -> F32:
        """Unit normals of `shape`; axis 0 counts images. Draw 0 starts a sample, draw 1 + i belongs to row i."""


def philox4x32(counter: Sequence[Any], key: tuple[int, int], rounds: int = 10) -> tuple[U32, U32, U32, U32]:
    """The bare generator: four counter words and two key words to four random words, elementwise over arrays."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (p1 >> _HALF) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _HALF) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0.astype(np.uint32), c1.astype(np.uint32), c2.astype(np.uint32), c3.astype(np.uint32)


def philox_u32(shape: Sequence[int], seed: int, draw: int = 0, stream: int = 0) -> U32:
    """Random 32-bit words of `shape`, in C order.

    Raises:
        BadRequest: seed outside [0, 2^64), draw or stream outside [0, 2^32).
    """
    for name, value, bits in (("seed", seed, 64), ("draw", draw, 32), ("stream", stream, 32)):
        if not 0 <= value < 1 << bits:
            raise BadRequest(f"{name} is {value}; it must be at least 0 and below 2^{bits}")
    size = math.prod(shape)
    block = np.arange(-(-size // 4), dtype=np.uint64)
    words = philox4x32((block & _LOW, block >> _HALF, draw, stream), (seed & 0xFFFFFFFF, seed >> 32))
    return np.stack(words, axis=-1).reshape(-1)[:size].reshape(shape)


def philox_uniform(shape: Sequence[int], seed: int, draw: int = 0, stream: int = 0) -> F64:
    """Uniforms in the open interval (0, 1): (word + 1/2) / 2^32, exact in float64. Raises BadRequest."""
    return (philox_u32(shape, seed, draw, stream).astype(np.float64) + 0.5) * 2.0**-32


def philox_normal(shape: Sequence[int], seed: int, draw: int = 0, stream: int = 0) -> F32:
    """Unit normals of `shape` by Box-Muller in float64, rounded once to float32. Raises BadRequest.

    The integers are the same everywhere; libraries that differ in the last bit of a float64 logarithm or cosine
    change a float32 result about once in 2^28 values, and then by one unit in the last place.
    """
    size = math.prod(shape)
    u = philox_uniform((-(-size // 4), 2, 2), seed, draw, stream)
    radius, angle = np.sqrt(-2.0 * np.log(u[..., 0])), 2.0 * np.pi * u[..., 1]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return pairs.reshape(-1)[:size].reshape(shape).astype(np.float32)


def softmax(logits: Floats) -> Floats:
    """Probabilities over the last axis, in the precision of the logits; a logit of -inf has probability 0."""
    weights: Floats = np.exp(logits - logits.max(-1, keepdims=True))
    p: Floats = weights / weights.sum(-1, keepdims=True)
    return p


def truncate(logits: Floats, top_k: int = 0, top_p: float = 1.0) -> Floats:
    """Logits with -inf where top-k, then top-p, drop a value; the last axis is the vocabulary.

    Top-k (Fan et al. 2018) keeps what ties with the k-th. Top-p (Holtzman et al. 2020) keeps a value while those before
    it sum to less than `top_p`, so always the best one; of tied values the lowest stay.
    """
    if 0 < top_k < logits.shape[-1]:
        worst_kept = np.partition(logits, -top_k, axis=-1)[..., -top_k, None]
        logits = np.where(logits < worst_kept, logits.dtype.type(-np.inf), logits)
    if 0 < top_p < 1:
        order = np.argsort(-logits, axis=-1, kind="stable")
        falling = np.take_along_axis(softmax(logits), order, -1)
        dropped = np.zeros(logits.shape, np.bool_)
        before = np.cumsum(falling[..., :-1], axis=-1, dtype=np.float64)  # of all but the best, which stays
        np.put_along_axis(dropped, order[..., 1:], before >= top_p, -1)
        logits = np.where(dropped, logits.dtype.type(-np.inf), logits)
    return logits


def race(p: npt.NDArray[Any], u: F64) -> npt.NDArray[np.int64]:
    """One draw from each p (..., vocabulary), which need not sum to 1, with uniforms of the same shape.

    Exponential clocks of rates p, of which the first rings: argmax of p / -ln u, as `torch.multinomial` has it for one
    draw. There are no running sums, so a rounding difference moves one token at most.
    """
    winners: npt.NDArray[np.int64] = np.argmax(p / -np.log(u), axis=-1)
    return winners


class TorchCPUNormal:
    """The float32 stream of `torch.randn(generator=torch.Generator("cpu").manual_seed(seed))`, call after call.

    torch draws a MT19937 word per element, keeps 24 bits, and pairs element j of a block of sixteen with element j + 8
    by Box-Muller; where the size is no multiple of sixteen it draws the last sixteen again. Equal to within 5e-7
    (the last bits of logarithm and cosine are the library's).
    """

    def __init__(self, seed: int) -> None:
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)

    def normal(self, shape: Sequence[int]) -> F32:
        """The next call's values. Raises BadRequest below sixteen elements, where torch takes another path."""
        size = math.prod(shape)
        if size < _TORCH_BLOCK:
            raise BadRequest(f"torch-cpu noise needs at least 16 values in a draw, not {size}; use the philox mode")
        uniform = self._uniform(size)
        out = np.empty(size, np.float32)
        whole = size - size % _TORCH_BLOCK
        out[:whole] = _box_muller(uniform[:whole])
        if whole != size:
            out[-_TORCH_BLOCK:] = _box_muller(self._uniform(_TORCH_BLOCK))
        return out.reshape(shape)

    def _uniform(self, size: int) -> F32:
        words: U32 = self._words.randint(0, 1 << 32, size=size, dtype=np.uint32)
        return np.asarray((words & np.uint32(0xFFFFFF)) * 2.0**-24, np.float32)


def _box_muller(uniform: F32) -> F32:
    """Blocks of sixteen uniforms to blocks of sixteen normals, in float32 as torch computes them."""
    u = uniform.reshape(-1, 2, _TORCH_BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - u[:, 0]))
    angle = np.float32(2 * np.pi) * u[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


class PhiloxNoise:
    """Counter-based noise: image k has stream `first + k`, so it is the same alone and in any batch."""

    def __init__(self, seed: int, first: int = 0) -> None:
        self._seed, self._first = seed, first

    def normal(self, shape: Sequence[int], draw: int) -> F32:
        """Unit normals (batch, ...), each image from its own stream. Raises BadRequest."""
        batch, *rest = shape
        return np.stack([philox_normal(rest, self._seed, draw, self._first + k) for k in range(batch)])

    def uniform(self, shape: Sequence[int], draw: int, purpose: Purpose) -> F64:
        """Uniforms in (0, 1) of shape (batch, ...), each image from its own stream of this purpose.

        Raises:
            BadRequest: the purpose of normals, whose words these would be, or an image number of 2^28 and more.
        """
        batch, *rest = shape
        if purpose == Purpose.NORMAL:
            raise BadRequest("uniforms of purpose NORMAL would repeat the words of normals; name what they are for")
        if self._first + batch > 1 << _IMAGE_BITS:
            raise BadRequest(f"image {self._first + batch - 1} has no stream of uniforms; they end at 2^{_IMAGE_BITS}")
        high = int(purpose) << _IMAGE_BITS
        return np.stack([philox_uniform(rest, self._seed, draw, high | (self._first + k)) for k in range(batch)])


class TorchNoise:
    """diffusers' order: one CPU generator fills the whole batch, draw after draw; `draw` is not an address here."""

    def __init__(self, seed: int, first: int = 0) -> None:
        if first:
            raise BadRequest("torch-cpu noise cannot make one image of a batch alone; use the philox mode")
        self._stream = TorchCPUNormal(seed)

    def normal(self, shape: Sequence[int], draw: int) -> F32:  # noqa: ARG002
        """The generator's next values: the order of calls is the address. Raises BadRequest."""
        return self._stream.normal(shape)

    def uniform(self, shape: Sequence[int], draw: int, purpose: Purpose) -> F64:  # noqa: ARG002
        """Refused: torch's order of draws inside a token sampler is not rebuilt. Raises BadRequest."""
        raise BadRequest("torch-cpu noise has no uniforms for samplers of tokens; use the philox mode")


NOISE: dict[str, Callable[[int, int], NoiseSource]] = {"philox": PhiloxNoise, "torch-cpu": TorchNoise}


def open_noise(mode: str, seed: int, first: int = 0) -> NoiseSource:
    """The noise source of a seed mode; `first` is the batch index of the first image.

    Raises:
        BadRequest: an unknown mode, a seed outside [0, 2^64), or `first` in a mode without addresses.
    """
    if mode not in NOISE:
        raise BadRequest(f"no seed mode {mode!r}; known: {', '.join(NOISE)}")
    if not 0 <= seed < 1 << 64:
        raise BadRequest(f"seed is {seed}; it must be at least 0 and below 2^64")
    return NOISE[mode](seed, first)
