"""A weight matrix as one choice stores it: `store` makes codes, `restore` says what they mean, `pack_*` lays them out.

What is stored is what is meant, for every choice alike:

    w ~ (code - zero) * scale * tensor_scale,

with one scale, and where there is one a zero point, per run of `block` weights along a row. Codes and zero points are
signed; MatMulNBits' unsigned ones are both plus 2**(bits-1). How codes and scales are chosen is a row of ROUNDINGS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from edgekit.errors import BadRequest
from edgekit.quant.choices import Choice, WeightFormat
from edgekit.quant.precision import blocked, pack_bits, row_chunks
from edgekit.quant.rounding import Grid, get_rounding

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int8]

FLOAT_TYPES: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
E4M3_MAX = np.float32(448)
E4M3_LEAST = np.float32(2**-9)  # above 0
E2M1_MAX = np.float32(6)
HALF = 16  # bits of a float16
LARGEST = 1e30  # weights beyond it are a damaged file's; below it no float32 on the way to codes overflows


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored matrix of n rows of k weights.

    Attributes:
        codes: (n, k). int8 for integers, in [-2**(code_bits-1), 2**(code_bits-1)); else float32 numbers that the
            stored type (fp16, bf16, E4M3, E2M1) holds exactly.
        scales: float32 (n, blocks); of fp4, numbers that E4M3 holds. None for floats and for fp8.
        zeros: int8 (n, blocks), the code that means 0; None is 0 everywhere.
        format: how it is stored.
        code_bits: of one code; at most `format.bits`.
        tensor_scale: float32 for the whole matrix, of fp8 and fp4; 1 elsewhere.
    """

    codes: F32 | I8
    scales: F32 | None
    zeros: I8 | None
    format: WeightFormat
    code_bits: int
    tensor_scale: float = 1.0


def store(
    matrix: F32,
    choice: Choice,
    *,
    code_bits: int = 8,
    importance: F32 | None = None,
    rounding: str = "rtn",
    positive: bool = False,
) -> Stored:
    """Round a matrix to what `choice` stores.

    Args:
        matrix: (n, k), finite.
        choice: a row of CHOICES, or one made like it.
        code_bits: of a weight that meets integer activations (Target.code_bits); other formats have their own.
        importance: mean squares (k,) of the product's inputs, or their second moments (k, k); None weighs all alike.
        rounding: a row of ROUNDINGS, for integers; floats are rounded to nearest whatever is asked.
        positive: make every scale positive, which TensorRT demands of DequantizeLinear; weights that meet integer
            activations always have it so. It costs accuracy, the more the fewer bits.

    Raises:
        BadRequest: a weight is not finite or does not fit the type, `importance` has another shape, no such rounding.
    """
    if matrix.ndim != 2 or not matrix.size:
        raise BadRequest(f"a weight matrix has shape (n, k), not {matrix.shape}")
    form = choice.weight
    if form.kind == "float":
        return _store_float(matrix, choice)
    if not np.abs(matrix).max() < LARGEST:  # false for NaN too
        raise BadRequest(f"a weight is not finite or beyond {LARGEST:g}: no scale fits it; mend the model's file")
    if form.kind == "int":
        integers_meet = choice.activation != "float"
        bits = min(code_bits, form.bits) if integers_meet else form.bits
        positive = positive or integers_meet
        grid = Grid(bits, form.block or matrix.shape[1], form.zero, positive, half=form.scale_bits == HALF)
        rounded = get_rounding(rounding)(matrix, grid, importance)
        return Stored(rounded.codes, rounded.scales, rounded.zeros, form, bits)
    return _store_fp8(matrix, form) if form.kind == "fp8" else _store_fp4(matrix, form)


def restore(stored: Stored) -> F32:
    """The float32 (n, k) matrix that is meant."""
    codes, scales = stored.codes, stored.scales
    if scales is None:
        meant: F32 = codes * np.float32(stored.tensor_scale)
        return meant
    n, k = codes.shape
    block = stored.format.block or k
    out = np.empty((n, k), np.float32)
    scales = scales * np.float32(stored.tensor_scale)
    for rows in row_chunks(n, k):
        out[rows] = codes[rows]
        if stored.zeros is not None:
            out[rows] -= np.repeat(stored.zeros[rows], block, axis=1)[:, :k]
        out[rows] *= np.repeat(scales[rows], block, axis=1)[:, :k]
    return out


