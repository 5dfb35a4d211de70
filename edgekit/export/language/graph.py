"""The decoder graph: one layer loop for every family and both dialects.

Every family is the same residual stream. A block adds a branch to it, normalises, and computes the next branch:

    stream, h = enter(stream, branch)      stream += branch; h = norm(stream)
    branch    = attention(h), then mlp(h)  with the family's optional post-norm and residual factor

Which norms exist is which names a family has. Dialects differ in `DialectOps`: inputs, attention, quantized products,
and how a norm takes the sum before it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgekit.errors import BadRequest, UnsupportedModel
from edgekit.export.language import tensors
from edgekit.export.language.builder import Dims, GraphBuilder, retyped
from edgekit.export.language.spec import Spec
from edgekit.export.language.tensors import Matrix
from edgekit.export.language.weights import Checkpoint
from edgekit.quant.precision import Precision

Array = npt.NDArray[Any]
Pair = tuple[ir.Value, ir.Value]

INT64, INT32, FLOAT = ir.DataType.INT64, ir.DataType.INT32, ir.DataType.FLOAT
FULL, SLIDING = "attention_bias", "attention_bias_sliding"
OPSET = 24


class DialectOps(Protocol):
    """What differs between the two dialects."""

    domains: Mapping[str, int]

    def inputs(self, decoder: Decoder) -> None:
        """Declare the inputs between `position_ids` and the KV cache."""

    def norm(self, decoder: Decoder, x: ir.Value, weights: tuple[ir.Value, ...]) -> ir.Value:
        """Normalise the last axis."""

    def add_norm(self, decoder: Decoder, x: ir.Value, branch: ir.Value, weights: tuple[ir.Value, ...]) -> Pair:
        """`x + branch`, and its norm."""

    def attend(self, decoder: Decoder, qkv: ir.Value, layer: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Attention over the cache and the new tokens: output (batch, seq, heads * head_dim), new keys, new values."""

    def quantized(
        self, decoder: Decoder, x: ir.Value, matrix: Matrix, bias: ir.Value | None, precision: Precision
    ) -> ir.Value:
        """`x @ matrix.T + bias` with packed weights."""

    def table(self, precision: Precision) -> Precision:
        """How a quantized decoder stores its head, and its embedding where that is not kept as floats."""

    def embed(self, decoder: Decoder, matrix: Matrix) -> ir.Value:
        """Rows of a quantized decoder's embedding for `input_ids`: (batch, seq, hidden)."""


