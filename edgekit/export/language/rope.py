"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and its context extensions, as one table of frequencies.

Whatever the scheme, a rotation is `angle = position * inverse_frequency`, cosine and sine times one factor. A scheme
that changes the frequencies with the length of the text (dynamic NTK, LongRoPE) is exact only up to the length where it
would switch: the context is limited to that, never approximated past it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import BadSource
from edgekit.export.language.config import Config

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Rope:
    """`dim` leading channels of each head are rotated, pair (j, j + dim/2) by position * inverse_frequencies[j].

    `scale` multiplies cosine and sine; `context` is the length up to which these numbers hold.
    """

    dim: int
    inverse_frequencies: tuple[float, ...]
    context: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.dim <= 0 or self.dim % 2 or len(self.inverse_frequencies) != self.dim // 2:
            raise BadSource(f"rotary dimension {self.dim} with {len(self.inverse_frequencies)} frequencies")

    def tables(self, length: int, dtype: np.dtype[Any]) -> tuple[Array, Array]:
        """Cosine and sine, each (length, dim/2), angles in float32 as the reference computes them."""
        positions = np.arange(length, dtype=np.float32)
        angles = positions[:, None] * np.asarray(self.inverse_frequencies, np.float32)
        scale = np.float32(self.scale)
        return (np.cos(angles) * scale).astype(dtype), (np.sin(angles) * scale).astype(dtype)


Scheme = Callable[[Config, float, int, int], tuple[Array, float, int]]


def _plain(theta: float, dim: int) -> Array:
    frequencies: Array = 1 / np.float32(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    return frequencies


def _default(_params: Config, theta: float, dim: int, context: int) -> tuple[Array, float, int]:
    return _plain(theta, dim), 1.0, context


def _linear(params: Config, theta: float, dim: int, context: int) -> tuple[Array, float, int]:
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595)."""
    return _plain(theta, dim) / np.float32(params.number("factor")), 1.0, context


def _dynamic(params: Config, theta: float, dim: int, context: int) -> tuple[Array, float, int]:
    """Dynamic NTK: the plain frequencies up to the trained context, which is where we stop."""
    params.number("factor")
    return _plain(theta, dim), 1.0, context


def _llama3(params: Config, theta: float, dim: int, context: int) -> tuple[Array, float, int]:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear blend between."""
    plain = _plain(theta, dim)
    factor, low, high = (params.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = params.integer("original_max_position_embeddings", context) * plain / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - blend) * plain / factor + blend * plain).astype(np.float32), 1.0, context


def _yarn(params: Config, theta: float, dim: int, context: int) -> tuple[Array, float, int]:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): interpolate slow channels, keep fast ones, sharpen attention."""
    original = params.integer("original_max_position_embeddings", context)
    factor = params.number("factor", context / original)
    ends = [
        dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (params.number("beta_fast", 32.0), params.number("beta_slow", 1.0))
    ]
    if params.flag("truncate", True):
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], dim - 1)
    span = high - low or 0.001
    keep = 1 - np.clip((np.arange(dim // 2, dtype=np.float32) - low) / span, 0, 1)
    plain = _plain(theta, dim)
    frequencies = (plain / factor * (1 - keep) + plain * keep).astype(np.float32)
    return frequencies, _yarn_scale(params, factor), context


def _yarn_scale(params: Config, factor: float) -> float:
    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, mscale_all = params.number("mscale", 0.0), params.number("mscale_all_dim", 0.0)
    paired = temperature(mscale) / temperature(mscale_all) if mscale and mscale_all else temperature(1.0)
    return params.number("attention_factor", paired)


def _longrope(params: Config, theta: float, dim: int, context: int) -> tuple[Array, float, int]:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): the short factors, and the context they hold for."""
    original = params.integer("original_max_position_embeddings", context)
    params.get("long_factor")  # used only past `original`, where the context ends here
    short = np.asarray(params.get("short_factor", []), np.float32)
    if short.shape != (dim // 2,):
        raise BadSource(f"{params.where}: short_factor must hold {dim // 2} numbers, not {short.shape}")
    factor = params.number("factor", context / original)
    scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return _plain(theta, dim) / short, params.number("attention_factor", scale), min(context, original)


ROPE_TYPES: dict[str, Scheme] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def read_rope(params: Config, *, theta: float, head_dim: int, context: int, partial: float | None = None) -> Rope:
    """One rope from one parameter object, as transformers 5 writes it (`rope_parameters`) or 4 did (`rope_scaling`).

    Args:
        params: the object; keys nobody knows are refused.
        theta: base wavelength where the object has none.
        head_dim: channels per head.
        context: the model's `max_position_embeddings`.
        partial: share of the channels that is rotated; None for a family that always rotates all.

    Raises:
        UnsupportedModel: an unknown rope type or parameter, by name.
        BadSource: a parameter is missing or malformed.
    """
    kind = params.get("type", "default")  # read both, so that neither is refused; the newer name wins
    kind = params.get("rope_type", kind)
    if kind not in ROPE_TYPES:
        raise params.refuse(
            "rope_type" if "rope_type" in params.values else "type", f"Known rope types: {', '.join(ROPE_TYPES)}."
        )
    share = params.number("partial_rotary_factor", 1.0 if partial is None else partial)
    if partial is None and share != 1.0:
        raise params.refuse("partial_rotary_factor", "This family rotates whole heads.")
    dim = int(head_dim * share)
    frequencies, scale, limit = ROPE_TYPES[kind](params, params.number("rope_theta", theta), dim, context)
    params.finish()
    return Rope(dim, tuple(float(f) for f in frequencies), limit, scale)
