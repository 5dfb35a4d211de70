"""A unit at a choice is in torch what it is in ONNX Runtime's trials; roundings are those of other libraries."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.export import probe_rounding as rounding
from edgekit.quant.graph import find_units, weight_matrix
from edgekit.quant.lower.common import rtn_store
from edgekit.quant.targets import TARGETS
from edgekit.quant.trial import open_trial
from tests.export.toy_graphs import chain_feeds, linear_chain, ranges_of

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("device", ["trt", "cpu:any"])
@pytest.mark.parametrize("choice", ["w8a8", "w8a8-row", "fp8", "nvfp4", "w4a16-32", "bf16"])
def test_a_unit_alone_is_what_onnx_runtime_tries(tmp_path: Path, device: str, choice: str) -> None:
    """On each engine, rounded weights and activations give the trial's output of the same unit."""
    target = replace(TARGETS[device], allowed=lambda _: ("fp32", choice))
    model, calls = linear_chain(), chain_feeds(1, batch=5)
    unit = find_units(model)[0]
    x = calls[0].feeds["x"]
    # narrower than what is met, so that something is cut off
    ranges = {name: (0.8 * low, 0.8 * high) for name, (low, high) in ranges_of(model, calls).items()}
    session = open_trial(model, (unit,), ranges, target, tmp_path, threads=1)
    session.set({unit.id: choice})
    run = rounding.as_chosen(
        next(iter(model.graph)),
        unit,
        weight_matrix(model, unit),
        target.choice(choice),
        target,
        ranges,
        rtn_store,
    )
    assert run is not None
    last = weight_matrix(model, find_units(model)[1]).T
    ours = run(torch.from_numpy(x), None).numpy() @ last
    theirs = session.run({"x": x})["out0"]
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


ARRAYS = st.builds(
    lambda seed, rows, size, spread: (
        np.random.default_rng(seed).standard_normal((rows, size))
        * np.exp(np.random.default_rng(seed + 1).uniform(-spread, spread, (rows, 1)))
    ).astype(np.float32),
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.integers(1, 70),
    st.floats(0, 4),
)


@settings(deadline=None, max_examples=60)
@given(ARRAYS, st.floats(0.3, 1.5), st.booleans())
def test_one_scale_is_what_numpy_rounds(x: np.ndarray, share: float, symmetric: bool) -> None:
    """Codes stay in 8 bits, 0 stays 0, and inside the range nothing moves by more than half a step."""
    low, high = min(float(x.min()), 0.0) * share, max(float(x.max()), 0.0) * share
    found = rounding.round_static(torch.from_numpy(x), (low, high), symmetric).numpy()
    step = max(-low, high) / 127 if symmetric else (high - low) / 255
    zero = 0 if symmetric else np.rint(-low / step)
    least, most = (-128, 127) if symmetric else (0, 255)
    twin = (np.clip(np.rint(x / step) + zero, least, most) - zero) * step
    np.testing.assert_allclose(found, twin, atol=1.001 * step)  # a tie may fall either way
    assert (np.abs(found - twin) > 1e-3 * step).mean() < 0.1
    assert rounding.round_static(torch.zeros(1), (low, high), symmetric).item() == 0


@settings(deadline=None, max_examples=60)
@given(ARRAYS, st.sampled_from([0, 8, 32]))
def test_a_scale_per_token_or_block_sees_nothing_else(x: np.ndarray, block: int) -> None:
    """Each block's error is at most half of its own largest magnitude over 127, and rounding twice changes nothing."""
    found = rounding.round_rows(torch.from_numpy(x), block).numpy()
    size = block or x.shape[1]
    for start in range(0, x.shape[1], size):
        part = slice(start, start + size)
        step = np.abs(x[:, part]).max(1, keepdims=True) / 127
        assert (np.abs(found[:, part] - x[:, part]) <= 0.501 * step).all()
    again = rounding.round_rows(torch.from_numpy(found), block).numpy()
    np.testing.assert_allclose(again, found, rtol=1e-5, atol=1e-7)
    assert rounding.round_rows(torch.zeros(2, 40), block).abs().max() == 0


@settings(deadline=None, max_examples=60)
@given(ARRAYS)
def test_small_floats_are_those_of_ml_dtypes(x: np.ndarray) -> None:
    """E4M3 with one scale, and E2M1 with two levels of scales, by another library's conversions."""
    reach = float(np.abs(x).max())
    scale = np.float32(reach / 448)
    found = rounding.round_fp8(torch.from_numpy(x), (-reach, reach)).numpy()
    twin = (x / scale).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    assert np.mean(np.abs(found - twin) > 1e-5 * reach) < 0.05  # a division may round to the other side of a tie

    whole = np.float32(reach / (448 * 6))
    blocks = np.pad(x, ((0, 0), (0, -x.shape[1] % 16))).reshape(len(x), -1, 16)
    steps = (np.abs(blocks).max(-1, keepdims=True) / whole / 6).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    steps = steps * whole
    codes = (blocks / np.where(steps > 0, steps, np.inf)).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn)
    fours = (codes.astype(np.float32) * steps).reshape(len(x), -1)[:, : x.shape[1]]
    found = rounding.round_fp4(torch.from_numpy(x), (-reach, reach)).numpy()
    assert np.mean(np.abs(found - fours) > 1e-5 * reach) < 0.05