class Decoder(GraphBuilder):
    """One graph under construction; `build` gives the model, its weights still unread.

    Args:
        spec: the network.
        checkpoint: its weights.
        precision: how matrices are stored.
        dialect: the operators to build from.
        hidden: layer counts k, 1 to all; each adds an output `hidden.k`, the residual stream after k layers.

    Raises:
        BadRequest: a layer the model does not have.
    """

    def __init__(
        self,
        spec: Spec,
        checkpoint: Checkpoint,
        precision: Precision,
        dialect: DialectOps,
        hidden: Sequence[int] = (),
    ) -> None:
        super().__init__(precision.activations)
        self.spec, self.checkpoint, self.precision, self.dialect = spec, checkpoint, precision, dialect
        self.hidden = sorted(set(hidden))
        if wrong := [k for k in self.hidden if not 1 <= k <= spec.layers]:
            raise BadRequest(f"no hidden state after layer {wrong[0]}: the model has layers 1 to {spec.layers}")
        self.presents: list[ir.Value] = []
        self.streams: list[ir.Value] = []  # the outputs `hidden.k`
        self.shared: dict[str, ir.Value] = {}  # what a dialect computes once for all layers
        self.used: set[str] = set()  # checkpoint tensors the graph read
        self.prefix = self._find_prefix()

    # Weights

    def tensor(self, slot: str, layer: int | None = None) -> str:
        """The checkpoint's name for a slot, remembered as used."""
        name = self.prefix + slot.format(i=layer)
        self.used.add(name)
        return name

    def linear(
        self, x: ir.Value, layer: int, role: str, slots: tuple[str, ...], sizes: tuple[int, int], bias: bool
    ) -> ir.Value:
        """`x @ W.T (+ b)` with the slots' matrices stacked; `sizes` are (outputs, inputs)."""
        name = f"layers.{layer}.{role}"
        weights = tuple(self.tensor(f"{slot}.weight", layer) for slot in slots)
        matrix = Matrix(self.checkpoint, name, weights, sizes, self.spec.names.input_major)
        added = None
        if bias:
            biases = tuple(self.tensor(f"{slot}.bias", layer) for slot in slots)
            added = self.weight(tensors.vector(self.checkpoint, biases, sizes[0], self.dtype, f"{name}.bias"))
        if self.precision.code_bits is not None:
            return self.dialect.quantized(self, x, matrix, added, self.precision)
        y = self.op("MatMul", x, self.weight(tensors.transposed(matrix, self.dtype), matrix.source_bytes))
        return y if added is None else self.op("Add", y, added)

    def norm_weights(self, slot: str, layer: int | None, size: int) -> tuple[ir.Value, ...]:
        """Scale, and for LayerNormalization bias."""

        def read(kind: str, offset: float) -> ir.Value:
            name = f"{slot.format(i=layer)}.{kind}"
            stored = (self.tensor(f"{slot}.{kind}", layer),)
            return self.weight(tensors.vector(self.checkpoint, stored, size, self.dtype, name, offset))

        scale = read("weight", self.spec.norm_offset)
        return (scale,) if self.spec.norm == "rms" else (scale, read("bias", 0.0))

    # The network

    def build(self) -> ir.Model:
        """The model; raises BadSource or UnsupportedModel where checkpoint and configuration disagree."""
        self._declare_inputs()
        stream, branch = self._embed(), None
        for layer in range(self.spec.layers):
            stream, branch = self._block(stream, branch, layer)
        stream = self._wanted_rows(self._sum(stream, branch), self.spec.layers)
        logits = self._logits(self._norm(stream, self.spec.names.final_norm, None))
        logits = retyped(logits, "logits", FLOAT, ("batch", "rows", self.spec.vocab))
        outputs = [logits, *self.streams, *self.presents]
        opsets = {"": OPSET, **self.dialect.domains}
        graph = ir.Graph(
            list(self.inputs.values()),
            outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports=opsets,
            name="decoder",
        )
        return ir.Model(graph, ir_version=11, producer_name="edgekit")

    def _wanted_rows(self, stream: ir.Value, layers: int) -> ir.Value:
        """The stream after `layers` layers at `rows`; an output too, where asked for."""
        stream = self.op("Gather", stream, self.inputs["rows"], axis=1)
        if layers in self.hidden:
            shown = stream if self.dtype == "float32" else self.op("Cast", stream, to=int(FLOAT))
            shape = ("batch", "rows", self.spec.hidden)
            self.streams.append(retyped(shown, f"hidden.{layers}", FLOAT, shape))
        return stream

    def _declare_inputs(self) -> None:
        self.input("input_ids", INT64, ("batch", "seq"))
        self.input("position_ids", INT64, ("batch", "seq"))
        self.dialect.inputs(self)
        cache = ("batch", self.spec.kv_heads, "capacity", self.spec.head_dim)
        for layer in range(self.spec.layers):
            for kind in ("key", "value"):
                self.input(f"past.{layer}.{kind}", self.element, cache)

    def bias_inputs(self, shape: Dims) -> None:
        """One attention bias for the layers that see everything, one for those with a window, where there are any."""
        for name, present in ((FULL, None in self.spec.windows), (SLIDING, self.spec.window is not None)):
            if present:
                self.input(name, self.element, shape)

    def bias_of(self, layer: int) -> ir.Value:
        """The attention bias of a layer."""
        return self.inputs[FULL if self.spec.windows[layer] is None else SLIDING]

    def rope_of(self, layer: int) -> Pair | None:
        """Cosine and sine tables of a layer, (context, rotary dim / 2); layers with the same rope share them."""
        rope = self.spec.ropes[layer]
        if rope is None:
            return None
        index = sorted(set(filter(None, self.spec.ropes)), key=self.spec.ropes.index).index(rope)
        shape, dtype = (self.spec.context, rope.dim // 2), np.dtype(self.dtype)
        cosine = tensors.lazy(f"rope.{index}.cos", self.element, shape, lambda: rope.tables(shape[0], dtype)[0])
        sine = tensors.lazy(f"rope.{index}.sin", self.element, shape, lambda: rope.tables(shape[0], dtype)[1])
        return self.weight(cosine), self.weight(sine)

    def _embed(self) -> ir.Value:
        spec, names = self.spec, self.spec.names
        name = "head" if self.tied else "embedding"
        tensor = self.tensor(names.embedding)
        shape = self.checkpoint.shape(tensor)
        if shape != (spec.vocab, spec.hidden):
            raise UnsupportedModel(f"embedding has shape {shape}; config.json: {spec.vocab}, {spec.hidden}")
        matrix = Matrix(self.checkpoint, name, (tensor,), (spec.vocab, spec.hidden))
        x = self.gathered(matrix) if self.precision.code_bits is None else self.dialect.embed(self, matrix)
        if spec.embedding_scale != 1.0:
            x = self.op("Mul", x, self.scalar("embedding.scale", spec.embedding_scale))
        if names.positions is not None:
            tensor = self.tensor(names.positions)
            positions = tensors.table(self.checkpoint, tensor, self.dtype, "positions")
            x = self.op("Add", x, self.op("Gather", self.weight(positions), self.inputs["position_ids"]))
        return x

    def gathered(self, matrix: Matrix) -> ir.Value:
        """Rows of the embedding, stored as floats."""
        table = tensors.table(self.checkpoint, matrix.tensors[0], self.precision.embedding, "embedding")
        x = self.op("Gather", self.weight(table, matrix.source_bytes), self.inputs["input_ids"])
        return x if self.precision.embedding == self.dtype else self.op("Cast", x, to=int(self.element))

    def _block(self, stream: ir.Value, branch: ir.Value | None, layer: int) -> Pair:
        names = self.spec.names
        stream, h = self._enter(stream, branch, names.attention_norm, layer)
        if layer in self.hidden:
            self._wanted_rows(stream, layer)
        branch = self._leave(self._attention(h, layer), names.attention_post_norm, layer)
        stream, h = self._enter(stream, branch, names.mlp_norm, layer)
        return stream, self._leave(self._mlp(h, layer), names.mlp_post_norm, layer)

    def _enter(self, stream: ir.Value, branch: ir.Value | None, slot: str | None, layer: int) -> Pair:
        """The stream with `branch` added, and what the next branch reads: its norm, or itself."""
        if slot is None or branch is None:
            stream = self._sum(stream, branch)
            return stream, self._norm(stream, slot, layer)
        return self.dialect.add_norm(self, stream, branch, self.norm_weights(slot, layer, self.spec.hidden))

    def _leave(self, branch: ir.Value, slot: str | None, layer: int) -> ir.Value:
        branch = self._norm(branch, slot, layer)
        if self.spec.residual_scale == 1.0:
            return branch
        return self.op("Mul", branch, self.scalar("residual.scale", self.spec.residual_scale))

    def _sum(self, stream: ir.Value, branch: ir.Value | None) -> ir.Value:
        return stream if branch is None else self.op("Add", stream, branch)

    def _norm(self, x: ir.Value, slot: str | None, layer: int | None) -> ir.Value:
        return x if slot is None else self.dialect.norm(self, x, self.norm_weights(slot, layer, self.spec.hidden))

    def _attention(self, h: ir.Value, layer: int) -> ir.Value:
        spec, names = self.spec, self.spec.names
        sizes = sum(spec.qkv_sizes), spec.hidden
        qkv = self.linear(h, layer, "attention.qkv", names.qkv, sizes, spec.qkv_bias)
        out, *new = self.dialect.attend(self, qkv, layer)
        cache = ("batch", spec.kv_heads, "capacity", spec.head_dim)
        for value, kind in zip(new, ("key", "value"), strict=True):
            self.presents.append(retyped(value, f"present.{layer}.{kind}", self.element, cache))
        sizes = spec.hidden, spec.qkv_sizes[0]
        return self.linear(out, layer, "attention.out", (names.attention_out,), sizes, spec.attention_out_bias)

    def split_qkv(self, qkv: ir.Value, layer: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Query, key and value, (batch, seq, width), the first two normalised where the family does."""
        spec, names = self.spec, self.spec.names
        sizes = self.constant("qkv.sizes", np.array(spec.qkv_sizes, np.int64))
        node = self.add(ir.node("Split", [qkv, sizes], {"axis": -1}, num_outputs=3))
        query, key, value = node.outputs
        if names.q_norm is not None and names.k_norm is not None:
            query = self._head_norm(query, names.q_norm, layer, spec.qkv_sizes[0])
            key = self._head_norm(key, names.k_norm, layer, spec.qkv_sizes[1])
        return query, key, value

    def _head_norm(self, x: ir.Value, slot: str, layer: int, width: int) -> ir.Value:
        """Query or key norm: over each head (Qwen 3, Gemma 3), or over all heads at once (OLMo 2)."""
        if self.spec.qk_norm == "all":
            return self.dialect.norm(self, x, self.norm_weights(slot, layer, width))
        heads = self.op("Reshape", x, self.constant("shape.heads", np.array([0, 0, -1, self.spec.head_dim], np.int64)))
        heads = self.dialect.norm(self, heads, self.norm_weights(slot, layer, self.spec.head_dim))
        return self.op("Reshape", heads, self.constant("shape.flat", np.array([0, 0, -1], np.int64)))

    def _mlp(self, h: ir.Value, layer: int) -> ir.Value:
        spec, names = self.spec, self.spec.names
        width = spec.ffn * (2 if spec.gated else 1)
        x = self.linear(h, layer, "mlp.in", names.mlp_in, (width, spec.hidden), spec.mlp_bias)
        if spec.gated:
            gate, up = self.add(ir.node("Split", [x], {"axis": -1, "num_outputs": 2}, num_outputs=2)).outputs
            x = self.op("Mul", self._activate(gate), up)
        else:
            x = self._activate(x)
        sizes = spec.hidden, spec.ffn
        return self.linear(x, layer, "mlp.out", (names.mlp_out,), sizes, spec.mlp_bias)

    def _activate(self, x: ir.Value) -> ir.Value:
        match self.spec.activation:
            case "silu":
                return self.op("Mul", x, self.op("Sigmoid", x))
            case "gelu":
                return self.op("Gelu", x)
            case "gelu_tanh":
                return self.op("Gelu", x, approximate="tanh")
            case "relu":
                return self.op("Relu", x)

    def _logits(self, h: ir.Value) -> ir.Value:
        """Float32 (batch, rows, vocab), scaled and capped as the family does."""
        spec = self.spec
        y = self._head(h)
        if self.dtype != "float32":
            y = self.op("Cast", y, to=int(FLOAT))
        if spec.logit_divisor != 1.0:
            y = self.op("Div", y, self.scalar("logits.divisor", spec.logit_divisor, "float32"))
        if spec.logit_softcap:
            cap = self.scalar("logits.cap", spec.logit_softcap, "float32")
            y = self.op("Mul", self.op("Tanh", self.op("Div", y, cap)), cap)
        return y

    def _head(self, h: ir.Value) -> ir.Value:
        """The product with the head's matrix, which for floats is stored once even where the embedding shares it.

        Gemm takes it as it lies (transB); a Transpose node would be folded into a second copy by the engine.
        """
        tensor = self.head_tensor
        matrix = Matrix(self.checkpoint, "head", (tensor,), (self.spec.vocab, self.spec.hidden))
        if self.precision.code_bits is not None:
            return self.dialect.quantized(self, h, matrix, None, self.dialect.table(self.precision))
        name = "embedding" if self.tied else "head"
        weight = self.weight(tensors.table(self.checkpoint, tensor, self.dtype, name), matrix.source_bytes)
        flat = self.op("Reshape", h, self.constant("shape.rows", np.array([-1, self.spec.hidden], np.int64)))
        y = self.op("Gemm", flat, weight, transB=1)
        vocabulary = self.constant("shape.vocab", np.array([self.spec.vocab], np.int64))
        shape = self.op("Concat", self.op("Shape", h, end=2), vocabulary, axis=0)
        return self.op("Reshape", y, shape)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.head_tensor == self.prefix + self.spec.names.embedding

    @cached_property
    def head_tensor(self) -> str:
        """The embedding where tied. Where a tied checkpoint holds another head all the same, that head is what runs."""
        embedding = self.tensor(self.spec.names.embedding)
        heads = self.spec.names.heads
        stored = next((name for name in heads if name in self.checkpoint), None)
        if self.spec.tied and (stored is None or self.checkpoint.same(stored, embedding)):
            return embedding
        self.used.add(stored or heads[0])
        return stored or heads[0]

    def _find_prefix(self) -> str:
        names = self.spec.names
        found = (prefix for prefix in names.prefixes if prefix + names.embedding in self.checkpoint)
        return next(found, names.prefixes[0])

    def check_nothing_left_over(self) -> None:
        """A weight that `build` did not read means another architecture than the configuration says.

        Raises:
            UnsupportedModel: there is one.
        """
        left = [
            name
            for name in self.checkpoint.entries
            if name not in self.used | {*self.spec.names.heads}
            and not any(re.fullmatch(pattern, name) for pattern in self.spec.names.unused)
        ]
        if left:
            raise UnsupportedModel(
                f"{self.checkpoint.folder}: {len(left)} tensors of the checkpoint have no place in a "
                f"{self.spec.family} decoder, the first {left[0]!r}. The architecture is not the one config.json names."
            )
