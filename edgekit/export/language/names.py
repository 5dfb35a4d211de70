"""Checkpoint names of each family: which tensor fills which slot of a decoder."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Names:
    """Checkpoint names of one family, without the prefix; `{i}` is the layer. A slot that is None does not exist.

    Several names in one slot are stacked along the output axis into one matrix, so that every family runs one matrix
    product for query, key and value, and one for gate and up.
    """

    prefixes: tuple[str, ...]  # of everything but the head, in the order they are tried
    embedding: str
    qkv: tuple[str, ...]
    attention_out: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    final_norm: str
    attention_norm: str | None = None
    attention_post_norm: str | None = None
    mlp_norm: str | None = None
    mlp_post_norm: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    positions: str | None = None  # a learned position table
    heads: tuple[str, ...] = ("lm_head.weight",)  # full names; absent when tied
    unused: tuple[str, ...] = ()  # patterns of tensors that are no weights of the decoder
    input_major: bool = False  # matrices are stored (in, out), GPT-2's Conv1D


_ATTENTION, _MLP = "layers.{i}.self_attn.", "layers.{i}.mlp."

LLAMA = Names(
    prefixes=("model.", ""),
    embedding="embed_tokens.weight",
    qkv=(_ATTENTION + "q_proj", _ATTENTION + "k_proj", _ATTENTION + "v_proj"),
    attention_out=_ATTENTION + "o_proj",
    mlp_in=(_MLP + "gate_proj", _MLP + "up_proj"),
    mlp_out=_MLP + "down_proj",
    final_norm="norm",
    attention_norm="layers.{i}.input_layernorm",
    mlp_norm="layers.{i}.post_attention_layernorm",
    unused=(r".*rotary_emb\.inv_freq",),
)
QWEN3 = replace(LLAMA, q_norm=_ATTENTION + "q_norm", k_norm=_ATTENTION + "k_norm")
PHI3 = replace(LLAMA, qkv=(_ATTENTION + "qkv_proj",), mlp_in=(_MLP + "gate_up_proj",))
OLMO2 = replace(
    QWEN3,
    attention_norm=None,
    attention_post_norm="layers.{i}.post_attention_layernorm",
    mlp_norm=None,
    mlp_post_norm="layers.{i}.post_feedforward_layernorm",
)
GEMMA2 = replace(
    LLAMA,
    attention_post_norm="layers.{i}.post_attention_layernorm",
    mlp_norm="layers.{i}.pre_feedforward_layernorm",
    mlp_post_norm="layers.{i}.post_feedforward_layernorm",
)
GEMMA3 = replace(
    GEMMA2,
    prefixes=("model.", "language_model.model.", "model.language_model.", ""),
    heads=("lm_head.weight", "language_model.lm_head.weight"),
    q_norm=QWEN3.q_norm,
    k_norm=QWEN3.k_norm,
    unused=(*LLAMA.unused, r"(model\.)?vision_tower\..*", r"(model\.)?multi_modal_projector\..*"),
)
GPT2 = Names(
    prefixes=("transformer.", ""),
    embedding="wte.weight",
    qkv=("h.{i}.attn.c_attn",),
    attention_out="h.{i}.attn.c_proj",
    mlp_in=("h.{i}.mlp.c_fc",),
    mlp_out="h.{i}.mlp.c_proj",
    final_norm="ln_f",
    attention_norm="h.{i}.ln_1",
    mlp_norm="h.{i}.ln_2",
    positions="wpe.weight",
    unused=(r".*\.attn\.(bias|masked_bias)",),
    input_major=True,
)
