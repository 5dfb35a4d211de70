"""Packed weights: byte for byte ONNX Runtime's own, bounded in error, and as small as declared."""

from __future__ import annotations

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

from edgekit.errors import BadRequest
from edgekit.quant import precision
from edgekit.quant.precision import PRECISIONS, Packed, Precision, block_scales, get_precision, unpack_codes

CODED = [row for row in PRECISIONS.values() if row.code_bits is not None]
BLOCKED = [row for row in CODED if row.block]
SHAPES = [(64, 256), (17, 80), (33, 33), (40, 16), (1, 1), (3, 32), (5, 576)]
WEIGHTS = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=2, max_side=24),
    elements=st.floats(-100, 100, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0),
)


def engines_own(weight: np.ndarray, row: Precision) -> Packed:
    """What ONNX Runtime's quantizer makes of the same matrix."""
    assert row.code_bits is not None
    n, k = weight.shape
    blocks = -(-k // row.block)
    values = np.zeros((n, blocks, row.block * row.code_bits // 8), np.uint8)
    scales = np.zeros(n * blocks, np.float32)
    zero_points = np.zeros(n * ((blocks * row.code_bits + 7) // 8), np.uint8)
    quantize = quantize_matmul_4bits if row.code_bits == 4 else quantize_matmul_8bits
    quantize(values, np.ascontiguousarray(weight.T), scales, zero_points, row.block, n, k, True)
    return Packed(values, scales.reshape(n, blocks))


def spread(packed: Packed, row: Precision, k: int) -> np.ndarray:
    """The scale of every weight: (N, K)."""
    assert packed.scales is not None
    return np.repeat(packed.scales, row.block_of(k), axis=1)[:, :k]


def assert_same(mine: Packed, wanted: Packed, k: int = 0) -> None:
    """Equal bytes. For int4 and an odd K, the engine leaves noise in the nibble after the last weight: not compared."""
    values = wanted.values.copy()
    if k % 2 and values.shape[-1] in (16, 64):
        values.reshape(len(values), -1)[:, k // 2] &= 15
    np.testing.assert_array_equal(mine.scales, wanted.scales)
    np.testing.assert_array_equal(mine.values, values)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("row", BLOCKED, ids=lambda row: row.name)
def test_codes_and_scales_are_the_engines_own(row: Precision, shape: tuple[int, int]) -> None:
    """Byte for byte ONNX Runtime's packing, with K no multiple of the block, rounding ties and a row of zeros."""
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    weight[0] = 0
    assert_same(row.pack(weight), engines_own(weight, row), shape[1])
    ties = np.round(weight * 4) / 4
    assert_same(row.pack(ties), engines_own(ties, row), shape[1])


@settings(max_examples=25, deadline=None)
@given(weight=WEIGHTS)
@pytest.mark.parametrize("row", BLOCKED, ids=lambda row: row.name)
def test_any_matrix_packs_as_the_engine_packs_it(row: Precision, weight: np.ndarray) -> None:
    """The same holds for matrices hypothesis thinks of."""
    assert_same(row.pack(weight), engines_own(weight, row), weight.shape[1])


@settings(max_examples=25, deadline=None)
@given(weight=WEIGHTS)
@pytest.mark.parametrize("row", CODED, ids=lambda row: row.name)
def test_rounding_is_within_a_step(row: Precision, weight: np.ndarray) -> None:
    """A weight comes back within half a step of its block's scale, a whole one at the end the codes do not reach."""
    packed = row.pack(weight)
    scales = spread(packed, row, weight.shape[1])
    step = np.abs(scales)
    error = np.abs(row.unpack(packed, weight.shape[1]) - weight)
    assert (error <= step * 1.001 + 1e-6).all()
    at_the_end = weight * np.sign(scales) > step * (2 ** (row.code_bits - 1) - 1.5)  # type: ignore[operator]
    assert (error[~at_the_end] <= 0.501 * step[~at_the_end] + 1e-6).all()


@pytest.mark.parametrize("row", CODED, ids=lambda row: row.name)
def test_packing_again_changes_nothing(row: Precision) -> None:
    """The meaning of packed weights is a fixed point: pack, unpack, pack gives the same codes."""
    weight = np.random.default_rng(1).standard_normal((9, 64)).astype(np.float32)
    packed = row.pack(weight)
    again = row.pack(row.unpack(packed, 64))
    np.testing.assert_array_equal(again.values, packed.values)


@pytest.mark.parametrize("row", PRECISIONS.values(), ids=lambda row: row.name)
def test_declared_bits_are_the_real_bytes(row: Precision) -> None:
    """`bits` is what is stored, scales of blocks included, whenever K is a multiple of the block."""
    packed = row.pack(np.ones((6, 256), np.float32))
    scales = 0 if packed.scales is None or row.per_row else packed.scales.nbytes
    assert (packed.values.nbytes + scales) * 8 == row.bits * 6 * 256


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_floats_round_trip(name: str) -> None:
    """Floats come back as their own type rounds them."""
    row = PRECISIONS[name]
    weight = np.random.default_rng(2).standard_normal((5, 7)).astype(np.float32)
    np.testing.assert_array_equal(row.unpack(row.pack(weight), 7), weight.astype(row.activations).astype(np.float32))


@pytest.mark.parametrize("row", CODED, ids=lambda row: row.name)
def test_working_in_chunks_changes_nothing(row: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large matrices are packed a few rows at a time, with the same result, and so are their scales alone."""
    weight = np.random.default_rng(3).standard_normal((23, 70)).astype(np.float32)
    whole = row.pack(weight)
    monkeypatch.setattr(precision, "_CHUNK", 200)
    assert_same(row.pack(weight), whole)
    np.testing.assert_array_equal(block_scales(weight, row.code_bits or 0, row.block_of(70)), whole.scales)


@pytest.mark.parametrize("row", CODED, ids=lambda row: row.name)
def test_signed_codes_mean_the_same(row: Precision) -> None:
    """Signed codes times scales are the unpacked weights, which is what DequantizeLinear computes."""
    weight = np.random.default_rng(4).standard_normal((4, 48)).astype(np.float32)
    packed = row.pack(weight)
    codes = unpack_codes(packed.values, 48, row.code_bits or 0).astype(np.float32)
    np.testing.assert_array_equal(codes * spread(packed, row, 48), row.unpack(packed, 48))


@pytest.mark.parametrize("row", CODED, ids=lambda row: row.name)
def test_vanishing_weights_become_zeros(row: Precision) -> None:
    """Numbers below what a float32 scale can divide by come back as zeros, without a warning."""
    weight = np.full((1, 32), 2e-44, np.float32)
    assert np.abs(row.unpack(row.pack(weight), 32)).max() < 1e-37


def test_pairs_of_row_products_fit_int16() -> None:
    """The largest activation code times the two largest weight codes adds up within int16: no engine saturates."""
    row = PRECISIONS["int8-row"]
    packed = row.pack(np.array([[1, -1, 0.5], [-3, 3, 0]], np.float32))
    codes = unpack_codes(packed.values, 3, row.code_bits or 0).astype(int)
    assert codes.min() == -64
    assert 2 * 255 * np.abs(codes).max() <= np.iinfo(np.int16).max


@pytest.mark.parametrize("bits", [4, 8])
def test_small_blocks_are_the_accurate_ones(bits: int) -> None:
    """Four times as many weights per scale save three quarters of a bit and cost a bounded share of accuracy."""
    weight = np.random.default_rng(6).standard_normal((32, 512)).astype(np.float32)

    def error(row: Precision) -> float:
        return float(np.square(row.unpack(row.pack(weight), 512) - weight).mean())

    small, large = PRECISIONS[f"int{bits}"], PRECISIONS[f"int{bits}-128"]
    assert large.bits == small.bits - 0.75
    assert error(small) < error(large) < 2.5 * error(small)


def test_a_row_has_one_scale() -> None:
    """Per row means one block per output, whatever the width, and a table in blocks that can be gathered from."""
    row = PRECISIONS["int8-row"]
    packed = row.pack(np.ones((5, 77), np.float32))
    assert packed.values.shape == (5, 1, 77)
    assert packed.scales is not None
    assert packed.scales.shape == (5, 1)
    assert get_precision(row.table).block
    assert [name for name, other in PRECISIONS.items() if other.per_row] == ["int8-row"]


def test_bfloat16_weights_pack_as_their_values() -> None:
    """A bfloat16 checkpoint's matrix packs as the float32 matrix of the same numbers."""
    import ml_dtypes

    half = np.random.default_rng(5).standard_normal((4, 40)).astype(ml_dtypes.bfloat16)
    row = PRECISIONS["int4"]
    assert_same(row.pack(half), row.pack(half.astype(np.float32)))


def test_unknown_precision_lists_the_known() -> None:
    """A precision nobody has is refused with the names that exist."""
    with pytest.raises(BadRequest, match="fp32, fp16, int8, int8-128, int8-row, int4, int4-128"):
        get_precision("int3")
