"""Attention as one graph node instead of the six to ten it decomposes to.

ONNX Runtime's `com.microsoft.MultiHeadAttention` never holds the scores (2.4x less memory for a 323 M UNet at 512x512),
TensorRT wants the standard `Attention` of opset 23. Both take (batch, length, heads * head_dim), as the projections
leave it, so the transposes around them go too.
"""

from __future__ import annotations

from collections.abc import Callable
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


@torch.library.custom_op("edgekit::attention", mutates_args=())  # type: ignore[untyped-decorator]
def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float) -> Tensor:
    """softmax(scale q k^T) v per head (Vaswani et al. 2017, eq. 1): (batch, length, heads * head_dim) each."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    out = functional.scaled_dot_product_attention(split(query), split(key), split(value), scale=scale)
    return out.transpose(1, 2).flatten(2)


@attention.register_fake  # type: ignore[untyped-decorator]
def _(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float) -> Tensor:  # noqa: ARG001
    return torch.empty_like(query)


class OneNodeAttention:
    """A diffusers attention processor that leaves one operator where the stock one leaves many."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,  # noqa: ARG002 - diffusers passes it by name
    ) -> Tensor:
        """(batch, length, width), or (batch, width, height, width) of an autoencoder; the shape is kept."""
        if attention_mask is not None:
            raise UnsupportedModel("attention with a mask is not exported; no recipe feeds one")
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


def use_one_node(module: nn.Module) -> int:
    """Make every diffusers attention below `module` one operator, in place.

    Returns:
        How many there are.

    Raises:
        UnsupportedModel: attention of a kind that operator cannot express, by name.
    """
    from diffusers.models.attention_processor import Attention

    found = [(name, each) for name, each in module.named_modules() if isinstance(each, Attention)]
    for name, each in found:
        kind = type(each.processor).__name__
        odd = [field for field in PLAIN if getattr(each, field, None)]
        if kind not in STOCK_PROCESSORS or odd:
            raise UnsupportedModel(
                f"{name}: {kind} with {', '.join(odd) or 'its own rule'}; only plain attention is exported"
            )
        each.set_processor(OneNodeAttention())
    return len(found)


@cache
def translation(dialect: Dialect) -> dict[Any, Callable[..., Any]]:
    """What torch.onnx.export puts in a graph for `edgekit::attention`."""
    if dialect == "std":
        standard = Opset("", OPSETS["std"])

        def to_attention(query: Any, key: Any, value: Any, heads: int, scale: float) -> Any:
            return standard.Attention(query, key, value, q_num_heads=heads, kv_num_heads=heads, scale=scale)[0]

        return {torch.ops.edgekit.attention.default: to_attention}
    onnx.defs.register_schema(_multi_head_schema())
    contrib = Opset("com.microsoft", 1)

    def to_multi_head(query: Any, key: Any, value: Any, heads: int, scale: float) -> Any:
        return contrib.MultiHeadAttention(query, key, value, num_heads=heads, scale=scale)

    return {torch.ops.edgekit.attention.default: to_multi_head}


def _multi_head_schema() -> onnx.defs.OpSchema:
    """The part we use of ONNX Runtime's own operator; onnx does not know it, and the exporter asks for a schema."""
    schema = onnx.defs.OpSchema
    return schema(
        "MultiHeadAttention",
        "com.microsoft",
        1,
        inputs=[schema.FormalParameter(name, "T") for name in ("query", "key", "value")],
        outputs=[schema.FormalParameter("output", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
        attributes=[
            schema.Attribute("num_heads", schema.AttrType.INT, "", required=True),
            schema.Attribute("scale", schema.AttrType.FLOAT, "", required=False),
        ],
    )
