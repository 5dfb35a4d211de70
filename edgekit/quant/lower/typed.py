"""Products of another float type: a Cast before, weights of that type, a Cast back after.

An engine whose graph's types are its plan (TensorRT strongly typed, ONNX Runtime on CUDA) runs a product in the type of
what it is fed. Everything outside the unit keeps its type, and its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgekit.errors import BadRequest
from edgekit.quant.graph import Unit, initializer, lazy_initializer
from edgekit.quant.lower.common import FLOAT16_MAX, Ranges, exchange, half_initializer, insert_behind, make_node

Array = npt.NDArray[Any]

FLOAT_TYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
BFLOAT16_CONV_OPSET = 22  # first whose Conv takes bfloat16

# The second type holds every number of the first: a cast to it and on is a cast straight on.
HOLDS = {
    (ir.DataType.FLOAT16, ir.DataType.FLOAT),
    (ir.DataType.BFLOAT16, ir.DataType.FLOAT),
    *((dtype, dtype) for dtype in FLOAT_TYPES.values()),
}


def product_type(model: ir.Model, unit: Unit) -> ir.DataType:
    """The float type a unit's product has before it is lowered: that of its weights, which ONNX makes that of all."""
    return initializer(model, unit.weight).dtype


def check_typed(model: ir.Model, unit: Unit, choice: str, ranges: Ranges) -> None:
    """Refuse what the type cannot do.

    Raises:
        BadRequest: a convolution in bfloat16 before opset 22; fp16 for activations known to be larger than it holds.
    """
    opset = model.opset_imports.get("", 0)
    if choice == "bf16" and unit.op == "Conv" and opset < BFLOAT16_CONV_OPSET:
        raise BadRequest(
            f"unit {unit.id!r} is to be bf16 and the graph has opset {opset}; Conv takes bfloat16 from "
            f"{BFLOAT16_CONV_OPSET} on. Export it with a later one, or choose fp16."
        )
    for name in (unit.data, unit.output) if choice == "fp16" and unit.op != "Gather" else ():
        reach = max(map(abs, ranges.get(name, (0.0,))))
        if reach > FLOAT16_MAX:
            raise BadRequest(
                f"unit {unit.id!r} is to be fp16 and value {name!r} reaches {reach:.3g}, beyond its 65504; "
                "choose bf16 or fp32 for it"
            )


def retype(model: ir.Model, node: ir.Node, unit: Unit, choice: str) -> None:
    """Run a unit in the float type of `choice`, if it does not yet. What it reads and gives keeps its type."""
    dtype, before = FLOAT_TYPES[choice], product_type(model, unit)
    if dtype == before:
        return
    weight = _weight(model, unit, choice)
    if unit.op == "Gather":
        output = node.outputs[0]
        gather = make_node("Gather", [weight, node.inputs[1]], f"{unit.id}.{choice}", output, dtype=dtype)
        for name, attribute in node.attributes.items():
            gather.attributes[name] = attribute
        exchange(model.graph, [node], [gather, _cast(gather.outputs[0], unit.id, before)])
        return
    node.replace_input_with(0, cast_of(model.graph, node.inputs[0], dtype))
    node.replace_input_with(1, weight)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        node.replace_input_with(2, _bias(model.graph, node.inputs[2], dtype, choice))
    cast_back(model.graph, node, dtype, choice)


def cast_of(graph: ir.Graph, value: ir.Value | None, dtype: ir.DataType) -> ir.Value:
    """A value in another type; one Cast for all that read it so."""
    assert value is not None
    name = f"{value.name}.{dtype.name.lower()}"
    for node, _ in value.uses():
        if node.name == name:  # ours, so it stands right behind the value, before any reader
            return node.outputs[0]
    cast = _cast(value, name, dtype)
    insert_behind(graph, value, [cast])
    return cast.outputs[0]


def cast_back(graph: ir.Graph, node: ir.Node, dtype: ir.DataType, suffix: str) -> None:
    """Let a node give `dtype`, and a Cast behind it what everyone read, by the name it had."""
    output = node.outputs[0]
    before = output.dtype or ir.DataType.FLOAT
    cast = _cast(output, f"{node.name}.back", before)
    cast.outputs[0].name, output.name = output.name, f"{output.name}.{suffix}"
    readers = list(output.uses())
    graph.insert_after(node, [cast])
    for reader, index in readers:
        if reader is not cast:
            reader.replace_input_with(index, cast.outputs[0])
    for index, value in enumerate(graph.outputs):
        if value is output:
            graph.outputs[index] = cast.outputs[0]
    output.type = ir.TensorType(dtype)


def cancel_casts(graph: ir.Graph) -> None:
    """Skip the first of two neighbouring Casts where it loses nothing, so that a run of narrow units stays narrow.

    float16 -> float32 -> float16 is no cast at all; float16 -> float32 -> bfloat16 is one. float32 -> float16 ->
    float32 stays: it rounds. Casts that nothing reads any more are left for RemoveUnusedNodesPass.
    """
    for node in graph:
        if node.op_type != "Cast" or (source := _behind(node)) is None:
            continue
        output = node.outputs[0]
        if source.dtype == output.dtype and not output.is_graph_output():
            output.replace_all_uses_with(source)
        else:
            node.replace_input_with(0, source)


def lazy_once(
    graph: ir.Graph, name: str, make: Callable[[], Array], dtype: ir.DataType, shape: Sequence[int]
) -> ir.Value:
    """An initializer that is computed when it is written; one per name."""
    if name not in graph.initializers:
        lazy_initializer(graph, name, lambda: np.ascontiguousarray(make()), dtype, tuple(shape))
    return graph.initializers[name]


def _behind(node: ir.Node) -> ir.Value | None:
    """What a Cast's own maker casts, where that Cast loses nothing."""
    value = node.inputs[0]
    maker = None if value is None else value.producer()
    if value is None or maker is None or maker.op_type != "Cast":
        return None
    source = maker.inputs[0]
    return source if source is not None and (source.dtype, value.dtype) in HOLDS else None


def _cast(value: ir.Value, name: str, dtype: ir.DataType) -> ir.Node:
    return make_node("Cast", [value], name, value, dtype=dtype, to=int(dtype))


def _weight(model: ir.Model, unit: Unit, choice: str) -> ir.Value:
    if choice == "fp16" and product_type(model, unit) == ir.DataType.FLOAT:
        return half_initializer(model, unit)  # refuses weights beyond its reach
    tensor, dtype = initializer(model, unit.weight), FLOAT_TYPES[choice]
    name = f"{unit.weight}.{choice}"
    return lazy_once(model.graph, name, lambda: tensor.numpy().astype(dtype.numpy()), dtype, tensor.shape.numpy())


def _bias(graph: ir.Graph, bias: ir.Value, dtype: ir.DataType, choice: str) -> ir.Value:
    if not bias.is_initializer() or bias.const_value is None:
        return cast_of(graph, bias, dtype)
    tensor = bias.const_value
    name = f"{bias.name}.{choice}"
    return lazy_once(graph, name, lambda: tensor.numpy().astype(dtype.numpy()), dtype, tensor.shape.numpy())
