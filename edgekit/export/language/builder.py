"""A graph under construction: nodes, initializers whose bytes are still unread, inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgekit.export.language import tensors
from edgekit.export.language.tensors import ELEMENT
from edgekit.quant.precision import Float

Array = npt.NDArray[Any]
Dims = tuple[int | str, ...]


class GraphBuilder:
    """Collects the pieces of one graph; `dtype` is the type of its activations."""

    def __init__(self, dtype: Float) -> None:
        self.dtype = dtype
        self.element = ELEMENT[dtype]
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.inputs: dict[str, ir.Value] = {}
        self.views: dict[str, str] = {}  # initializer -> the initializer whose bytes it has
        self.largest = 0  # bytes of the largest initializer and what it is made from: they are in memory together

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
        self.inputs[name] = typed(name, dtype, shape)

    def constant(self, name: str, value: Array) -> ir.Value:
        """A small initializer, made once per name."""
        return self.weight(ir.Tensor(np.asarray(value, order="C"), name=name))

    def weight(self, tensor: ir.TensorProtocol, source_bytes: int = 0) -> ir.Value:
        """An initializer, made once per name out of `source_bytes` of the checkpoint."""
        name = str(tensor.name)
        self.largest = max(self.largest, source_bytes + tensor.nbytes)
        if name not in self.initializers:
            value = typed(name, tensor.dtype, tuple(int(n) for n in tensor.shape))
            value.const_value = tensor
            self.initializers[name] = value
        return self.initializers[name]

    def view(self, tensor: ir.LazyTensor, name: str, shape: tuple[int, ...], source_bytes: int = 0) -> ir.Value:
        """An initializer with the bytes of `tensor` and another shape: on disk they lie once."""
        self.views[name] = str(tensor.name)
        return self.weight(tensors.view(tensor, name, shape), source_bytes)

    def scalar(self, name: str, value: float, dtype: str = "") -> ir.Value:
        """A scalar in the activations' type."""
        return self.constant(name, np.asarray(value, dtype or self.dtype))


def typed(name: str, dtype: ir.DataType, shape: Dims) -> ir.Value:
    """A value with name, type and shape: a graph input or an initializer."""
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def retyped(value: ir.Value, name: str, dtype: ir.DataType, shape: Dims) -> ir.Value:
    """`value` as a graph output: named, with type and shape."""
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
    return value
