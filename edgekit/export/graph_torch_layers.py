"""The operators of OPS that layers are made of: products, norms, attention, resizing; and the reading of attributes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NoReturn

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from edgekit.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class Attributes:
    """A node's attributes, with the specification's defaults given where they are read."""

    node: ir.Node

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute as Python has it, or the default."""
        found = self.node.attributes.get(name)
        return default if found is None else found.value

    def refuse(self, why: str) -> NoReturn:
        """Say that this node cannot be run."""
        raise UnsupportedModel(
            f"{self.node.name or 'a node'} ({name_of(self.node)}) {why}, which gradient probes do not model; "
            "measure this graph with a scan"
        )

    def only(self, **values: Any) -> None:
        """Refuse attributes that are there and have another value than this one."""
        for name, value in values.items():
            if self.get(name, value) != value:
                self.refuse(f"has {name} {self.get(name)!r}")


def name_of(node: ir.Node) -> str:
    """The key of OPS: the operator's name, its domain before it where that is not ONNX's own."""
    return f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else str(node.op_type)


def ints(tensor: Tensor) -> list[int]:
    """A tensor of sizes or axes as a list."""
    return [int(each) for each in tensor.reshape(-1).tolist()]


# Products


def gemm(a: Attributes, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Gemm: alpha x w + beta bias."""
    x, w = (x.T if a.get("transA", 0) else x), (w.T if a.get("transB", 0) else w)
    y = (x @ w) * a.get("alpha", 1.0)
    return y if bias is None else y + bias * a.get("beta", 1.0)


def conv(a: Attributes, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Conv of one to three dimensions, with groups."""
    rank = w.ndim - 2
    if a.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        a.refuse(f"has auto_pad {a.get('auto_pad')}")
    pads, none = tuple(a.get("pads", (0,) * 2 * rank)), (0,) * rank
    begins, ends = pads[:rank], pads[rank:]
    if begins != ends:
        x = functional.pad(x, [side for pair in reversed(list(zip(begins, ends, strict=True))) for side in pair])
        begins = none
    strides, dilations = a.get("strides", (1,) * rank), a.get("dilations", (1,) * rank)
    return torch.convolution(x, w, bias, strides, begins, dilations, False, none, a.get("group", 1))


def conv_transpose(a: Attributes, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """ConvTranspose."""
    rank = w.ndim - 2
    a.only(auto_pad="NOTSET", output_shape=None)
    pads, extra = tuple(a.get("pads", (0,) * 2 * rank)), a.get("output_padding", (0,) * rank)
    if pads[:rank] != pads[rank:]:
        a.refuse(f"has unequal pads {pads}")
    strides, dilations = a.get("strides", (1,) * rank), a.get("dilations", (1,) * rank)
    return torch.convolution(x, w, bias, strides, pads[:rank], dilations, True, extra, a.get("group", 1))


# Norms


def instance_norm(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """InstanceNormalization: a norm of every channel by itself."""
    return functional.group_norm(x, x.shape[1], scale, bias, a.get("epsilon", 1e-5))


def group_norm(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """GroupNormalization, of opset 18 and of 21."""
    groups = a.get("num_groups")
    if scale.numel() != x.shape[1]:  # opset 18: one number per group
        scale, bias = (each.repeat_interleave(x.shape[1] // groups) for each in (scale, bias))
    return functional.group_norm(x, groups, scale, bias, a.get("epsilon", 1e-5))


def layer_norm(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """LayerNormalization; its first output."""
    return functional.layer_norm(x, x.shape[a.get("axis", -1) :], scale, bias, a.get("epsilon", 1e-5))


def rms_norm(a: Attributes, x: Tensor, scale: Tensor) -> Tensor:
    """RMSNormalization (opset 23)."""
    return functional.rms_norm(x, x.shape[a.get("axis", -1) :], scale, a.get("epsilon", 1e-5))


# Attention


def _heads(x: Tensor, heads: int) -> Tensor:
    """(batch, length, heads * size) -> (batch, heads, length, size)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def multi_head(a: Attributes, query: Tensor, *rest: Tensor | None) -> Tensor:
    """com.microsoft.MultiHeadAttention: query, key, value, bias, key_padding_mask, attention_bias, past ..."""
    given: list[Tensor | None] = [*rest, *[None] * (5 - len(rest))]
    key, value, bias = given[0], given[1], given[4]
    if key is None or value is None or any(each is not None for each in (*given[2:4], *given[5:])):
        a.refuse("has packed heads, a bias, a padding mask or a past")
    if query.ndim != 3 or key.ndim != 3 or value.ndim != 3:
        a.refuse("takes heads of another layout than (batch, length, width)")
    a.only(mask_filter_value=-10000.0)
    heads = a.get("num_heads")
    parts = _heads(query, heads), _heads(key, heads), _heads(value, heads)
    out = _attend(a, *parts, bias, bool(a.get("unidirectional", 0)))
    return out.transpose(1, 2).flatten(2)


def attention(a: Attributes, query: Tensor, key: Tensor, value: Tensor, *rest: Tensor | None) -> Tensor:
    """Attention of opset 23: query, key, value, mask, past_key, past_value."""
    if any(each is not None for each in rest[1:]) or len(a.node.outputs) > 1:
        a.refuse("has a past")
    a.only(softcap=0.0, qk_matmul_output_mode=0)
    mask, flat = (rest[0] if rest else None), query.ndim == 3
    if flat:
        kv_heads = a.get("kv_num_heads")
        query, key, value = _heads(query, a.get("q_num_heads")), _heads(key, kv_heads), _heads(value, kv_heads)
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    out = _attend(a, query, key, value, mask, bool(a.get("is_causal", 0)))
    return out.transpose(1, 2).flatten(2) if flat else out


def _attend(a: Attributes, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if causal and query.shape[2] != key.shape[2]:
        a.refuse("is causal over keys that are not its queries")
    if causal and mask is not None:
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)
        causal = False
    scale = a.get("scale", 0.0) or query.shape[-1] ** -0.5
    return functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale)


# Resizing


def resize(
    a: Attributes, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    """Resize, axis by axis."""
    del roi  # of tf_crop_and_resize alone
    a.only(antialias=0, exclude_outside=0, keep_aspect_ratio_policy="stretch", axes=None)
    for axis, size in enumerate(x.shape):
        if sizes is not None:
            length = int(sizes[axis])
            scale = length / size
        else:
            assert scales is not None
            scale = float(scales[axis])
            length = math.floor(size * scale)
        if length != size or scale != 1:
            x = _resampled(a, x, axis, length, scale)
    return x


def _resampled(a: Attributes, x: Tensor, axis: int, length: int, scale: float) -> Tensor:
    size, mode = x.shape[axis], a.get("mode", "nearest")
    at = _coordinates(a, size, length, scale)
    if mode == "nearest":
        return x.index_select(axis, _nearest(a, at).long().clamp(0, size - 1))
    base = at.floor()
    t = at - base
    if mode == "linear":
        taps = {0: 1 - t, 1: t}
    elif mode == "cubic":
        taps = _cubic_taps(t, a.get("cubic_coeff_a", -0.75))
    else:
        a.refuse(f"resizes by {mode}")
    along = [-1 if each == axis else 1 for each in range(x.ndim)]
    picked = (
        x.index_select(axis, (base + tap).long().clamp(0, size - 1)) * weight.to(x.dtype).reshape(along)
        for tap, weight in taps.items()
    )
    return sum(picked, torch.zeros((), dtype=x.dtype))


def _cubic_taps(t: Tensor, k: float) -> dict[int, Tensor]:
    """Weights of the four samples around a place that lies `t` behind the second (Keys 1981, eq. 15)."""

    def near(d: Tensor) -> Tensor:
        return ((k + 2) * d - (k + 3)) * d**2 + 1

    def far(d: Tensor) -> Tensor:
        return ((k * d - 5 * k) * d + 8 * k) * d - 4 * k

    return {-1: far(t + 1), 0: near(t), 1: near(1 - t), 2: far(2 - t)}


def _coordinates(a: Attributes, size: int, length: int, scale: float) -> Tensor:
    """Where each output sample lies among the input's."""
    at, mode = torch.arange(length, dtype=torch.float32), a.get("coordinate_transformation_mode", "half_pixel")
    if mode == "asymmetric":
        return at / scale
    if mode == "align_corners":
        return at * (size - 1) / max(length - 1, 1)
    if mode == "half_pixel" or (mode == "pytorch_half_pixel" and length > 1):
        return (at + 0.5) / scale - 0.5
    if mode == "pytorch_half_pixel":
        return at
    return a.refuse(f"has coordinates {mode}")


def _nearest(a: Attributes, at: Tensor) -> Tensor:
    rounding = a.get("nearest_mode", "round_prefer_floor")
    if rounding == "floor":
        return at.floor()
    if rounding == "ceil":
        return at.ceil()
    return (at - 0.5).ceil() if rounding == "round_prefer_floor" else (at + 0.5).floor()
