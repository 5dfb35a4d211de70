"""A unit's product as a choice computes it on a device, in torch: what edgekit.quant.trial_graph is in ONNX.

Weights are rounded, inputs are, and a convolution's output where the engine fuses it only so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from edgekit.errors import BadRequest
from edgekit.export.graph_torch_layers import Attributes
from edgekit.export.graph_torch_ops import OPS
from edgekit.quant.choices import Choice
from edgekit.quant.graph import F32, Unit
from edgekit.quant.lower.common import Store
from edgekit.quant.targets import Target
from edgekit.quant.trial_graph import activation_code, ranges_of, rounding_of
from edgekit.quant.weights import restore

Range = tuple[float, float]

REACH = 127  # of a code around its middle
E4M3_MAX, E2M1_MAX, FP4_BLOCK = 448.0, 6.0, 16
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_BETWEEN = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # halfway from each number to the next


def as_chosen(
    node: ir.Node,
    unit: Unit,
    weight: F32,
    choice: Choice,
    target: Target,
    ranges: Mapping[str, Range],
    store: Store,
) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """The unit as a function of its input and a convolution's bias; its weights are rounded once.

    None if the choice changes nothing: it holds these weights exactly, and rounds no activation.

    Args:
        node, unit: the product, and what is known of it.
        weight: its weight matrix (n, k) as it is.
        choice, target: what it becomes, and where.
        ranges: (low, high) by value name.
        store: how a weight matrix is rounded.

    Raises:
        BadRequest: an activation is to be rounded that has no range.
    """
    rounding = rounding_of(choice, target) if unit.op != "Gather" else ""
    rounded = ranges_of(unit, rounding, target)
    if missing := [name for name in rounded if name not in ranges]:
        raise BadRequest(f"{unit.id} cannot be {choice.name}: calibration has no range of {', '.join(missing)}")
    after = restore(store(weight, choice, target.code_bits, unit))
    if not rounding and np.array_equal(weight, after):
        return None
    matrix = torch.from_numpy(after)
    if unit.op == "Gather":
        return lambda index, _: _tensor(OPS["Gather"](Attributes(node), matrix, index))

    def feed(x: Tensor) -> Tensor:
        return rounded_data(x, rounding, ranges.get(unit.data, (0.0, 0.0)), target.symmetric)

    if unit.op == "MatMul":
        return lambda x, _: functional.linear(feed(x), matrix)
    shape = node.inputs[1].shape if node.inputs[1] is not None else None
    assert shape is not None
    kernel = matrix.reshape([int(size) for size in shape])

    def convolve(x: Tensor, bias: Tensor | None) -> Tensor:
        y = _tensor(OPS["Conv"](Attributes(node), feed(x), kernel, bias))
        return round_static(y, ranges[unit.output], target.symmetric) if unit.output in rounded else y

    return convolve


def rounded_data(x: Tensor, rounding: str, ends: Range, symmetric: bool) -> Tensor:
    """Activations as a rounding of trial_graph leaves them: "" for none, or static, row, blockN, fp8, fp4."""
    if rounding == "static":
        return round_static(x, ends, symmetric)
    if rounding == "row":
        return round_rows(x)
    if rounding == "fp8":
        return round_fp8(x, ends)
    if rounding == "fp4":
        return round_fp4(x, ends)
    return round_rows(x, int(rounding.removeprefix("block"))) if rounding else x


def round_static(x: Tensor, ends: Range, symmetric: bool) -> Tensor:
    """Eight bits, one scale for the whole tensor: with a zero point, or signed around 0."""
    scale, zero = (float(each) for each in activation_code(ends, symmetric))
    lowest = -REACH - 1 if symmetric else 0
    return ((x / scale).round() + zero).clamp(lowest, lowest + 255).sub(zero) * scale


def round_rows(x: Tensor, block: int = 0) -> Tensor:
    """One scale per token, or per `block` numbers of one: the largest magnitude over 127."""
    if block:
        return _in_blocks(x, block, round_rows)
    scale = x.abs().amax(-1, keepdim=True) / REACH
    return torch.where(scale > 0, (x / scale).round() * scale, x)


def round_fp8(x: Tensor, ends: Range) -> Tensor:
    """E4M3, one scale for the whole tensor."""
    scale = max(map(abs, ends)) / E4M3_MAX or 1.0
    return _e4m3(x / scale) * scale


def round_fp4(x: Tensor, ends: Range) -> Tensor:
    """E2M1 with an E4M3 scale per 16 numbers along the last axis, over one scale for the whole tensor (NVFP4)."""
    whole = max(map(abs, ends)) / (E4M3_MAX * E2M1_MAX) or 1.0

    def rounded(blocks: Tensor) -> Tensor:
        scale = _e4m3(blocks.abs().amax(-1, keepdim=True) / whole / E2M1_MAX) * whole
        codes = blocks / torch.where(scale > 0, scale, torch.inf)
        return torch.tensor(E2M1)[torch.bucketize(codes.abs(), torch.tensor(E2M1_BETWEEN))] * codes.sign() * scale

    return _in_blocks(x, FP4_BLOCK, rounded)


def _in_blocks(x: Tensor, block: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change the last axis block by block; the last block is padded with zeros."""
    size = x.shape[-1]
    parts = functional.pad(x, (0, -size % block)).unflatten(-1, (-1, block))
    return change(parts).flatten(-2)[..., :size]


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)


def _tensor(found: Tensor | tuple[Tensor, ...]) -> Tensor:
    assert isinstance(found, Tensor)
    return found
