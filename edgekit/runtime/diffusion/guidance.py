"""Guidance: how the prompt's pull is set, as functions of predictions and scales."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgekit.bundle.recipe import Dynamic

F32 = npt.NDArray[np.float32]


def classifier_free(negative: F32, positive: F32, scale: float | F32, rescale: float = 0.0) -> F32:
    """Ho & Salimans 2022: negative + scale (positive - negative), raw predictions of shape (batch, ...).

    `scale` is one number or an array that broadcasts (one per frame).

    `rescale` blends in the guided prediction brought back to the spread of the positive one, per image (Lin et al.
    2024, eq. 15-16; the spread is the sample standard deviation, as in diffusers).
    """
    guided: F32 = negative + scale * (positive - negative)
    if not rescale:
        return guided
    axes = tuple(range(1, guided.ndim))
    spread = positive.std(axis=axes, ddof=1, keepdims=True) / guided.std(axis=axes, ddof=1, keepdims=True)
    blended: F32 = rescale * (guided * spread) + (1 - rescale) * guided
    return blended


def w_embedding(scale: float, dim: int, shift: float = -1.0) -> F32:
    """The guidance scale as sines and cosines, (dim,): what a guidance-distilled network takes (Meng et al. 2023).

    The numbers are those of diffusers' `get_guidance_scale_embedding(scale + shift, dim)`. Angles reach thousands of
    radians, so one unit in the last place of a float32 frequency moves a sine by 5e-4: frequencies are computed in
    float64 and rounded once, which is what torch gives but for a few last places.
    """
    half = dim // 2
    step = np.float32(np.log(10000.0)) / np.float32(max(half - 1, 1))
    exponents = (np.arange(half, dtype=np.float32) * -step).astype(np.float64)
    frequencies = np.exp(exponents).astype(np.float32)
    angles = ((np.float32(scale) + np.float32(shift)) * np.float32(1000) * frequencies).astype(np.float64)
    embedding = np.zeros(dim, np.float32)  # an odd width ends in a zero
    embedding[:half], embedding[half : 2 * half] = np.sin(angles), np.cos(angles)
    return embedding


def dynamic_scale(t: float, scale: float, dynamic: Dynamic) -> float:
    """The scale at timestep t of 1000: full below tau1, `floor` above tau2, linear between (iCD)."""
    share = t / 1000
    if share <= dynamic.tau1:
        return scale
    if share >= dynamic.tau2:
        return dynamic.floor
    fade = (dynamic.tau2 - share) / (dynamic.tau2 - dynamic.tau1)
    return dynamic.floor + fade * (scale - dynamic.floor)
