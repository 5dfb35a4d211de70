"""From checkpoint tensors to graph initializers, each made only while it is being written.

A `Matrix` is one linear map, output-major (N, K), stacked from one or more checkpoint tensors. The functions below give
its stored forms as lazy onnx-ir tensors; at most one is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgekit.errors import BadSource, UnsupportedModel
from edgekit.export.language.weights import Checkpoint
from edgekit.quant.precision import Precision, block_scales, unpack_codes

Array = npt.NDArray[Any]

_ROWS = 64
ELEMENT = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}


@dataclass(frozen=True)
class Matrix:
    """A linear map (N, K): `tensors` stacked along N. `input_major` tensors are stored (in, out)."""

    checkpoint: Checkpoint
    name: str
    tensors: tuple[str, ...]
    shape: tuple[int, int]
    input_major: bool = False

    def __post_init__(self) -> None:
        n, k = 0, self.shape[1]
        for tensor in self.tensors:
            shape = self.checkpoint.shape(tensor)[:: -1 if self.input_major else 1]
            if len(shape) != 2 or shape[1] != k:
                raise BadSource(f"tensor {tensor!r} has shape {shape}; config.json makes its input width {k}")
            n += shape[0]
        if n != self.shape[0]:
            raise BadSource(f"{', '.join(self.tensors)}: {n} outputs; config.json makes it {self.shape[0]}")

    def parts(self) -> list[Array]:
        """The stacked tensors, output-major views of the checkpoint."""
        read = [self.checkpoint.read(tensor) for tensor in self.tensors]
        return [part.T for part in read] if self.input_major else read

    @property
    def source_bytes(self) -> int:
        """Bytes of the stacked tensors in the checkpoint."""
        return sum(self.checkpoint.entry(tensor).nbytes for tensor in self.tensors)


def lazy(name: str, dtype: ir.DataType, shape: tuple[int, ...], make: Callable[[], Array]) -> ir.LazyTensor:
    """An initializer computed when it is written: `make` gives the array, sub-byte types as packed bytes."""

    def evaluate() -> ir.TensorProtocol:
        value = np.ascontiguousarray(make())
        if dtype.bitwidth < 8:
            return ir.PackedTensor(value, dtype, shape=shape, name=name)
        return ir.Tensor(value, dtype=dtype, shape=ir.Shape(shape), name=name)

    return ir.LazyTensor(evaluate, dtype, ir.Shape(shape), name=name)


def to_float(value: Array, dtype: str, what: str) -> Array:
    """Cast to `dtype`; raises UnsupportedModel where a finite weight would become infinite."""
    if dtype == "float16" and value.dtype != np.float16 and value.size:
        reach = max(float(value.max()), -float(value.min()))
        if reach > float(np.finfo(np.float16).max):
            raise UnsupportedModel(
                f"{what}: a weight of size {reach:.3g} is beyond float16's range (65504). Export with --precision fp32."
            )
    return value.astype(dtype, copy=False)


def transposed(matrix: Matrix, dtype: str) -> ir.LazyTensor:
    """Floats (K, N): the right side of a MatMul."""
    n, k = matrix.shape

    def make() -> Array:
        out, start = np.empty((k, n), dtype), 0
        for part in matrix.parts():
            _transpose(part, out[:, start : start + len(part)], lambda rows: to_float(rows, dtype, matrix.name))
            start += len(part)
        return out

    return lazy(f"{matrix.name}.weight", ELEMENT[dtype], (k, n), make)


def _transpose(rows: Array, out: Array, cast: Callable[[Array], Array] = np.asarray) -> None:
    """Write `cast(rows).T` to `out`, a few rows at a time: five times faster than in one go, which misses the cache."""
    for start in range(0, len(rows), _ROWS):
        out[:, start : start + _ROWS] = cast(rows[start : start + _ROWS]).T


def table(checkpoint: Checkpoint, tensor: str, dtype: str, name: str) -> ir.LazyTensor:
    """Floats as they lie: an embedding (vocab, hidden), or a head for Gemm's transB."""
    shape = checkpoint.shape(tensor)
    return lazy(name, ELEMENT[dtype], shape, lambda: to_float(checkpoint.read(tensor), dtype, tensor))


