"""How a weight matrix is stored: bits, packing, unpacking. Numpy only; one row per precision in PRECISIONS.

Block quantization follows ONNX Runtime's `MatMulNBits`, whose own packer this one equals byte for byte: each run of
`block` weights along the input axis shares one float scale,

    w ~ (code - 2**(bits-1)) * scale,      scale = w_extreme / -2**(bits-1),

where w_extreme is the weight of largest magnitude, with its sign: the end of the code range that reaches further is
spent on the side that needs it. There is no stored zero point, on purpose: TensorRT takes only symmetric int4, so one
set of numbers serves both dialects, and a zero point would cost memory traffic in the product that is bound by it.

`int8-row` has one block per output and meets activations that the graph rounds to uint8, one scale per token: a product
of integers, exact and the same for a token whatever stands beside it (one scale for the whole tensor would mix them).
Its codes have seven bits, stored in eight, so that engines without VNNI are exact too: they add pairs of products in
int16, and 2 * 255 * 64 fits.
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

AUTO = "auto"  # what a user types for "the fastest here": no row of PRECISIONS, the export measures and takes one

_CHUNK = 1 << 17  # weights quantized at a time: the temporaries stay in cache, whatever the matrix
# Added before cutting off the fraction, it rounds half away from zero; 0.5 itself would lift 0.49999997 to 1.
_JUST_BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))


@dataclass(frozen=True, slots=True)
class Packed:
    """A stored matrix (N, K). Floats: `values` (N, K), no scales.

    Codes: `values` uint8 (N, blocks, block * bits / 8), low nibble first, codes past K are 0, seven bits take a byte;
    `scales` float32 (N, blocks).
    """

    values: Array
    scales: Array | None = None


@dataclass(frozen=True, slots=True)
class Precision:
    """One way of storing weight matrices.

    Attributes:
        name: as typed after `--precision`.
        bits: stored bits per weight, scales included, for a K that is a multiple of the block (a lone scale per row
            is not counted).
        code_bits: bits of one code; None stores floats.
        block: weights along K that share a scale; 0 is a whole row.
        activations: element type of activations and KV cache.
        embedding: element type of an embedding table kept as floats: it is gathered and never multiplied.
        accuracy_level: MatMulNBits' attribute. 4 multiplies int8-rounded activations, what every fast CPU engine does;
            1 multiplies in float32. It is part of the precision: it changes the numbers.
        table: the precision of embedding and head where an engine can gather from blocks; "" is this one.
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
    block: int = 0
    table: str = ""

    @property
    def per_row(self) -> bool:
        """Whether one scale holds for all weights of an output, and activations are rounded token by token."""
        return self.code_bits is not None and not self.block

    def block_of(self, k: int) -> int:
        """Weights per scale in a row of `k`."""
        return self.block or k


def _float_precision(name: str, dtype: Float) -> Precision:
    def pack(weight: Array) -> Packed:
        return Packed(np.asarray(weight).astype(dtype, copy=False))

    def unpack(packed: Packed, k: int) -> Array:
        return packed.values[:, :k].astype(np.float32, copy=False)

    return Precision(name, np.dtype(dtype).itemsize * 8.0, None, dtype, dtype, pack, unpack)


def _block_precision(name: str, code_bits: int, block: int, table: str = "") -> Precision:
    def pack(weight: Array) -> Packed:
        return pack_blocks(weight, code_bits, block or weight.shape[1])

    def unpack(packed: Packed, k: int) -> Array:
        return unpack_blocks(packed, k, code_bits, block or k)

    stored = 4.0 if code_bits == 4 else 8.0
    bits = stored + 32.0 / block if block else stored
    return Precision(name, bits, code_bits, "float32", "float16", pack, unpack, 4 if block else 0, block, table)


