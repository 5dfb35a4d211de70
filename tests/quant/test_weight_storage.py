"""Stored matrices: bounded in error, as large as declared, and the same to the engine's own packer and operator."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from onnxruntime.capi._pybind_state import quantize_matmul_2bits, quantize_matmul_4bits, quantize_matmul_8bits

from edgekit.errors import BadRequest
from edgekit.quant.choices import CHOICES, Choice, WeightFormat
from edgekit.quant.precision import pack_blocks, unpack_codes
from edgekit.quant.rounding import ROUNDINGS
from edgekit.quant.weights import E2M1_MAX, Stored, pack_nbits, pack_zeros, restore, store, stored_bytes
from edgekit.runtime.backends import open_session

ENGINES_OWN = {2: quantize_matmul_2bits, 4: quantize_matmul_4bits, 8: quantize_matmul_8bits}
SHAPES = [(64, 256), (17, 80), (33, 33), (40, 16), (1, 1), (3, 32), (5, 576)]
EVERY = pytest.mark.parametrize("choice", CHOICES.values(), ids=lambda row: row.name)
INTEGERS = [row for row in CHOICES.values() if row.weight.kind == "int"]
BLOCKED = [
    Choice(f"int{bits}-{block}{'-zero' if zero else ''}", WeightFormat("int", bits, block, zero=zero))
    for bits in (2, 4, 8)
    for block in (32, 128)
    for zero in (False, True)
]
IN_BLOCKS = pytest.mark.parametrize("choice", BLOCKED, ids=lambda row: row.name)
MATRICES = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=2, max_side=40),
    elements=st.floats(-100, 100, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0),
)


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Weights of the usual kind."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def obvious_meaning(stored: Stored) -> np.ndarray:
    """The slow twin of `restore`: weight by weight, in double precision."""
    n, k = stored.codes.shape
    out = np.empty((n, k))
    for i in range(n):
        for j in range(k):
            block = j // (stored.format.block or k)
            scale = 1.0 if stored.scales is None else float(stored.scales[i, block])
            zero = 0 if stored.zeros is None else int(stored.zeros[i, block])
            out[i, j] = (float(stored.codes[i, j]) - zero) * scale * stored.tensor_scale
    return out


def engines_own(matrix: np.ndarray, form: WeightFormat) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and zero points that ONNX Runtime's quantizer makes of the same matrix."""
    n, k = matrix.shape
    blocks = form.blocks(k)
    codes = np.zeros((n, blocks, form.block * form.bits // 8), np.uint8)
    scales = np.zeros(n * blocks, np.float32)
    zeros = np.zeros(n * -(-blocks * form.bits // 8), np.uint8)
    transposed = np.ascontiguousarray(matrix.T)
    ENGINES_OWN[form.bits](codes, transposed, scales, zeros, form.block, n, k, not form.zero)
    return codes, scales.reshape(n, blocks), zeros.reshape(n, -1)


def without_tail(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Packed rows with the bits after `count` codes cleared: the engine leaves noise there that it never reads."""
    rows = packed.reshape(len(packed), -1).copy()
    whole, rest = divmod(count * bits, 8)
    if rest:
        rows[:, whole] &= (1 << rest) - 1
    rows[:, whole + bool(rest) :] = 0
    return rows


def assert_engines_own(matrix: np.ndarray, choice: Choice) -> None:
    """Equal scales, codes and zero points, byte for byte."""
    stored = store(matrix, choice)
    codes, scales, zeros = engines_own(matrix, choice.weight)
    bits, k = choice.weight.bits, matrix.shape[1]
    np.testing.assert_array_equal(stored.scales, scales)
    np.testing.assert_array_equal(without_tail(pack_nbits(stored), k, bits), without_tail(codes, k, bits))
    mine = pack_zeros(stored)
    assert (mine is None) is (not choice.weight.zero)
    if mine is not None:
        blocks = choice.weight.blocks(k)
        np.testing.assert_array_equal(without_tail(mine, blocks, bits), without_tail(zeros, blocks, bits))


@pytest.mark.parametrize("shape", SHAPES)
@IN_BLOCKS
def test_packing_is_the_engines_own(choice: Choice, shape: tuple[int, int]) -> None:
    """Byte for byte ONNX Runtime's packer at 2, 4 and 8 bits: ties, a row of zeros, one-sided rows, K off the block."""
    matrix = normal(shape)
    matrix[0] = 0
    assert_engines_own(matrix, choice)
    assert_engines_own(np.round(matrix * 4) / 4, choice)
    assert_engines_own(np.abs(matrix) + 1, choice)


@settings(max_examples=15, deadline=None)
@given(matrix=MATRICES)
@IN_BLOCKS
def test_any_matrix_packs_as_the_engine_packs_it(choice: Choice, matrix: np.ndarray) -> None:
    """The same holds for matrices hypothesis thinks of."""
    assert_engines_own(matrix, choice)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_language_exports_and_units_pack_alike(bits: int) -> None:
    """The language exporter's `pack_blocks` and `store` make the same bytes, and its unpacking reads them back."""
    matrix = normal((9, 70))
    stored = store(matrix, Choice("x", WeightFormat("int", bits, 32)))
    packed = pack_blocks(matrix, bits, 32)
    np.testing.assert_array_equal(packed.scales, stored.scales)
    values = pack_nbits(stored)
    np.testing.assert_array_equal(unpack_codes(values, 70, bits), stored.codes)
    np.testing.assert_array_equal(without_tail(packed.values, 70, bits), without_tail(values, 70, bits))


def matmul_nbits(stored: Stored, path: Path) -> ir.Model:
    """A graph of one MatMulNBits in float arithmetic."""
    n, k = stored.codes.shape
    form = stored.format
    tensors = {"b": pack_nbits(stored), "scales": stored.scales, "zeros": pack_zeros(stored)}
    values = [
        ir.Value(name=name, const_value=ir.tensor(tensor, name=name))
        for name, tensor in tensors.items()
        if tensor is not None
    ]
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", k]))
    attributes = {"K": k, "N": n, "bits": form.bits, "block_size": form.block, "accuracy_level": 1}
    node = ir.node("MatMulNBits", [x, *values], attributes, domain="com.microsoft", num_outputs=1)
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["rows", n])
    graph = ir.Graph([x], [y], nodes=[node], initializers=values, opset_imports={"": 21, "com.microsoft": 1}, name="g")
    model = ir.Model(graph, ir_version=10)
    ir.save(model, path)
    return model


@pytest.mark.parametrize("rounding", ["rtn", "search"])
@pytest.mark.parametrize("shape", [(16, 128), (24, 208), (8, 48)])
@IN_BLOCKS
def test_the_operator_multiplies_by_what_is_restored(
    choice: Choice, shape: tuple[int, int], rounding: str, tmp_path: Path
) -> None:
    """MatMulNBits fed the packed bytes is a product with `restore`, to float32 rounding, whatever the bits."""
    stored = store(normal(shape), choice, rounding=rounding)
    matmul_nbits(stored, tmp_path / "m.onnx")
    x = normal((5, shape[1]), seed=1)
    y = open_session(tmp_path / "m.onnx", threads=1).run({"x": x})["y"]
    wanted = x @ restore(stored).T
    assert np.abs(y - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("rounding", ["rtn", "search"])
@pytest.mark.parametrize("shape", [(6, 64), (7, 77), (1, 1), (3, 300)])
@EVERY
def test_declared_bytes_are_the_stored_bytes(choice: Choice, shape: tuple[int, int], rounding: str) -> None:
    """A choice's `bytes`, which budgets are made of, is what storing takes, zero points included."""
    stored = store(normal(shape), choice, rounding=rounding)
    assert stored_bytes(stored) == choice.weight.bytes(*shape)
    if choice.weight.kind != "int":
        return
    padded = dataclasses.replace(choice.weight, zero=True)
    with_zeros = store(normal(shape), Choice("x", padded), rounding=rounding)
    assert stored_bytes(with_zeros) == padded.bytes(*shape) > choice.weight.bytes(*shape)


@IN_BLOCKS
def test_declared_bytes_are_the_packed_bytes(choice: Choice) -> None:
    """What MatMulNBits is fed weighs what the choice declares, K off the block included."""
    stored = store(normal((7, 300)), choice)
    zeros = pack_zeros(stored)
    assert stored.scales is not None
    fed = pack_nbits(stored).nbytes + stored.scales.nbytes + (0 if zeros is None else zeros.nbytes)
    assert fed == choice.weight.bytes(7, 300)


@settings(max_examples=10, deadline=None)
@given(matrix=MATRICES)
@pytest.mark.parametrize("code_bits", [7, 8])
@EVERY
def test_restored_weights_are_within_a_step(choice: Choice, code_bits: int, matrix: np.ndarray) -> None:
    """Integers come back within a step (half a step where scales are positive), floats within their last bit."""
    stored = store(matrix, choice, code_bits=code_bits)
    error = np.abs(restore(stored).astype(np.float64) - matrix)
    if choice.weight.kind == "int":
        assert stored.scales is not None
        step = np.abs(np.repeat(stored.scales, choice.weight.block or matrix.shape[1], axis=1))[:, : matrix.shape[1]]
        steps = 1.0 if choice.activation == "float" else 0.5
        least = 2**-25 * 128 if choice.weight.scale_bits == 16 else 0.0  # half of float16's least step, by the codes
        assert (error <= steps * 1.001 * step + 1e-6 + least).all()
        return
    relative = {"fp32": 0.0, "fp16": 2**-11, "bf16": 2**-8, "fp8": 2**-4, "nvfp4": 2**-2}[choice.name]
    largest = float(np.abs(matrix).max())
    # Below the least normal number the error is absolute; a block scale of E4M3 is itself off by a sixteenth.
    floor = {"fp32": 0.0, "fp16": 2**-25, "bf16": 0.0, "fp8": largest * 2**-18, "nvfp4": largest / 5}[choice.name]
    assert (error <= relative * np.abs(matrix) * 1.001 + floor * 1.001).all()


@EVERY
def test_restoring_is_codes_times_scales(choice: Choice) -> None:
    """`restore` is the formula of the module, weight by weight."""
    for matrix in (normal((5, 40)), normal((2, 129), 1) + 1):
        stored = store(matrix, choice)
        np.testing.assert_allclose(restore(stored), obvious_meaning(stored), rtol=3e-7, atol=0)


@IN_BLOCKS
def test_restoring_takes_zero_points_off(choice: Choice) -> None:
    """The same with zero points, whose weights all lie on one side."""
    stored = store(np.abs(normal((4, 70))) + 0.5, choice)
    np.testing.assert_allclose(restore(stored), obvious_meaning(stored), rtol=3e-7, atol=0)


@EVERY
def test_storing_what_is_stored_changes_nothing(choice: Choice) -> None:
    """Meaning is a fixed point: store, restore, store gives the same meaning."""
    once = restore(store(normal((6, 96)), choice))
    np.testing.assert_allclose(restore(store(once, choice)), once, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("code_bits", [7, 8])
@pytest.mark.parametrize("choice", INTEGERS, ids=lambda row: row.name)
def test_codes_keep_to_their_bits(choice: Choice, code_bits: int, rounding: str) -> None:
    """Codes that meet integers have the target's bits, the others their own, and positive scales where they must."""
    moments = np.diag(np.square(normal((96,), 3))).astype(np.float32)
    stored = store(normal((6, 96)), choice, code_bits=code_bits, importance=moments, rounding=rounding)
    assert stored.codes.dtype == np.int8
    assert stored.code_bits == (code_bits if choice.activation != "float" else choice.weight.bits)
    assert stored.codes.min() >= -(1 << (stored.code_bits - 1))
    assert stored.codes.max() < 1 << (stored.code_bits - 1)
    assert stored.scales is not None
    assert stored.scales.shape == (6, choice.weight.blocks(96))
    assert choice.activation == "float" or (stored.scales > 0).all()


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("choice", INTEGERS, ids=lambda row: row.name)
def test_positive_scales_on_request(choice: Choice, rounding: str) -> None:
    """With `positive` every scale is above 0, that of a block of zeros too, and no weight is cut off by rtn."""
    matrix = normal((6, 96))
    matrix[1] = 0
    matrix[2] = -np.abs(matrix[2])
    matrix[3, :40] = np.float32(1e-42)
    moments = np.eye(96, dtype=np.float32)
    stored = store(matrix, choice, rounding=rounding, positive=True, importance=moments)
    assert stored.scales is not None
    assert (stored.scales > 0).all()
    assert (stored.codes[1] == 0).all()
    if rounding == "rtn":
        step = np.repeat(stored.scales, choice.weight.block or 96, axis=1)[:, :96]
        assert (np.abs(restore(stored) - matrix) <= 0.501 * step).all()


@EVERY
def test_zeros_and_vanishing_weights_store_as_zeros(choice: Choice) -> None:
    """A matrix of zeros is zeros again, and numbers no scale can divide by come back as next to nothing, unwarned."""
    assert not restore(store(np.zeros((3, 40), np.float32), choice)).any()
    vanishing = np.full((3, 40), 2e-44, np.float32)
    assert np.abs(restore(store(vanishing, choice))).max() < 1e-36


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("choice", [*INTEGERS, CHOICES["fp8"], CHOICES["nvfp4"]], ids=lambda row: row.name)
def test_relative_error_does_not_depend_on_size(choice: Choice, large: bool) -> None:
    """Scaling a matrix scales what is restored: nothing overflows or vanishes on the way, as far as scales reach."""
    reach = (2.0**-8, 2.0**12) if choice.weight.scale_bits == 16 else (1e-30, 1e29)
    size = reach[large]
    for rounding in ("rtn", "search"):
        plain = restore(store(normal((4, 64)), choice, rounding=rounding))
        scaled = restore(store(normal((4, 64)) * np.float32(size), choice, rounding=rounding))
        np.testing.assert_allclose(scaled / size, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rounding", ["rtn", "search", "gptq"])
@pytest.mark.parametrize("choice", [each for each in INTEGERS if each.weight.block], ids=lambda row: row.name)
def test_scales_of_blocks_are_numbers_that_float16_holds(choice: Choice, rounding: str) -> None:
    """So nothing is rounded again when they are written; those it cannot hold are refused."""
    moments = np.eye(200, dtype=np.float32) + 0.5
    stored = store(normal((6, 200)), choice, importance=moments, rounding=rounding)
    assert stored.scales is not None
    np.testing.assert_array_equal(stored.scales, stored.scales.astype(np.float16).astype(np.float32))
    with pytest.raises(BadRequest, match="65504"):
        store(normal((6, 200)) * np.float32(1e8), choice, importance=moments, rounding=rounding)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@EVERY
def test_weights_that_are_no_numbers_are_refused(choice: Choice, bad: float) -> None:
    """An infinity or a NaN is refused by every choice, before anything is stored."""
    matrix = normal((3, 40))
    matrix[1, 7] = bad
    with pytest.raises(BadRequest, match="not finite"):
        store(matrix, choice)


def test_weights_that_do_not_fit_are_refused() -> None:
    """fp16 refuses what it would turn into infinity, codes refuse absurd sizes; fp32 takes both."""
    with pytest.raises(BadRequest, match="more than fp16 holds"):
        store(np.full((1, 2), 70000, np.float32), CHOICES["fp16"])
    with pytest.raises(BadRequest, match="no scale fits"):
        store(np.full((1, 2), 1e35, np.float32), CHOICES["w8a16"])
    assert restore(store(np.full((1, 2), 1e35, np.float32), CHOICES["fp32"])).max() == np.float32(1e35)


def test_malformed_requests_are_refused() -> None:
    """No matrix, an unknown rounding or float type, and packing what MatMulNBits cannot take, say what is wrong."""
    with pytest.raises(BadRequest, match=r"shape \(n, k\)"):
        store(np.zeros(4, np.float32), CHOICES["fp32"])
    with pytest.raises(BadRequest, match=r"shape \(n, k\)"):
        store(np.zeros((0, 4), np.float32), CHOICES["w8a8"])
    with pytest.raises(BadRequest, match="known: rtn, search, gptq"):
        store(normal((2, 4)), CHOICES["w8a8"], rounding="best")
    with pytest.raises(BadRequest, match="known: fp32, fp16, bf16"):
        store(normal((2, 4)), Choice("fp24", WeightFormat("float", 24)))
    for name in ("w8a8", "fp16", "nvfp4"):
        with pytest.raises(BadRequest, match="integers in blocks"):
            pack_nbits(store(normal((2, 16)), CHOICES[name]))


def test_floats_are_rounded_as_their_types_round() -> None:
    """fp16, bf16 and fp8 codes are exactly the type's own numbers; fp32 is the matrix itself."""
    matrix = normal((5, 48))
    np.testing.assert_array_equal(store(matrix, CHOICES["fp32"]).codes, matrix)
    np.testing.assert_array_equal(store(matrix, CHOICES["fp16"]).codes, matrix.astype(np.float16))
    np.testing.assert_array_equal(
        store(matrix, CHOICES["bf16"]).codes, matrix.astype(ml_dtypes.bfloat16).astype(np.float32)
    )
    eight = store(matrix, CHOICES["fp8"])
    np.testing.assert_array_equal(eight.codes, eight.codes.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert np.abs(eight.codes).max() == 448


def test_four_bit_floats_have_two_levels_of_scales() -> None:
    """nvfp4 codes are E2M1's, scales are E4M3's and never 0, and the largest weight comes back nearly as it was."""
    matrix = normal((9, 70))
    matrix[0] = 0
    matrix[1] *= 1e-6
    stored = store(matrix, CHOICES["nvfp4"])
    assert stored.scales is not None
    np.testing.assert_array_equal(stored.codes, stored.codes.astype(ml_dtypes.float4_e2m1fn).astype(np.float32))
    np.testing.assert_array_equal(stored.scales, stored.scales.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert stored.scales.min() > 0
    assert stored.scales.max() == 448
    assert np.abs(stored.codes).max() == E2M1_MAX
    largest = np.abs(matrix).argmax()
    assert restore(stored).flat[largest] == pytest.approx(matrix.flat[largest], rel=1e-5)


@EVERY
def test_a_matrix_is_stored_the_same_every_time(choice: Choice) -> None:
    """Storing is deterministic, leaves the matrix alone, and does not depend on how many rows come together."""
    matrix = normal((37, 64))
    before = matrix.copy()
    first, again = store(matrix, choice, rounding="search"), store(matrix, choice, rounding="search")
    np.testing.assert_array_equal(first.codes, again.codes)
    np.testing.assert_array_equal(matrix, before)
    if choice.weight.kind not in ("fp8", "fp4"):  # whose scale is the whole matrix's
        np.testing.assert_array_equal(store(matrix[:5], choice, rounding="search").codes, first.codes[:5])


def test_working_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large matrices are stored, restored and packed a few rows at a time, with the same result."""
    matrix = normal((23, 70))
    chosen = [*CHOICES.values(), *BLOCKED]
    whole = [store(matrix, choice) for choice in chosen]
    meant = [restore(stored) for stored in whole]
    packed = [pack_nbits(stored) for stored in whole if stored.format.kind == "int" and stored.format.block]
    monkeypatch.setattr("edgekit.quant.precision._CHUNK", 200)
    parts = [store(matrix, choice) for choice in chosen]
    for one, other, meaning in zip(whole, parts, meant, strict=True):
        np.testing.assert_array_equal(one.codes, other.codes)
        np.testing.assert_array_equal(restore(other), meaning)
    again = [pack_nbits(stored) for stored in parts if stored.format.kind == "int" and stored.format.block]
    for one_packed, other_packed in zip(packed, again, strict=True):
        np.testing.assert_array_equal(one_packed, other_packed)
