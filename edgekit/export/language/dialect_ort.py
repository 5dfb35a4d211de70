"""Dialect `ort`: ONNX Runtime's GroupQueryAttention on a KV buffer that is past and present at once, and MatMulNBits.

The operator reads only the used length of the buffer, so capacity costs memory but no time. Two of its habits bind the
caller: the bias' last axis must equal `total_sequence_length`, and a first call on an empty cache must be a chain,
because positions are then counted and `position_ids` is not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from edgekit.errors import UnsupportedModel
from edgekit.export.language import tensors
from edgekit.export.language.graph import INT32, INT64, Decoder, Pair
from edgekit.export.language.integers import operands
from edgekit.export.language.tensors import Matrix
from edgekit.quant.precision import Precision, get_precision

MICROSOFT = "com.microsoft"


class OrtDialect:
    """Contrib operators of ONNX Runtime."""

    domains: Mapping[str, int] = MappingProxyType({MICROSOFT: 1})

    def inputs(self, decoder: Decoder) -> None:
        """`seqlens_k` is the last slot in use, `total_sequence_length` the number of slots in use after this call."""
        for rope in decoder.spec.ropes:
            if rope is not None and rope.dim % 16:
                raise UnsupportedModel(
                    f"GroupQueryAttention rotates pairs by eights; {rope.dim} rotary channels are no multiple of 16. "
                    "Export with dialect 'std'."
                )
        decoder.input("seqlens_k", INT32, ("batch",))
        decoder.input("total_sequence_length", INT32, ())
        decoder.input("rows", INT64, ("rows",))
        decoder.bias_inputs((1, 1, "seq", "total"))

    def norm(self, decoder: Decoder, x: ir.Value, weights: tuple[ir.Value, ...]) -> ir.Value:
        """Standard normalisation."""
        return standard_norm(decoder, x, weights)

    def add_norm(self, decoder: Decoder, x: ir.Value, branch: ir.Value, weights: tuple[ir.Value, ...]) -> Pair:
        """Sum and norm in one node."""
        kind = "SkipSimplifiedLayerNormalization" if decoder.spec.norm == "rms" else "SkipLayerNormalization"
        # Outputs two and three, mean and deviation, are for training: an empty name says that nobody wants them.
        outputs = [ir.Value(), ir.Value(name=""), ir.Value(name=""), ir.Value()]
        attributes = {"epsilon": decoder.spec.eps}
        node = ir.node(kind, [x, branch, *weights], attributes, domain=MICROSOFT, outputs=outputs)
        normed, _, _, total = decoder.add(node).outputs
        return total, normed

    def attend(self, decoder: Decoder, qkv: ir.Value, layer: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        """GroupQueryAttention on the packed projection, or on its parts where query and key are normalised first."""
        spec, given = decoder.spec, decoder.inputs
        parts: tuple[ir.Value | None, ...] = (qkv, None, None)
        if spec.qk_norm != "none":
            parts = decoder.split_qkv(qkv, layer)
        tables = decoder.rope_of(layer)
        positions = given["position_ids"] if tables else None
        cache = given[f"past.{layer}.key"], given[f"past.{layer}.value"]
        lengths = given["seqlens_k"], given["total_sequence_length"]
        inputs = [*parts, *cache, *lengths, *(tables or (None, None)), positions, decoder.bias_of(layer)]
        attributes = {
            "num_heads": spec.heads,
            "kv_num_heads": spec.kv_heads,
            "do_rotary": int(tables is not None),
            "scale": spec.attention_scale,
            "softcap": spec.attention_softcap,
        }
        node = ir.node("GroupQueryAttention", inputs, attributes, domain=MICROSOFT, num_outputs=3)
        out, key, value = decoder.add(node).outputs
        return out, key, value

    def quantized(
        self, decoder: Decoder, x: ir.Value, matrix: Matrix, bias: ir.Value | None, precision: Precision
    ) -> ir.Value:
        """MatMulNBits, which pads a K that is no multiple of the block; or one integer product with its scales."""
        if precision.per_row:
            return _integer_product(decoder, x, matrix, bias, precision)
        codes = decoder.weight(tensors.block_codes(matrix, precision), matrix.source_bytes)
        scales = decoder.weight(tensors.block_scales_of(matrix, precision))
        optional = () if bias is None else (None, None, bias)
        return decoder.op(
            "MatMulNBits",
            *(x, codes, scales, *optional),
            domain=MICROSOFT,
            K=matrix.shape[1],
            N=matrix.shape[0],
            bits=precision.code_bits,
            block_size=precision.block,
            accuracy_level=precision.accuracy_level,
        )

    def table(self, precision: Precision) -> Precision:
        """Always in blocks, which can be gathered from as well as multiplied."""
        return get_precision(precision.table or precision.name)

    def embed(self, decoder: Decoder, matrix: Matrix) -> ir.Value:
        """GatherBlockQuantized over the codes of the head, where they are tied.

        MatMulNBits wants its codes in three dimensions, and packs them into a copy. So the embedding has an initializer
        of its own, which names the same bytes: of it only the rows in use are ever read. (A Reshape would be folded
        into another copy.) The scales are one initializer for both.
        """
        precision, (vocab, hidden) = self.table(decoder.precision), matrix.shape
        codes, scales = tensors.block_codes(matrix, precision), tensors.block_scales_of(matrix, precision)
        width = -(-hidden // precision.block) * precision.block
        flat = vocab, math.prod(codes.shape[1:])
        x = decoder.op(
            "GatherBlockQuantized",
            decoder.view(codes, "embedding.codes", flat, matrix.source_bytes),
            decoder.inputs["input_ids"],
            decoder.weight(scales),
            domain=MICROSOFT,
            bits=precision.code_bits,
            block_size=precision.block,
            gather_axis=0,
            quantize_axis=1,
        )
        if width == hidden:
            return x
        ends = (
            decoder.constant(f"embedding.{name}", np.array([at], np.int64))
            for name, at in (("start", 0), ("end", hidden))
        )
        return decoder.op("Slice", x, *ends, decoder.constant("axis.last", np.array([-1], np.int64)))


def _integer_product(
    decoder: Decoder, x: ir.Value, matrix: Matrix, bias: ir.Value | None, precision: Precision
) -> ir.Value:
    """One node multiplies and scales by output, a second by token."""
    codes, scales, weights, weight_scales, middle = operands(decoder, x, matrix, precision)
    one = decoder.scalar("one", 1.0)
    y = decoder.op("MatMulIntegerToFloat", codes, weights, one, weight_scales, middle, domain=MICROSOFT)
    y = decoder.op("Mul", y, scales)
    return y if bias is None else decoder.op("Add", y, bias)


def standard_norm(decoder: Decoder, x: ir.Value, weights: tuple[ir.Value, ...]) -> ir.Value:
    """RMSNormalization (Zhang and Sennrich 2019) or LayerNormalization over the last axis."""
    kind = "RMSNormalization" if decoder.spec.norm == "rms" else "LayerNormalization"
    return decoder.op(kind, x, *weights, epsilon=decoder.spec.eps, axis=-1)