def block_scales(weight: Array, code_bits: int, block: int) -> Array:
    """One scale per block: float (N, K) -> float32 (N, blocks); a short last block is padded with zeros."""
    n, k = weight.shape
    scales = np.empty((n, -(-k // block)), np.float32)
    for rows in row_chunks(n, k):
        scales[rows] = _scales_of(blocked(weight[rows], block), code_bits)
    return scales


def pack_blocks(weight: Array, code_bits: int, block: int) -> Packed:
    """Round to nearest, half away from zero, in blocks along K: float (N, K) -> Packed codes."""
    n, k = weight.shape
    blocks = -(-k // block)
    values = np.empty((n, blocks, block * _stored_bits(code_bits) // 8), np.uint8)
    scales = np.empty((n, blocks), np.float32)
    for rows in row_chunks(n, k):
        parts = blocked(weight[rows], block)
        scales[rows] = _scales_of(parts, code_bits)
        codes = round_codes(parts, scales[rows], code_bits)
        codes.reshape(len(codes), -1)[:, k:] = 0
        values[rows] = pack_bits(codes, code_bits)
    return Packed(values, scales)


def unpack_codes(values: Array, k: int, code_bits: int) -> Array:
    """Codes as signed integers: packed uint8 (N, blocks, bytes) -> int8 (N, K) in [-2**(bits-1), 2**(bits-1))."""
    n = len(values)
    stored = _stored_bits(code_bits)
    if stored < 8:
        values = np.stack([values >> shift & ((1 << stored) - 1) for shift in range(0, 8, stored)], axis=-1)
    # 2**(bits-1) is subtracted modulo 256, then read as signed.
    codes: Array = (values.reshape(n, -1)[:, :k] - np.uint8(1 << (code_bits - 1))).view(np.int8)
    return codes


def unpack_blocks(packed: Packed, k: int, code_bits: int, block: int) -> Array:
    """The float32 (N, K) matrix the codes mean."""
    if packed.scales is None:
        raise ValueError("packed codes have scales")
    codes = unpack_codes(packed.values, k, code_bits).astype(np.float32)
    weight: Array = codes * np.repeat(packed.scales, block, axis=1)[:, :k]
    return weight


def pack_bits(codes: Array, code_bits: int) -> Array:
    """Unsigned codes, 8 // bits of them a byte, low bits first: uint8 (..., m) -> uint8 (..., m * bits / 8)."""
    bits = _stored_bits(code_bits)
    packed: Array = codes[..., :: 8 // bits].copy()
    for place in range(1, 8 // bits):
        packed |= codes[..., place :: 8 // bits] << (place * bits)
    return packed


def _stored_bits(code_bits: int) -> int:
    """Seven bits take a byte."""
    return 8 if code_bits > 4 else code_bits


def row_chunks(n: int, k: int) -> list[slice]:
    """Rows to work on at a time, so that temporaries stay in cache."""
    step = max(1, _CHUNK // max(k, 1))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def blocked(rows: Array, block: int) -> Array:
    """Float (n, K) -> float32 (n, blocks, block), the end padded with zeros."""
    n, k = rows.shape
    short = -k % block
    rows = np.asarray(rows, dtype=np.float32)
    if short:
        rows = np.pad(rows, ((0, 0), (0, short)))
    return np.ascontiguousarray(rows).reshape(n, -1, block)


def _scales_of(blocked: Array, code_bits: int) -> Array:
    top, bottom = blocked.max(-1), blocked.min(-1)
    extreme = np.where(np.abs(top) > np.abs(bottom), top, bottom)
    scales: Array = extreme / np.float32(-(1 << (code_bits - 1)))
    return scales


def round_codes(parts: Array, scales: Array, code_bits: int, zeros: Array | np.float32 | None = None) -> Array:
    """Nearest unsigned codes, half away from zero: (n, blocks, block), (n, blocks) -> uint8 (n, blocks, block).

    `zeros` are the codes that mean 0, (n, blocks) or one for all; None is the middle.
    """
    middle = np.float32(1 << (code_bits - 1))
    # A block of zeros, or of numbers so small that the inverse would overflow, rounds to zeros.
    usable = np.abs(scales) >= np.finfo(np.float32).tiny
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=usable)
    codes = parts * inverse[..., None]
    codes += middle if zeros is None else np.asarray(zeros, np.float32)[..., None]
    codes += _JUST_BELOW_HALF
    np.clip(codes, 0, 2 * middle - 1, out=codes)
    whole: Array = codes.astype(np.uint8)
    return whole


PRECISIONS: dict[str, Precision] = {
    precision.name: precision
    for precision in (
        _float_precision("fp32", "float32"),
        _float_precision("fp16", "float16"),
        _block_precision("int8", 8, 32),
        _block_precision("int8-128", 8, 128),
        _block_precision("int8-row", 7, 0, table="int8-128"),
        _block_precision("int4", 4, 32),
        _block_precision("int4-128", 4, 128),
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
