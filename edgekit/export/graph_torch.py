"""An ONNX graph run by torch, so that gradients flow through it: whoever exported it, and whatever made it.

A value lives until its last reader has run (or as long as autograd needs it). Weights are read where they are first
used, without a copy where they lie in a file as they are.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgekit.errors import BadRequest, SessionFailed, UnsupportedModel
from edgekit.export.graph_torch_layers import Attributes, name_of
from edgekit.export.graph_torch_ops import OPS, Op

OLDEST_OPSET = 13  # before it, axes were attributes and Softmax flattened

Watch = Callable[[ir.Node, Sequence[Tensor | None], Sequence[Tensor]], None]


def run_graph(
    model: ir.Model,
    feeds: Mapping[str, Tensor],
    *,
    weights: Callable[[ir.Value], Tensor] | None = None,
    watch: Watch | None = None,
) -> dict[str, Tensor]:
    """Run a graph once.

    Args:
        model: of opset 13 or later, with operators of OPS.
        feeds: every input, by name; in the types the graph declares.
        weights: the tensor of an initializer; `read_weight` unless given.
        watch: told each node with its inputs and outputs, as soon as it has run. An output that needs no gradient yet
            may be made a leaf there (`requires_grad_()`).

    Returns:
        The outputs, by name.

    Raises:
        BadRequest: an input is not fed.
        UnsupportedModel: an operator, or a form of one, that is not in OPS.
        SessionFailed: torch refused a node, for shapes that do not fit above all.
    """
    graph = model.graph
    check_operators(model)
    weights = weights or read_weight
    values: dict[ir.Value, Tensor] = {}
    for value in graph.inputs:
        if value.name in feeds:
            values[value] = feeds[value.name]
        elif value.const_value is None:
            raise BadRequest(f"input {value.name!r} of the graph is not fed; there is {', '.join(feeds) or 'nothing'}")

    def get(value: ir.Value | None) -> Tensor | None:
        if value is not None and value not in values:
            values[value] = weights(value)
        return None if value is None else values[value]

    left = Counter(value for node in graph for value in node.inputs if value is not None)
    left.update(graph.outputs)
    for node in graph:
        inputs = [get(value) for value in node.inputs]
        outputs = _run_node(node, OPS[name_of(node)], inputs)
        if watch is not None:
            watch(node, inputs, outputs)
        values.update(zip(node.outputs, outputs, strict=False))
        del inputs, outputs
        for value in node.inputs:
            if value is not None:
                left[value] -= 1
        for value in (*node.inputs, *node.outputs):
            if value is not None and not left[value]:
                values.pop(value, None)
    results = {str(value.name): get(value) for value in graph.outputs}
    return {name: value for name, value in results.items() if value is not None}


def check_operators(model: ir.Model) -> None:
    """Refuse a graph that cannot be run before anything is computed.

    Raises:
        UnsupportedModel: it names every operator that is missing, or the opset.
    """
    missing = sorted({name_of(node) for node in model.graph} - OPS.keys())
    if missing:
        raise UnsupportedModel(f"gradient probes do not model {', '.join(missing)}; measure this graph with a scan")
    opset = model.graph.opset_imports.get("", OLDEST_OPSET)
    if opset < OLDEST_OPSET:
        raise UnsupportedModel(f"gradient probes read opset {OLDEST_OPSET} and later, not {opset}; export it anew")


def read_weight(value: ir.Value) -> Tensor:
    """An initializer's numbers; those of a file are mapped, not copied, and must not be written to."""
    assert value.const_value is not None
    array = value.const_value.numpy()
    kind = value.const_value.dtype
    if kind == ir.DataType.BFLOAT16:  # numpy has no such type of its own
        return _view(array.view(np.int16)).view(torch.bfloat16)
    return _view(array)


def _view(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def _run_node(node: ir.Node, op: Op, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    try:
        found = op(Attributes(node), *inputs)
    except (RuntimeError, IndexError, ValueError, TypeError) as why:
        shapes = ", ".join("none" if each is None else str(tuple(each.shape)) for each in inputs)
        raise SessionFailed(f"torch cannot run {node.name} ({name_of(node)}) on {shapes}: {why}") from why
    return found if isinstance(found, tuple) else (found,)