def pack_nbits(stored: Stored) -> npt.NDArray[np.uint8]:
    """Codes as com.microsoft MatMulNBits takes them: uint8 (n, blocks, block * bits / 8), low bits first; 0 past k.

    Raises:
        BadRequest: codes that are not integers in blocks.
    """
    form = stored.format
    if form.kind != "int" or not form.block:
        raise BadRequest(f"MatMulNBits takes integers in blocks, not {form}")
    n, k = stored.codes.shape
    blocks = form.blocks(k)
    packed = np.empty((n, blocks, form.block * form.bits // 8), np.uint8)
    for rows in row_chunks(n, k):
        codes = unsigned(stored.codes[rows], form.bits)
        padded = np.pad(codes, ((0, 0), (0, blocks * form.block - k)))
        packed[rows] = pack_bits(padded, form.bits).reshape(-1, *packed.shape[1:])
    return packed


def pack_zeros(stored: Stored) -> npt.NDArray[np.uint8] | None:
    """Zero points as MatMulNBits takes them: uint8 (n, ceil(blocks * bits / 8)), low bits first; or None."""
    if stored.zeros is None:
        return None
    bits = stored.format.bits
    zeros = unsigned(stored.zeros, bits)
    packed: npt.NDArray[np.uint8] = pack_bits(np.pad(zeros, ((0, 0), (0, -zeros.shape[1] % (8 // bits)))), bits)
    return packed


def unsigned(codes: Array, bits: int) -> npt.NDArray[np.uint8]:
    """Signed codes of `bits` bits plus 2**(bits-1)."""
    shifted: npt.NDArray[np.uint8] = codes.view(np.uint8) + np.uint8(1 << (bits - 1))  # modulo 256
    return shifted


def stored_bytes(stored: Stored) -> int:
    """Bytes of codes, padding, scales and zero points in a file."""
    form = stored.format
    n, k = map(int, stored.codes.shape)
    padded = form.blocks(k) * form.block or k
    size = math.ceil(n * padded * form.bits / 8)
    if stored.scales is not None:
        size += stored.scales.size * form.scale_bits // 8
    if stored.zeros is not None:
        size += n * math.ceil(stored.zeros.shape[1] * form.bits / 8)
    return size + (4 if form.kind in ("fp8", "fp4") else 0)


def _store_float(matrix: F32, choice: Choice) -> Stored:
    if choice.name not in FLOAT_TYPES:
        raise BadRequest(f"no float type {choice.name!r}; known: {', '.join(FLOAT_TYPES)}")
    values = _as(matrix, FLOAT_TYPES[choice.name])
    if not np.isfinite(values).all():
        raise BadRequest(f"a weight is not finite, or more than {choice.name} holds: take fp32, or mend the file")
    return Stored(values, None, None, choice.weight, choice.weight.bits)


def _store_fp8(matrix: F32, form: WeightFormat) -> Stored:
    scale = _tensor_scale(matrix, E4M3_MAX)
    return Stored(_as(matrix / scale, ml_dtypes.float8_e4m3fn), None, None, form, form.bits, float(scale))


def _store_fp4(matrix: F32, form: WeightFormat) -> Stored:
    """Two levels of scales: E4M3 per block, and one float32 that brings the largest of those to E4M3's largest."""
    n, k = matrix.shape
    codes, scales = np.empty((n, k), np.float32), np.empty((n, form.blocks(k)), np.float32)
    whole = _tensor_scale(matrix, E4M3_MAX * E2M1_MAX)
    for rows in row_chunks(n, k):
        parts = blocked(matrix[rows], form.block) / whole
        rounded = _as(np.abs(parts).max(-1) / E2M1_MAX, ml_dtypes.float8_e4m3fn)
        scales[rows] = np.maximum(rounded, E4M3_LEAST)  # no scale is 0, which engines refuse
        parts = np.clip(parts / scales[rows][..., None], -E2M1_MAX, E2M1_MAX)
        codes[rows] = _as(parts, ml_dtypes.float4_e2m1fn).reshape(len(parts), -1)[:, :k]
    return Stored(codes, scales, None, form, form.bits, float(whole))


def _tensor_scale(matrix: F32, reach: np.float32) -> np.float32:
    """What brings the largest magnitude to `reach`; 1 if nothing is there to scale."""
    scale: np.float32 = np.abs(matrix).max() / reach
    return scale if scale >= np.finfo(np.float32).tiny else np.float32(1)


def _as(values: Array, dtype: Any) -> F32:
    """Round to nearest, ties to even, in another type; what it cannot hold becomes infinite."""
    with np.errstate(over="ignore"):
        rounded: F32 = values.astype(dtype, copy=False).astype(np.float32, copy=False)
    return rounded