def vector(
    checkpoint: Checkpoint, tensors: tuple[str, ...], size: int, dtype: str, name: str, offset: float = 0.0
) -> ir.LazyTensor:
    """Biases or norm weights, stacked, plus `offset`: (size,)."""
    shapes = [checkpoint.shape(tensor) for tensor in tensors]
    if any(len(shape) != 1 for shape in shapes) or sum(map(math.prod, shapes)) != size:
        raise BadSource(f"{', '.join(tensors)}: shapes {shapes}; config.json makes it ({size},)")

    def make() -> Array:
        parts = [checkpoint.read(tensor).astype(np.float32) for tensor in tensors]
        return to_float(np.concatenate(parts) + np.float32(offset), dtype, name)

    return lazy(name, ELEMENT[dtype], (size,), make)


def block_codes(matrix: Matrix, precision: Precision) -> ir.LazyTensor:
    """Codes as MatMulNBits stores them: uint8 (N, blocks, bytes per block)."""
    block = precision.block_of(matrix.shape[1])
    shape = (matrix.shape[0], _blocks(matrix, precision), block * _bits(precision) // 8)
    return lazy(f"{matrix.name}.codes", ir.DataType.UINT8, shape, lambda: _codes(matrix, precision))


def block_scales_of(matrix: Matrix, precision: Precision, *, by_input: bool = False) -> ir.LazyTensor:
    """Scales (N, blocks), or (blocks, N) `by_input`, float32."""
    n, blocks = matrix.shape[0], _blocks(matrix, precision)
    bits, block = _bits(precision), precision.block_of(matrix.shape[1])

    def make() -> Array:
        scales = np.concatenate([block_scales(part, bits, block) for part in matrix.parts()])
        return scales.T if by_input else scales

    shape = (blocks, n) if by_input else (n, blocks)
    return lazy(f"{matrix.name}.scales", ir.DataType.FLOAT, shape, make)


def signed_codes(matrix: Matrix, precision: Precision) -> ir.LazyTensor:
    """Codes as DequantizeLinear and MatMulInteger take them: int8 or int4, (K, N)."""
    n, k = matrix.shape
    bits = _bits(precision)

    def make() -> Array:
        codes = np.empty((k, n), np.int8)
        _transpose(unpack_codes(_codes(matrix, precision), k, bits), codes)
        return _pack_nibbles(codes) if bits == 4 else codes

    return lazy(f"{matrix.name}.codes", ir.DataType.INT4 if bits == 4 else ir.DataType.INT8, (k, n), make)


def view(tensor: ir.LazyTensor, name: str, shape: tuple[int, ...]) -> ir.LazyTensor:
    """The same bytes under another name and shape."""
    return ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy().reshape(shape), name=name), tensor.dtype, ir.Shape(shape), name=name
    )


def _codes(matrix: Matrix, precision: Precision) -> Array:
    """Packed part by part: rows do not know of each other, so only the codes are ever stacked."""
    return np.concatenate([precision.pack(part).values for part in matrix.parts()])


def _pack_nibbles(codes: Array) -> Array:
    """ONNX's int4 layout: flat, two to a byte, the first in the low nibble."""
    flat = codes.reshape(-1).view(np.uint8) & 15
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return flat[::2] | (flat[1::2] << 4)


def _blocks(matrix: Matrix, precision: Precision) -> int:
    return -(-matrix.shape[1] // precision.block_of(matrix.shape[1]))


def _bits(precision: Precision) -> int:
    if precision.code_bits is None:
        raise ValueError(f"{precision.name} stores floats, not codes")
    return precision.code_bits
