"""Products of integers: each token's activations rounded to eight bits with a scale of their own.

    y = x @ W.T,    x ~ (code - 128) * scale of the token,    W ~ weight code * scale of the output

so y is the integer product times both scales (Dettmers et al. 2022, LLM.int8(), without its outlier path). The scale
of a token is its largest magnitude over 127: it comes from that token alone, so what stands beside it in a call changes
nothing. The codes are uint8 around 128: x86 multiplies uint8 by int8, and ONNX Runtime takes int8 by int8 seven times
slower.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from edgekit.export.language import tensors
from edgekit.export.language.graph import Decoder
from edgekit.export.language.tensors import Matrix
from edgekit.quant.precision import Precision

MIDDLE = 128  # the code of zero
REACH = 127


class Operands(NamedTuple):
    """What an integer product takes: `codes` uint8 (batch, n, K) with `scales` (batch, n, 1), `weights` int8 (K, N)
    with `weight_scales` (N,), and `middle`, the scalar zero point of the codes."""

    codes: ir.Value
    scales: ir.Value
    weights: ir.Value
    weight_scales: ir.Value
    middle: ir.Value


def operands(decoder: Decoder, x: ir.Value, matrix: Matrix, precision: Precision) -> Operands:
    """Round `x` (batch, n, K) token by token, and store the matrix as int8."""
    weight_scales = tensors.block_scales_of(matrix, precision)
    weight_scales = tensors.view(weight_scales, str(weight_scales.name), (matrix.shape[0],))
    scales, codes = _round(decoder, x, matrix)
    return Operands(
        codes,
        scales,
        decoder.weight(tensors.signed_codes(matrix, precision), matrix.source_bytes),
        decoder.weight(weight_scales),
        decoder.constant("codes.middle", np.array(MIDDLE, np.uint8)),
    )


def _round(decoder: Decoder, x: ir.Value, matrix: Matrix) -> tuple[ir.Value, ir.Value]:
    """Scales and codes. A token of zeros has scale 0, and whatever its codes, comes out as zeros."""
    last = decoder.constant("axis.last", np.array([-1], np.int64))
    peak = decoder.op("ReduceMax", decoder.op("Abs", x), last, keepdims=1)
    scales = decoder.op("Mul", peak, decoder.scalar("codes.step", 1 / REACH))
    # QuantizeLinear takes a zero point per block: all layers share one tensor of them, the head has other rows.
    rows = "head" if matrix.name == "head" else "layers"
    if rows not in decoder.shared:
        middle = ir.tensor(np.array([MIDDLE], np.uint8))
        decoder.shared[rows] = decoder.op("ConstantOfShape", decoder.op("Shape", scales), value=middle)
    codes = decoder.op("QuantizeLinear", x, scales, decoder.shared[rows], axis=-1, block_size=matrix.shape[1])
    return scales, codes
