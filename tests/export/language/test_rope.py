"""Rotary tables are those of transformers, scheme by scheme."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgekit.errors import BadSource
from edgekit.export.language.config import Config
from edgekit.export.language.rope import ROPE_TYPES, Rope, read_rope

CONTEXT, HEAD = 512, 32

SCHEMES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
        "truncate": False,
    },
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256, "attention_factor": 1.25},
    {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "short_factor": [1 + i / 16 for i in range(HEAD // 2)],
        "long_factor": [4.0] * (HEAD // 2),
    },
]


def read(params: dict[str, Any], **options: Any) -> Rope:
    return read_rope(Config(dict(params), "rope"), theta=1e4, head_dim=HEAD, context=CONTEXT, **options)


def test_every_scheme_is_compared() -> None:
    """The comparisons below cover the table of rope types."""
    assert {scheme["rope_type"] for scheme in SCHEMES} == set(ROPE_TYPES)


@pytest.mark.torch
@pytest.mark.parametrize("params", SCHEMES, ids=lambda params: params["rope_type"])
def test_frequencies_equal_transformers(params: dict[str, Any]) -> None:
    """Inverse frequencies and the factor on cosine and sine agree with transformers' own to float32 rounding."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=4 * HEAD,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        rope_parameters=params | {"rope_theta": 1e4},
    )
    wanted, rope = LlamaRotaryEmbedding(config), read(params)
    np.testing.assert_allclose(rope.inverse_frequencies, wanted.inv_freq.numpy(), rtol=1e-6)
    assert rope.scale == pytest.approx(wanted.attention_scaling, rel=1e-6)


def test_tables_hold_cosine_and_sine() -> None:
    """Row p of the tables is the rotation at position p, scaled."""
    rope = Rope(4, (1.0, 0.5), 8, scale=2.0)
    cosine, sine = rope.tables(8, np.dtype(np.float32))
    angles = np.arange(8)[:, None] * np.array([1.0, 0.5])
    np.testing.assert_allclose(cosine, 2 * np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sine, 2 * np.sin(angles), atol=1e-6)


def test_longrope_ends_where_its_short_factors_do() -> None:
    """Past the original context LongRoPE changes every frequency, so the context stops there."""
    assert read(SCHEMES[-1]).context == 128
    assert read(SCHEMES[0]).context == CONTEXT


def test_partial_rotation_narrows_the_table() -> None:
    """A quarter of 32 channels rotates 8 of them; the parameter object goes before the family's value."""
    assert read({}, partial=0.25).dim == 8
    assert read({"partial_rotary_factor": 0.5}, partial=0.25).dim == 16


@pytest.mark.parametrize("factors", [[1.0], None, [1.0] * 17])
def test_longrope_factors_must_fit(factors: list[float] | None) -> None:
    """One factor per rotated pair, or the source is malformed."""
    with pytest.raises(BadSource, match="short_factor"):
        read(SCHEMES[-1] | {"short_factor": factors})


def test_a_rope_without_pairs_is_refused() -> None:
    """An odd number of rotated channels, or a missing frequency, cannot be born."""
    with pytest.raises(BadSource, match="rotary"):
        Rope(3, (1.0,), 8)
    with pytest.raises(BadSource, match="rotary"):
        Rope(4, (1.0,), 8)
