"""ONNX operators in torch, differentiable: OPS has one function per operator, of its attributes and inputs.

Operators follow the ONNX specification of opset 13 and later, and ONNX Runtime's of its own. What a function does not
model it refuses by name; nothing is approximated. Layers with weights are in graph_torch_layers.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from edgekit.export import graph_torch_layers as layers
from edgekit.export.graph_torch_layers import Attributes, ints

Op = Callable[..., Tensor | tuple[Tensor, ...]]


def _plain(function: Callable[..., Tensor]) -> Op:
    """An operator without attributes."""
    return lambda _, *inputs: function(*inputs)


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Op:
    return lambda _, *inputs: reduce(function, inputs)


def _divide(_: Attributes, x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _clip(_: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return x if low is None and high is None else torch.clamp(x, low, high)


def _cast(a: Attributes, x: Tensor) -> Tensor:
    kind = ir.DataType(a.get("to"))
    if kind not in DTYPES:
        a.refuse(f"casts to {kind.name}")
    return x.to(DTYPES[kind])


def _gelu(a: Attributes, x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=a.get("approximate", "none"))


# Shapes


def _reshape(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    sizes = ints(shape)
    if not a.get("allowzero", 0):
        sizes = [size or x.shape[axis] for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def _transpose(a: Attributes, x: Tensor) -> Tensor:
    return x.permute(a.get("perm", tuple(range(x.ndim))[::-1]))


def _unsqueeze(_: Attributes, x: Tensor, axes: Tensor) -> Tensor:
    rank = x.ndim + axes.numel()
    for axis in sorted(axis % rank for axis in ints(axes)):
        x = x.unsqueeze(axis)
    return x


def _squeeze(_: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(ints(axes)))


def _flatten(a: Attributes, x: Tensor) -> Tensor:
    axis = a.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _split(a: Attributes, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = a.get("axis", 0)
    each = -(-x.shape[axis] // len(a.node.outputs))
    parts: tuple[Tensor, ...] = torch.split(x, each if sizes is None else ints(sizes), axis)
    return parts


def _slice(
    _: Attributes, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    begins = ints(starts)
    where = range(len(begins)) if axes is None else ints(axes)
    strides = [1] * len(begins) if steps is None else ints(steps)
    for begin, end, axis, stride in zip(begins, ints(ends), where, strides, strict=True):
        chosen = range(x.shape[axis])[begin:end:stride]
        if stride > 0:
            whole = [slice(None)] * x.ndim
            whole[axis] = slice(chosen.start, max(chosen.start, chosen.stop), stride)
            x = x[tuple(whole)]
        else:
            x = x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64))
    return x


def _gather(a: Attributes, x: Tensor, index: Tensor) -> Tensor:
    axis = a.get("axis", 0) % x.ndim
    index = torch.where(index < 0, index + x.shape[axis], index)
    picked = x.index_select(axis, index.reshape(-1))
    return picked.reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


def _gather_elements(a: Attributes, x: Tensor, index: Tensor) -> Tensor:
    axis = a.get("axis", 0)
    return torch.gather(x, axis, torch.where(index < 0, index + x.shape[axis], index).long())


def _gather_nd(a: Attributes, x: Tensor, index: Tensor) -> Tensor:
    a.only(batch_dims=0)
    return x[tuple(index.unbind(-1))]


def _expand(_: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(ints(shape))))


def _shape(a: Attributes, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[a.get("start", 0) : a.get("end")], dtype=torch.int64)


def _constant_of_shape(a: Attributes, shape: Tensor) -> Tensor:
    value = a.get("value")
    fill = torch.zeros(1) if value is None else torch.from_numpy(value.numpy().copy())
    return fill.reshape(()).expand(ints(shape))


def _constant(a: Attributes) -> Tensor:
    if (tensor := a.get("value")) is not None:
        return torch.from_numpy(tensor.numpy().copy())
    for name, dtype in (("value_float", torch.float32), ("value_int", torch.int64)):
        for each in (name, f"{name}s"):
            if each in a.node.attributes:
                return torch.tensor(a.get(each), dtype=dtype)
    return a.refuse(f"holds {', '.join(a.node.attributes)}")


def _pad(a: Attributes, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
    amounts, mode = ints(pads), a.get("mode", "constant")
    where = range(x.ndim) if axes is None else [axis % x.ndim for axis in ints(axes)]
    sides = dict(zip(where, zip(amounts[: len(where)], amounts[len(where) :], strict=True), strict=True))
    if mode == "constant":
        flat = [side for axis in reversed(range(x.ndim)) for side in sides.get(axis, (0, 0))]
        return functional.pad(x, flat, value=0.0 if value is None else value.item())
    for axis, (before, after) in sides.items():
        size = x.shape[axis]
        at = torch.arange(-before, size + after)
        if mode == "edge":
            at = at.clamp(0, size - 1)
        elif mode == "reflect":
            at = (size - 1) - ((at % max(2 * size - 2, 1)) - (size - 1)).abs()
        else:
            a.refuse(f"pads by {mode}")
        x = x.index_select(axis, at)
    return x


def _depth_to_space(a: Attributes, x: Tensor) -> Tensor:
    block = a.get("blocksize")
    if a.get("mode", "DCR") == "CRD":
        return functional.pixel_shuffle(x, block)
    n, c, h, w = x.shape
    deep = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return deep.reshape(n, c // block**2, h * block, w * block)


# Reductions


def _reduction(function: Callable[..., Tensor]) -> Op:
    """`function(x, axes, keepdim)`; axes are an input, before opset 18 an attribute."""

    def op(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
        over = list(a.get("axes", ())) if axes is None else ints(axes)
        if not over and a.get("noop_with_empty_axes", 0):
            return function(x.unsqueeze(-1), [-1], False)  # of each number by itself
        return function(x, over or list(range(x.ndim)), bool(a.get("keepdims", 1)))

    return op


def _arg_max(a: Attributes, x: Tensor) -> Tensor:
    a.only(select_last_index=0)
    return torch.argmax(x, a.get("axis", 0), bool(a.get("keepdims", 1)))


def _cumulative_sum(a: Attributes, x: Tensor, axis: Tensor) -> Tensor:
    a.only(exclusive=0, reverse=0)
    return torch.cumsum(x, int(axis), dtype=x.dtype)


DTYPES: dict[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.BOOL: torch.bool,
}

OPS: dict[str, Op] = {
    "Abs": _plain(torch.abs),
    "Add": _plain(torch.add),
    "And": _plain(torch.logical_and),
    "ArgMax": _arg_max,
    "Attention": layers.attention,
    "Cast": _cast,
    "Ceil": _plain(torch.ceil),
    "Clip": _clip,
    "Concat": lambda a, *inputs: torch.cat(inputs, a.get("axis")),
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Conv": layers.conv,
    "ConvTranspose": layers.conv_transpose,
    "Cos": _plain(torch.cos),
    "CumSum": _cumulative_sum,
    "DepthToSpace": _depth_to_space,
    "Div": _divide,
    "Einsum": lambda a, *inputs: torch.einsum(a.get("equation"), *inputs),
    "Equal": _plain(torch.eq),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _plain(torch.floor),
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Gelu": _gelu,
    "Gemm": layers.gemm,
    "Greater": _plain(torch.gt),
    "GreaterOrEqual": _plain(torch.ge),
    "GroupNormalization": layers.group_norm,
    "Identity": _plain(lambda x: x),
    "InstanceNormalization": layers.instance_norm,
    "IsNaN": _plain(torch.isnan),
    "LayerNormalization": layers.layer_norm,
    "LeakyRelu": lambda a, x: functional.leaky_relu(x, a.get("alpha", 0.01)),
    "Less": _plain(torch.lt),
    "LessOrEqual": _plain(torch.le),
    "Log": _plain(torch.log),
    "MatMul": _plain(torch.matmul),
    "Max": _variadic(torch.maximum),
    "Min": _variadic(torch.minimum),
    "Mul": _plain(torch.mul),
    "Neg": _plain(torch.neg),
    "Not": _plain(torch.logical_not),
    "Or": _plain(torch.logical_or),
    "Pad": _pad,
    "Pow": _plain(lambda x, y: torch.pow(x, y).to(x.dtype)),
    "RMSNormalization": layers.rms_norm,
    "Range": _plain(lambda start, end, step: torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)),
    "Reciprocal": _plain(torch.reciprocal),
    "ReduceL2": _reduction(lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep)),
    "ReduceMax": _reduction(torch.amax),
    "ReduceMean": _reduction(torch.mean),
    "ReduceMin": _reduction(torch.amin),
    "ReduceSum": _reduction(torch.sum),
    "Relu": _plain(torch.relu),
    "Reshape": _reshape,
    "Resize": layers.resize,
    "Round": _plain(torch.round),
    "Shape": _shape,
    "Sigmoid": _plain(torch.sigmoid),
    "Sin": _plain(torch.sin),
    "Slice": _slice,
    "Softmax": lambda a, x: torch.softmax(x, a.get("axis", -1)),
    "Softplus": _plain(functional.softplus),
    "Split": _split,
    "Sqrt": _plain(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _plain(torch.sub),
    "Tanh": _plain(torch.tanh),
    "Tile": _plain(lambda x, repeats: x.repeat(ints(repeats))),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _plain(torch.where),
    "com.microsoft.MultiHeadAttention": layers.multi_head,
}
