"""Attention as one graph node instead of the six to ten it decomposes to.

ONNX Runtime's `com.microsoft.MultiHeadAttention` never holds the scores (2.4x less memory for a 323 M UNet at 512x512),
TensorRT wants the standard `Attention` of opset 23. Both take (batch, length, heads * head_dim), as the projections
leave it. Two ways lead there: the plain attention of diffusers' UNets and autoencoders gets a processor that makes no
heads, and any other model (joint attention, QK norm, rotary positions, text encoders) runs its own code, whose call of
`torch.nn.functional.scaled_dot_product_attention` is caught.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal

import onnx.defs
import torch
from onnxscript.values import Opset
from torch import Tensor, nn
from torch.nn import functional

from edgekit.errors import UnsupportedModel

Dialect = Literal["ort", "std"]

# ort: 20 has Gelu and still makes a group norm an InstanceNormalization; GroupNormalization of later opsets took 2.3
# times its CPU time in ONNX Runtime 1.32 (1x320x64x64). std: 23 brought Attention; 24 makes torch decompose more.
OPSETS: dict[Dialect, int] = {"ort": 20, "std": 23}

STOCK_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")
PLAIN = ("norm_q", "norm_k", "norm_cross", "spatial_norm", "added_kv_proj_dim", "fused_projections")

# What a forbidden key's score is lowered by. exp(-1e4) is 0 in every precision, and unlike minus infinity it leaves a
# number where a block of keys is forbidden altogether.
FORBIDDEN = -1e4
FOLD = 8  # head dimensions a per-key mask takes, so that a multiple of 8 stays one

_stock_attention = functional.scaled_dot_product_attention


@torch.library.custom_op("edgekit::attention", mutates_args=())  # type: ignore[untyped-decorator]
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(scale q k^T + mask) v per head (Vaswani et al. 2017, eq. 1): (batch, length, heads * head_dim) each.

    A mask is (1 or batch, 1 or heads, query length, key length): True where a key may be seen, or added to the scores.
    """

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    out = _stock_attention(split(query), split(key), split(value), mask, is_causal=causal, scale=scale)
    return out.transpose(1, 2).flatten(2)


@attention.register_fake  # type: ignore[untyped-decorator]
def _(
    query: Tensor,
    key: Tensor,  # noqa: ARG001
    value: Tensor,
    heads: int,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    mask: Tensor | None = None,  # noqa: ARG001
    causal: bool = False,  # noqa: ARG001
) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[1], value.shape[2]))


