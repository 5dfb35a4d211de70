"""The decoder graph: one layer loop for every family and both dialects.

Every family is the same residual stream. A block adds a branch to it, normalises, and computes the next branch:

    stream, h = enter(stream, branch)      stream += branch; h = norm(stream)
    branch    = attention(h), then mlp(h)  with the family's optional post-norm and residual factor

Which norms exist is which names a family has. Dialects differ in `DialectOps`: inputs, attention, quantized products,
and how a norm takes the sum before it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgekit.errors import UnsupportedModel
from edgekit.export.language import tensors
from edgekit.export.language.spec import Spec
from edgekit.export.language.tensors import ELEMENT, Matrix
from edgekit.export.language.weights import Checkpoint
from edgekit.quant.precision import Precision

Array = npt.NDArray[Any]
Dims = tuple[int | str, ...]
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

    def quantized(self, decoder: Decoder, x: ir.Value, matrix: Matrix, bias: ir.Value | None) -> ir.Value:
        """`x @ matrix.T + bias` with packed weights."""


class Decoder:
    """One graph under construction; `build` gives the model, its weights still unread."""

    def __init__(self, spec: Spec, checkpoint: Checkpoint, precision: Precision, dialect: DialectOps) -> None:
        self.spec, self.checkpoint, self.precision, self.dialect = spec, checkpoint, precision, dialect
        self.dtype = precision.activations
        self.element = ELEMENT[self.dtype]
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.inputs: dict[str, ir.Value] = {}
        self.presents: list[ir.Value] = []
        self.used: set[str] = set()  # checkpoint tensors the graph read
        self.largest = 0  # bytes of the largest initializer and what it is made from: they are in memory together
        self.prefix = self._find_prefix()

    # Graph pieces

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """One node with one output."""
        node = ir.node(kind, inputs, attributes or None, domain=domain)
        return self.add(node).outputs[0]

    def add(self, node: ir.Node) -> ir.Node:
        """Append a node, numbered, so that tools can name it."""
        node.name = f"{node.op_type}_{len(self.nodes)}"
        self.nodes.append(node)
        return node

    def input(self, name: str, dtype: ir.DataType, shape: Dims) -> None:
        """Declare a graph input."""
        self.inputs[name] = _value(name, dtype, shape)

    def constant(self, name: str, value: Array) -> ir.Value:
        """A small initializer, made once per name."""
        return self.weight(ir.Tensor(np.ascontiguousarray(value), name=name))

    def weight(self, tensor: ir.TensorProtocol, source_bytes: int = 0) -> ir.Value:
        """An initializer, made once per name out of `source_bytes` of the checkpoint."""
        name = str(tensor.name)
        self.largest = max(self.largest, source_bytes + tensor.nbytes)
        if name not in self.initializers:
            value = _value(name, tensor.dtype, tuple(int(n) for n in tensor.shape))
            value.const_value = tensor
            self.initializers[name] = value
        return self.initializers[name]

    def scalar(self, name: str, value: float, dtype: str = "") -> ir.Value:
        """A scalar in the activations' type."""
        return self.constant(name, np.asarray(value, dtype or self.dtype))

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
            return self.dialect.quantized(self, x, matrix, added)
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
        stream = self.op("Gather", self._sum(stream, branch), self.inputs["rows"], axis=1)
        logits = self._logits(self._norm(stream, self.spec.names.final_norm, None))
        self._check_nothing_left_over()
        outputs = [_retyped(logits, "logits", FLOAT, ("batch", "rows", self.spec.vocab)), *self.presents]
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
        table = tensors.table(self.checkpoint, self.tensor(names.embedding), self.precision.embedding, "embedding")
        if tuple(table.shape) != (spec.vocab, spec.hidden):
            raise UnsupportedModel(
                f"embedding has shape {tuple(table.shape)}; config.json: {spec.vocab}, {spec.hidden}"
            )
        x = self.op("Gather", self.weight(table, self._stored(names.embedding)), self.inputs["input_ids"])
        if self.precision.embedding != self.dtype:
            x = self.op("Cast", x, to=int(self.element))
        if spec.embedding_scale != 1.0:
            x = self.op("Mul", x, self.scalar("embedding.scale", spec.embedding_scale))
        if names.positions is not None:
            tensor = self.tensor(names.positions)
            positions = tensors.table(self.checkpoint, tensor, self.dtype, "positions")
            x = self.op("Add", x, self.op("Gather", self.weight(positions), self.inputs["position_ids"]))
        return x

    def _stored(self, slot: str) -> int:
        return self.checkpoint.entry(self.tensor(slot)).nbytes

    def _block(self, stream: ir.Value, branch: ir.Value | None, layer: int) -> Pair:
        names = self.spec.names
        stream, h = self._enter(stream, branch, names.attention_norm, layer)
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
            self.presents.append(_retyped(value, f"present.{layer}.{kind}", self.element, cache))
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
        tensor = self._head_tensor()
        matrix = Matrix(self.checkpoint, "head", (tensor,), (self.spec.vocab, self.spec.hidden))
        if self.precision.code_bits is not None:
            return self.dialect.quantized(self, h, matrix, None)
        name = "embedding" if tensor == self.prefix + self.spec.names.embedding else "head"
        weight = self.weight(tensors.table(self.checkpoint, tensor, self.dtype, name), matrix.source_bytes)
        flat = self.op("Reshape", h, self.constant("shape.rows", np.array([-1, self.spec.hidden], np.int64)))
        y = self.op("Gemm", flat, weight, transB=1)
        vocabulary = self.constant("shape.vocab", np.array([self.spec.vocab], np.int64))
        shape = self.op("Concat", self.op("Shape", h, end=2), vocabulary, axis=0)
        return self.op("Reshape", y, shape)

    def _head_tensor(self) -> str:
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

    def _check_nothing_left_over(self) -> None:
        """A weight the graph did not read means another architecture than the configuration says."""
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


def _value(name: str, dtype: ir.DataType, shape: Dims) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _retyped(value: ir.Value, name: str, dtype: ir.DataType, shape: Dims) -> ir.Value:
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
    return value
