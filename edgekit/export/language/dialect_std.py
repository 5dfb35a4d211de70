"""Dialect `std`: only operators of the ONNX standard, opset 24, for TensorRT and whatever else reads the standard.

New keys and values are scattered into the KV buffer at `write_indices`, then Attention runs over the whole capacity
under the bias. Quantized weights are stored as blocked DequantizeLinear before a MatMul.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.errors import UnsupportedModel
from edgekit.export.language import tensors
from edgekit.export.language.dialect_ort import standard_norm
from edgekit.export.language.graph import INT64, Decoder, Pair
from edgekit.export.language.integers import operands
from edgekit.export.language.tensors import Matrix
from edgekit.quant.precision import Precision


class StdDialect:
    """Operators of the ONNX standard."""

    domains: Mapping[str, int] = MappingProxyType({})

    def inputs(self, decoder: Decoder) -> None:
        """`write_indices` is the first free slot of each sequence."""
        decoder.input("write_indices", INT64, ("batch",))
        decoder.input("rows", INT64, ("rows",))
        decoder.bias_inputs(("batch", 1, "seq", "capacity"))

    def norm(self, decoder: Decoder, x: ir.Value, weights: tuple[ir.Value, ...]) -> ir.Value:
        """Standard normalisation."""
        return standard_norm(decoder, x, weights)

    def add_norm(self, decoder: Decoder, x: ir.Value, branch: ir.Value, weights: tuple[ir.Value, ...]) -> Pair:
        """Sum, then norm."""
        total = decoder.op("Add", x, branch)
        return total, self.norm(decoder, total, weights)

    def attend(self, decoder: Decoder, qkv: ir.Value, layer: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        """RotaryEmbedding, TensorScatter into the buffer, Attention over it."""
        spec, given = decoder.spec, decoder.inputs
        query, key, value = decoder.split_qkv(qkv, layer)
        query = _rotate(decoder, query, layer, spec.heads)
        key = _rotate(decoder, key, layer, spec.kv_heads)
        slots = given["write_indices"]
        keys = decoder.op("TensorScatter", given[f"past.{layer}.key"], _heads_first(decoder, key), slots, axis=2)
        values = decoder.op("TensorScatter", given[f"past.{layer}.value"], _heads_first(decoder, value), slots, axis=2)
        attributes: dict[str, Any] = {"scale": spec.attention_scale}
        if spec.attention_softcap:
            attributes["softcap"] = spec.attention_softcap
        query = _heads_first(decoder, query)
        out = decoder.op("Attention", query, keys, values, decoder.bias_of(layer), **attributes)
        out = decoder.op("Transpose", out, perm=[0, 2, 1, 3])
        return decoder.op("Reshape", out, decoder.constant("shape.flat", np.array([0, 0, -1], np.int64))), keys, values

    def quantized(
        self, decoder: Decoder, x: ir.Value, matrix: Matrix, bias: ir.Value | None, precision: Precision
    ) -> ir.Value:
        """Blocked DequantizeLinear along K, then MatMul; or MatMulInteger, then its scales."""
        if precision.per_row:
            y = _integer_product(decoder, x, matrix, precision)
        else:
            y = decoder.op("MatMul", x, _dequantized(decoder, matrix, precision))
        return y if bias is None else decoder.op("Add", y, bias)

    def table(self, precision: Precision) -> Precision:
        """The head is a matrix like any other."""
        return precision

    def embed(self, decoder: Decoder, matrix: Matrix) -> ir.Value:
        """Floats: the codes lie transposed, for the product, where no row can be gathered."""
        return decoder.gathered(matrix)


def _dequantized(decoder: Decoder, matrix: Matrix, precision: Precision) -> ir.Value:
    k = matrix.shape[1]
    block = min(precision.block, k)
    if k % block:
        raise UnsupportedModel(
            f"{matrix.name}: {k} inputs are no multiple of {block}, which blocked DequantizeLinear needs. Export with "
            "dialect 'ort', or with another --precision."
        )
    codes = decoder.weight(tensors.signed_codes(matrix, precision), matrix.source_bytes)
    scales = decoder.weight(tensors.block_scales_of(matrix, precision, by_input=True))
    return decoder.op("DequantizeLinear", codes, scales, axis=0, block_size=block)


def _integer_product(decoder: Decoder, x: ir.Value, matrix: Matrix, precision: Precision) -> ir.Value:
    codes, scales, weights, weight_scales, middle = operands(decoder, x, matrix, precision)
    product = decoder.op("Cast", decoder.op("MatMulInteger", codes, weights, middle), to=int(decoder.element))
    return decoder.op("Mul", decoder.op("Mul", product, weight_scales), scales)


def _rotate(decoder: Decoder, x: ir.Value, layer: int, heads: int) -> ir.Value:
    rope, tables = decoder.spec.ropes[layer], decoder.rope_of(layer)
    if rope is None or tables is None:
        return x
    partial: dict[str, Any] = {"rotary_embedding_dim": rope.dim} if rope.dim != decoder.spec.head_dim else {}
    return decoder.op("RotaryEmbedding", x, *tables, decoder.inputs["position_ids"], num_heads=heads, **partial)


def _heads_first(decoder: Decoder, x: ir.Value) -> ir.Value:
    """(batch, seq, heads * head_dim) -> (batch, heads, seq, head_dim)."""
    shape = decoder.constant("shape.heads", np.array([0, 0, -1, decoder.spec.head_dim], np.int64))
    return decoder.op("Transpose", decoder.op("Reshape", x, shape), perm=[0, 2, 1, 3])