class OneNodeAttention:
    """A diffusers attention processor that leaves one operator where the stock one leaves many."""

    def __init__(self, stock: Callable[..., Tensor]) -> None:
        self._stock = stock

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(batch, length, width), or (batch, width, height, width) of an autoencoder; the shape is kept."""
        if attention_mask is not None:
            return self._stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        shape, x = hidden_states.shape, hidden_states
        if len(shape) == 4:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(x), attn.to_k(context), attn.to_v(context)
        head_dim = query.shape[-1] // attn.heads
        x = attn.to_out[0](torch.ops.edgekit.attention(query, key, value, attn.heads, head_dim**-0.5))
        if len(shape) == 4:
            x = x.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            x = x + hidden_states
        return x if attn.rescale_output_factor == 1 else x / attn.rescale_output_factor


@contextlib.contextmanager
def one_node(module: nn.Module, dialect: Dialect) -> Iterator[None]:
    """While this lasts, every attention below `module` runs as one operator; its processors stay changed after."""
    from diffusers.models.attention_processor import Attention

    for each in module.modules():
        if not isinstance(each, Attention):
            continue
        plain = not any(getattr(each, field, None) for field in PLAIN)
        if plain and type(each.processor).__name__ in STOCK_PROCESSORS:
            each.set_processor(OneNodeAttention(each.processor))

    def caught(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,  # noqa: ARG001 - evaluation mode
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        return _as_one_node(query, key, value, attn_mask, is_causal, scale, dialect)

    functional.scaled_dot_product_attention = caught
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = _stock_attention


def _as_one_node(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    dialect: Dialect,
) -> Tensor:
    """Attention of (batch, heads, length, head_dim) tensors by the operator, which takes heads beside each other."""
    if query.ndim != 4:
        raise UnsupportedModel(f"attention of {query.ndim} axes; only (batch, heads, length, head_dim) is exported")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # cancels the transpose that made heads
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]
        if dialect == "ort":
            mask = torch.where(mask, 0.0, FORBIDDEN) if mask.dtype == torch.bool else mask.clamp(min=FORBIDDEN)
        if dialect == "ort" and mask.shape[2] == 1:
            query, key = _fold(query, key, mask / scale)
            mask = None
        else:  # both operators want the last two axes whole, and broadcast the first two
            mask = mask.expand(-1, -1, query.shape[1], key.shape[1])
    beside = (x.flatten(2) for x in (query, key, value))
    out = torch.ops.edgekit.attention(*beside, query.shape[2], scale, mask, causal)
    return out.unflatten(-1, (query.shape[2], value.shape[3])).transpose(1, 2)


def _fold(query: Tensor, key: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A bias per key as one more head dimension, where every query has a 1: q' k' = q k + bias, without a mask.

    ONNX Runtime's attention that never holds the scores takes no mask; one over 4096 x 4096 positions of 8 heads of 64
    costs it 7.7 times the time and a gigabyte, the longer heads 1.2 times the time (1.32, one thread).

    Args:
        query, key: (batch, length, heads, head_dim).
        bias: (1 or batch, 1 or heads, 1, keys).
    """
    bias = bias.permute(0, 3, 1, 2).expand(*key.shape[:3], 1)
    return functional.pad(query, (0, FOLD), value=1.0), functional.pad(torch.cat([key, bias], -1), (0, FOLD - 1))


@cache
def translation(dialect: Dialect) -> dict[Any, Callable[..., Any]]:
    """What torch.onnx.export puts in a graph for `edgekit::attention`."""
    if dialect == "std":
        standard = Opset("", OPSETS["std"])

        def to_attention(
            query: Any, key: Any, value: Any, heads: int, scale: float, mask: Any = None, causal: bool = False
        ) -> Any:
            return standard.Attention(
                query, key, value, mask, q_num_heads=heads, kv_num_heads=heads, scale=scale, is_causal=int(causal)
            )[0]

        return {torch.ops.edgekit.attention.default: to_attention}
    onnx.defs.register_schema(_multi_head_schema())
    contrib = Opset("com.microsoft", 1)

    def to_multi_head(
        query: Any, key: Any, value: Any, heads: int, scale: float, mask: Any = None, causal: bool = False
    ) -> Any:
        inputs = (query, key, value) if mask is None else (query, key, value, None, None, mask)
        return contrib.MultiHeadAttention(*inputs, num_heads=heads, scale=scale, unidirectional=int(causal))

    return {torch.ops.edgekit.attention.default: to_multi_head}


def _multi_head_schema() -> onnx.defs.OpSchema:
    """The part we use of ONNX Runtime's own operator; onnx does not know it, and the exporter asks for a schema."""
    schema = onnx.defs.OpSchema
    optional = schema.FormalParameterOption.Optional
    return schema(
        "MultiHeadAttention",
        "com.microsoft",
        1,
        inputs=[
            *(schema.FormalParameter(name, "T") for name in ("query", "key", "value")),
            schema.FormalParameter("bias", "T", param_option=optional),
            schema.FormalParameter("key_padding_mask", "M", param_option=optional),
            schema.FormalParameter("attention_bias", "T", param_option=optional),
        ],
        outputs=[schema.FormalParameter("output", "T")],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)"], ""),
            ("M", ["tensor(int32)"], ""),
        ],
        attributes=[
            schema.Attribute("num_heads", schema.AttrType.INT, "", required=True),
            schema.Attribute("scale", schema.AttrType.FLOAT, "", required=False),
            schema.Attribute("unidirectional", schema.AttrType.INT, "", required=False),
        ],
    )
