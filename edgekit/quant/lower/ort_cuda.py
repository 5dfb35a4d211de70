"""ONNX Runtime on CUDA: half-precision products between Casts, and stored integers as MatMulNBits.

    fp16        the product runs in float16 on tensor cores; see `typed`
    wXa16       MatMulNBits on float16 activations: the float32 kernel has no tensor cores

There is no int8 Q/DQ here: the provider fuses none of it, and DequantizeLinear before a float product costs more than
it saves. MatMulNBits takes no bias on CUDA, so that stays an Add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgekit.quant.choices import Choice
from edgekit.quant.graph import Unit
from edgekit.quant.lower.common import Ranges, Store, StoredWeight, checked, exchange, make_node
from edgekit.quant.lower.typed import (
    FLOAT_TYPES,
    cancel_casts,
    cast_back,
    cast_of,
    check_typed,
    lazy_once,
    product_type,
    retype,
)
from edgekit.quant.targets import Target
from edgekit.quant.weights import pack_nbits

MICROSOFT = "com.microsoft"
HALF = ir.DataType.FLOAT16


def lower(
    model: ir.Model,
    units: Sequence[Unit],
    choices: Mapping[str, str],
    ranges: Ranges,
    target: Target,
    store: Store,
) -> None:
    """See `edgekit.quant.lower.lower`. `ranges` are not needed; fp16 is refused where they are beyond its reach."""
    work = checked(units, choices, ranges, target, lambda unit, choice: ())  # noqa: ARG005
    for unit, choice in work:
        check_typed(model, unit, choice.name if choice.is_float else "fp16", ranges)
    nodes = {str(node.name): node for node in model.graph}
    for unit, choice in work:
        if choice.name in FLOAT_TYPES:
            retype(model, nodes[unit.id], unit, choice.name)
        else:
            _nbits(model, nodes[unit.id], unit, choice, StoredWeight(model, unit, choice, target.code_bits, store))
            model.opset_imports.setdefault(MICROSOFT, 1)
    cancel_casts(model.graph)
    RemoveUnusedNodesPass()(model)


def _nbits(model: ir.Model, node: ir.Node, unit: Unit, choice: Choice, weight: StoredWeight) -> None:
    """MatMulNBits in float16; a K that is no multiple of the block is padded in what is stored."""
    graph, form, before = model.graph, choice.weight, product_type(model, unit)
    name = f"{unit.weight}.{choice.name}"
    size = (unit.n, weight.blocks, form.block * form.bits // 8)
    codes = lazy_once(graph, f"{name}.codes", lambda: pack_nbits(weight.stored()), ir.DataType.UINT8, size)
    scales = lazy_once(graph, f"{name}.scales", lambda: weight.scales().astype(np.float16), HALF, size[:2])
    data = node.inputs[0] if before == HALF else cast_of(graph, node.inputs[0], HALF)
    attributes = {"K": unit.k, "N": unit.n, "bits": form.bits, "block_size": form.block}
    product = make_node("MatMulNBits", [data, codes, scales], unit.id, node.outputs[0], domain=MICROSOFT, **attributes)
    exchange(graph, [node], [product])
    if before != HALF:
        cast_back(graph, product, HALF, "fp16")
