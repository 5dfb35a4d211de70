"""How a weight matrix is stored: bits, packing, unpacking. Numpy only; one row per precision in PRECISIONS.

Block quantization follows ONNX Runtime's `MatMulNBits`, whose own packer this one equals byte for byte: each run of 32
weights along the input axis shares one float scale,

    w ~ (code - 2**(bits-1)) * scale,      scale = w_extreme / -2**(bits-1),

where w_extreme is the weight of largest magnitude, with its sign: the end of the code range that reaches further is
spent on the side that needs it. There is no stored zero point, on purpose: TensorRT takes only symmetric int4, so one
set of numbers serves both dialects, and a zero point would cost memory traffic in the product that is bound by it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgekit.errors import BadRequest

Array = npt.NDArray[Any]
Float = Literal["float32", "float16"]

BLOCK = 32
_CHUNK = 1 << 17  # weights quantized at a time: the temporaries stay in cache, whatever the matrix
# Added before cutting off the fraction, it rounds half away from zero; 0.5 itself would lift 0.49999997 to 1.
_JUST_BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))


@dataclass(frozen=True, slots=True)
class Packed:
    """A stored matrix (N, K). Floats: `values` (N, K), no scales.

    Codes: `values` uint8 (N, blocks, 4 * bits), low nibble first, codes past K are 0; `scales` float32 (N, blocks).
    """

    values: Array
    scales: Array | None = None


@dataclass(frozen=True, slots=True)
class Precision:
    """One way of storing weight matrices.

    Attributes:
        name: as typed after `--precision`.
        bits: stored bits per weight, scales included, for a K that is a multiple of the block.
        code_bits: bits of one code; None stores floats.
        activations: element type of activations and KV cache.
        embedding: element type of the embedding table, which is gathered and never multiplied.
        accuracy_level: MatMulNBits' attribute. 4 multiplies int8-rounded activations, what every fast CPU engine does;
            1 multiplies in float32. It is part of the precision: it changes the numbers.
        pack: float (N, K) -> Packed.
        unpack: (Packed, K) -> float32 (N, K), what the stored weights mean.
    """

    name: str
    bits: float
    code_bits: int | None
    activations: Float
    embedding: Float
    pack: Callable[[Array], Packed]
    unpack: Callable[[Packed, int], Array]
    accuracy_level: int = 0


def _float_precision(name: str, dtype: Float) -> Precision:
    def pack(weight: Array) -> Packed:
        return Packed(np.asarray(weight).astype(dtype, copy=False))

    def unpack(packed: Packed, k: int) -> Array:
        return packed.values[:, :k].astype(np.float32, copy=False)

    return Precision(name, np.dtype(dtype).itemsize * 8.0, None, dtype, dtype, pack, unpack)


def _block_precision(name: str, code_bits: int) -> Precision:
    def pack(weight: Array) -> Packed:
        return pack_blocks(weight, code_bits)

    def unpack(packed: Packed, k: int) -> Array:
        return unpack_blocks(packed, k, code_bits)

    bits = code_bits + 32.0 / BLOCK
    return Precision(name, bits, code_bits, "float32", "float16", pack, unpack, accuracy_level=4)


def block_scales(weight: Array, code_bits: int) -> Array:
    """One scale per block of 32: float (N, K) -> float32 (N, blocks); a short last block is padded with zeros."""
    n, k = weight.shape
    scales = np.empty((n, -(-k // BLOCK)), np.float32)
    for rows in _row_chunks(n, k):
        scales[rows] = _scales_of(_blocked(weight[rows]), code_bits)
    return scales


def pack_blocks(weight: Array, code_bits: int) -> Packed:
    """Round to nearest, half away from zero, in blocks of 32 along K: float (N, K) -> Packed codes."""
    n, k = weight.shape
    blocks = -(-k // BLOCK)
    values = np.empty((n, blocks, BLOCK * code_bits // 8), np.uint8)
    scales = np.empty((n, blocks), np.float32)
    for rows in _row_chunks(n, k):
        blocked = _blocked(weight[rows])
        scales[rows] = _scales_of(blocked, code_bits)
        codes = _codes_of(blocked, scales[rows], code_bits)
        codes.reshape(len(codes), -1)[:, k:] = 0
        values[rows] = codes if code_bits == 8 else codes[..., ::2] | (codes[..., 1::2] << 4)
    return Packed(values, scales)


def unpack_codes(values: Array, k: int, code_bits: int) -> Array:
    """Codes as signed integers: packed uint8 (N, blocks, bytes) -> int8 (N, K) in [-2**(bits-1), 2**(bits-1))."""
    n = len(values)
    if code_bits == 4:
        values = np.stack((values & 15, values >> 4), axis=-1)
    # 2**(bits-1) is subtracted modulo 256, then read as signed.
    codes: Array = (values.reshape(n, -1)[:, :k] - np.uint8(1 << (code_bits - 1))).view(np.int8)
    return codes


def unpack_blocks(packed: Packed, k: int, code_bits: int) -> Array:
    """The float32 (N, K) matrix the codes mean."""
    if packed.scales is None:
        raise ValueError("packed codes have scales")
    codes = unpack_codes(packed.values, k, code_bits).astype(np.float32)
    weight: Array = codes * np.repeat(packed.scales, BLOCK, axis=1)[:, :k]
    return weight


def _row_chunks(n: int, k: int) -> list[slice]:
    step = max(1, _CHUNK // max(k, 1))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _blocked(rows: Array) -> Array:
    """Float (n, K) -> float32 (n, blocks, 32), the end padded with zeros."""
    n, k = rows.shape
    short = -k % BLOCK
    rows = np.asarray(rows, dtype=np.float32)
    if short:
        rows = np.pad(rows, ((0, 0), (0, short)))
    return np.ascontiguousarray(rows).reshape(n, -1, BLOCK)


def _scales_of(blocked: Array, code_bits: int) -> Array:
    top, bottom = blocked.max(-1), blocked.min(-1)
    extreme = np.where(np.abs(top) > np.abs(bottom), top, bottom)
    scales: Array = extreme / np.float32(-(1 << (code_bits - 1)))
    return scales


def _codes_of(blocked: Array, scales: Array, code_bits: int) -> Array:
    middle = np.float32(1 << (code_bits - 1))
    # A block of zeros, or of numbers so small that the inverse would overflow, rounds to zeros.
    usable = np.abs(scales) >= np.finfo(np.float32).tiny
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=usable)
    codes = blocked * inverse[..., None]
    codes += middle
    codes += _JUST_BELOW_HALF
    np.clip(codes, 0, 2 * middle - 1, out=codes)
    whole: Array = codes.astype(np.uint8)
    return whole


PRECISIONS: dict[str, Precision] = {
    precision.name: precision
    for precision in (
        _float_precision("fp32", "float32"),
        _float_precision("fp16", "float16"),
        _block_precision("int8", 8),
        _block_precision("int4", 4),
    )
}


def get_precision(name: str) -> Precision:
    """The row of PRECISIONS called `name`.

    Raises:
        BadRequest: no such precision.
    """
    if name not in PRECISIONS:
        raise BadRequest(f"no precision {name!r}; known: {', '.join(PRECISIONS)}")
    return PRECISIONS[name]
