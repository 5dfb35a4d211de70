"""Concatenations apart: Conv(Concat(a, b)) as Conv(a) + Conv(b), each with scales of its own.

The halves of a UNet's skip connection differ in range, and a shortcut reads them as they are (Q-Diffusion, Li et al.
2023, arXiv 2302.04304, calls this split quantization).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgekit.quant.graph import Array, Unit, lazy_initializer
from edgekit.quant.insert import Inserter
from edgekit.quant.plan import Rewrite


def split_shortcuts(model: ir.Model, units: Sequence[Unit]) -> tuple[Rewrite, ...]:
    """Make Conv(Concat(a, b)) into Conv(a) + Conv(b) where a Conv reads a concatenation of channels as it is.

    The parts of unit `u` are `u.0`, `u.1` and so on; the bias goes with the first. Convolutions of graph inputs, those
    in groups, and concatenations whose channels are not known stay as they are.
    """
    nodes = {node.name: node for node in model.graph}
    rewrites = []
    for unit in units:
        if unit.op != "Conv" or unit.group != 1 or unit.role == "conv_in" or unit.id not in nodes:
            continue
        node = nodes[unit.id]
        channels = _channels(node)
        if channels:
            _split_conv(model.graph, node, channels)
            rewrites.append(Rewrite("shortcut", unit.id))
    if rewrites:
        RemoveUnusedNodesPass()(model)
    return tuple(rewrites)


def _channels(node: ir.Node) -> tuple[int, ...]:
    """Channels of what a Conv reads concatenated, () where it reads anything else or they cannot be told."""
    data, weight = node.inputs[0], node.inputs[1]
    maker = data.producer() if data is not None else None
    if maker is None or maker.op_type != "Concat" or len(maker.inputs) < 2:
        return ()
    assert weight is not None
    assert weight.const_value is not None
    rank, total = len(weight.const_value.shape), int(weight.const_value.shape[1])
    if maker.attributes["axis"].as_int() % rank != 1:
        return ()
    known = [value.shape[1] if value is not None and value.shape is not None else None for value in maker.inputs]
    sizes = [size if isinstance(size, int) else 0 for size in known]
    if sizes.count(0) == 1:
        sizes[sizes.index(0)] = total - sum(sizes)
    return tuple(sizes) if sum(sizes) == total and min(sizes) > 0 else ()


def _split_conv(graph: ir.Graph, node: ir.Node, channels: tuple[int, ...]) -> None:
    weight, output = node.inputs[1], node.outputs[0]
    data = node.inputs[0]
    assert weight is not None
    assert data is not None
    tensor, maker, name = weight.const_value, data.producer(), node.name
    assert tensor is not None
    assert maker is not None
    add, total, at = Inserter(graph, node), None, 0
    for index, (value, count) in enumerate(zip(maker.inputs, channels, strict=True)):
        assert value is not None
        shape = (tensor.shape[0], count, *tensor.shape[2:])
        cut = partial(_columns, tensor, at, at + count)
        part = lazy_initializer(graph, f"{name}.{index}.split", cut, tensor.dtype, shape)
        at += count
        bias = [each for each in node.inputs[2:] if each is not None and not index]
        inputs = [value, part, *bias]
        made = add("Conv", f"{name}.{index}", inputs, output.dtype, output.shape, **node.attributes)
        total = made if total is None else add("Add", f"{name}.to.{index}", [total, made], output.dtype, output.shape)
    assert total is not None
    kept = output.name
    output.replace_all_uses_with(total, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    total.name = kept


def _columns(weight: ir.TensorProtocol, start: int, stop: int) -> Array:
    return np.ascontiguousarray(weight.numpy()[:, start:stop])
