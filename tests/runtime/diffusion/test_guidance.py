"""Guidance against its formulas and against diffusers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.runtime.diffusion.guidance import classifier_free, w_embedding
from edgekit.runtime.random import PhiloxNoise
from tests.runtime.diffusion.cases import LAW, SHAPE

NEGATIVE, POSITIVE = (PhiloxNoise(1).normal(SHAPE, draw) for draw in (0, 1))


@LAW
@given(st.floats(0, 20))
def test_guidance_is_a_line_through_both_predictions(scale: float) -> None:
    """Scale 0 is the negative prediction, 1 the positive one, everything else lies on their line."""
    guided = classifier_free(NEGATIVE, POSITIVE, scale)
    wanted = NEGATIVE.astype(np.float64) + scale * (POSITIVE.astype(np.float64) - NEGATIVE)
    assert np.abs(guided - wanted).max() < 1e-5 * (1 + scale)
    assert guided.dtype == np.float32


def test_full_rescale_restores_the_spread_image_by_image() -> None:
    """At rescale 1 every image has the standard deviation of its positive prediction."""
    guided = classifier_free(NEGATIVE, POSITIVE, 9.0, rescale=1.0)
    assert guided.std(axis=(1, 2, 3)) == pytest.approx(POSITIVE.std(axis=(1, 2, 3)), rel=1e-5)
    assert classifier_free(NEGATIVE, POSITIVE, 9.0).std() > 2 * guided.std()


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescale_is_diffusers(rescale: float) -> None:
    """The blended prediction equals rescale_noise_cfg."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    plain = torch.from_numpy(classifier_free(NEGATIVE, POSITIVE, 7.5))
    theirs = rescale_noise_cfg(plain, torch.from_numpy(POSITIVE), guidance_rescale=rescale).numpy()
    assert np.abs(classifier_free(NEGATIVE, POSITIVE, 7.5, rescale) - theirs).max() < 5e-6


@pytest.mark.torch
@pytest.mark.parametrize("dim", [16, 32, 64, 256, 257, 512])
@pytest.mark.parametrize("scale", [1.0, 2.5, 8.5, 30.0])
def test_the_embedding_is_diffusers(dim: int, scale: float) -> None:
    """Within 1e-4 of get_guidance_scale_embedding: a last place of a frequency moves an angle of 29,000 that far."""
    pytest.importorskip("diffusers")
    import torch

    from tests.runtime.diffusion.reference import from_diffusers

    embed = from_diffusers("LatentConsistencyModelPipeline").get_guidance_scale_embedding
    theirs = embed(None, torch.tensor([scale - 1.0]), embedding_dim=dim)[0].numpy()
    mine = w_embedding(scale, dim)
    assert mine.shape == theirs.shape
    assert np.abs(mine - theirs).max() < 1e-4


def test_the_embedding_is_its_formula() -> None:
    """Sines, then cosines, of 1000 (scale - 1) 10000^(-i / (half - 1)); an odd width ends in a zero."""
    angles = 1000 * 1.5 * 10000.0 ** -(np.arange(4) / 3)
    wanted = np.concatenate([np.sin(angles), np.cos(angles), [0]])
    assert np.abs(w_embedding(2.5, 9) - wanted).max() < 5e-4
    assert w_embedding(2.5, 9)[-1] == 0


def test_no_guidance_is_the_embedding_of_zero() -> None:
    """At scale 1 with the usual shift every angle is zero, whatever the frequencies are."""
    assert w_embedding(1.0, 8).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert w_embedding(0.0, 8, shift=0.0).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
