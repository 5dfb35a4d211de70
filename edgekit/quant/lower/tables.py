"""GatherBlockQuantized over what MatMulNBits stores: its third axis is a block, so scales get one, and rows lose it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.quant.graph import Unit
from edgekit.quant.lower.common import constant, make_node


def for_each(graph: ir.Graph, stored: ir.Value, blocks: int, bits: int = 0) -> ir.Value:
    """(n, blocks, 1) of what MatMulNBits has as (n, blocks), or with `bits` as packed uint8 (n, bytes).

    All of it is folded when the graph is opened.
    """
    name = f"{stored.name}.each"
    last = constant(graph, "quant.last", np.array([-1], np.int64))
    kept = ir.DataType.UINT8 if bits else ir.DataType.FLOAT
    made: list[ir.Node] = []

    def then(op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        made.append(make_node(op, inputs, f"{name}.{len(made)}", ir.Value(name=""), dtype=kept, **attributes))
        return made[-1].outputs[0]

    whole = stored
    if bits:
        places = constant(graph, f"quant.places{bits}", np.arange(0, 8, bits, dtype=np.uint8))
        reach = constant(graph, f"quant.reach{bits}", np.array(1 << bits, np.uint8))
        rows = constant(graph, "quant.rows", np.array([0, -1], np.int64))
        shifted = then("BitShift", then("Unsqueeze", whole, last), places, direction="RIGHT")
        flat = then("Reshape", then("Mod", shifted, reach), rows)
        ends = [constant(graph, f"quant.{at}", np.array([at], np.int64)) for at in (0, blocks)]
        whole = then("Slice", flat, *ends, last)
    each = then("Unsqueeze", whole, last)
    graph.insert_before(graph[0], made)
    return each


def rows_of(
    graph: ir.Graph, blocks: ir.Value, ids: ir.Value | None, unit: Unit, padded: int, like: ir.Value
) -> list[ir.Node]:
    """(..., blocks, block) to (..., k), without what pads the last block."""
    shape = make_node("Shape", [ids], f"{unit.id}.ids", ir.Value(name=""), dtype=ir.DataType.INT64)
    width = constant(graph, f"quant.{padded}", np.array([padded], np.int64))
    size = make_node("Concat", [shape.outputs[0], width], f"{unit.id}.size", ir.Value(name=""), axis=0)
    size.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    rows = make_node("Reshape", [blocks, size.outputs[0]], f"{unit.id}.rows", like)
    if padded == unit.k:
        return [shape, size, rows]
    last = constant(graph, "quant.last", np.array([-1], np.int64))
    ends = [constant(graph, f"quant.{at}", np.array([at], np.int64)) for at in (0, unit.k)]
    cut = make_node("Slice", [rows.outputs[0], *ends, last], f"{unit.id}.cut", like)
    return [shape, size, rows, cut]
