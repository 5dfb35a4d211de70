"""Language-model families: how each `config.json` becomes a Spec. One row in LANGUAGE_FAMILIES per `model_type`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from edgekit.errors import BadSource, UnknownFamily
from edgekit.export.language.config import Config
from edgekit.export.language.names import GEMMA2, GEMMA3, GPT2, LLAMA, OLMO2, PHI3, QWEN3, Names
from edgekit.export.language.rope import Rope, read_rope
from edgekit.export.language.spec import Activation, Spec

SLIDING, FULL = "sliding_attention", "full_attention"

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True, slots=True)
class Family:
    """One `model_type`: `read` turns its configuration into a Spec."""

    model_type: str
    read: Callable[[Config], Spec]


def read_spec(config: Config) -> Spec:
    """The Spec of a configuration.

    Raises:
        UnknownFamily: no row for its `model_type`.
        UnsupportedModel: a feature of a known family that is not modelled, by name.
        BadSource: a value is missing or malformed.
    """
    kind = config.get("model_type")
    if kind not in LANGUAGE_FAMILIES:
        known = ", ".join(sorted(LANGUAGE_FAMILIES))
        raise UnknownFamily(f"{config.where}: no language-model exporter for model_type {kind!r}; known: {known}")
    spec = LANGUAGE_FAMILIES[kind].read(config)
    config.finish()
    return spec


def _activation(c: Config, default: str, key: str = "hidden_act") -> Activation:
    name = c.get(key, default)
    if name not in _ACTIVATIONS:
        raise c.refuse(key, f"Known activations: {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[name]


def _decoder(c: Config, names: Names, **facts: Any) -> Spec:
    """What the configurations of all Llama-like families share; `facts` overrides it."""
    heads, hidden = c.integer("num_attention_heads"), c.integer("hidden_size")
    layers, context = c.integer("num_hidden_layers"), c.integer("max_position_embeddings")
    head_dim = c.integer("head_dim", hidden // heads)
    theta, partial = facts.pop("theta", 10_000.0), facts.pop("partial", None)
    if "ropes" not in facts:
        facts["ropes"] = (_rope(c, theta, head_dim, context, partial),) * layers
    limit = min((rope.context for rope in facts["ropes"] if rope), default=context)
    if limit < context:
        facts["notes"] = (f"context limited to {limit} of {context} tokens: past it longrope changes all frequencies",)
    facts = {"tied": c.flag("tie_word_embeddings"), "attention_scale": head_dim**-0.5} | facts
    facts.setdefault("activation", _activation(c, "silu"))
    return Spec(
        family=c.get("model_type"),
        names=names,
        vocab=c.integer("vocab_size"),
        hidden=hidden,
        ffn=c.integer("intermediate_size"),
        heads=heads,
        kv_heads=c.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        context=limit,
        eps=c.number("rms_norm_eps", 1e-6),
        windows=facts.pop("windows", (None,) * layers),
        **facts,
    )


def _rope(c: Config, theta: float, head_dim: int, context: int, partial: float | None) -> Rope:
    """One rope for all layers: `rope_parameters`, or `rope_scaling` with `rope_theta` beside it."""
    params = _rope_section(c)
    top = c.number("partial_rotary_factor", 1.0 if partial is None else partial)
    if partial is None and top != 1.0:
        raise c.refuse("partial_rotary_factor", "This family rotates whole heads.")
    theta = c.number("rope_theta", theta)
    return read_rope(params, theta=theta, head_dim=head_dim, context=context, partial=None if partial is None else top)


def _rope_section(c: Config) -> Config:
    old, new = c.section("rope_scaling"), c.section("rope_parameters")
    if old.values and new.values:
        raise c.refuse("rope_scaling", "rope_parameters is there too; delete the one that does not hold.")
    return new if new.values else old


def _biases(c: Config) -> dict[str, bool]:
    attention = c.flag("attention_bias")
    return {"qkv_bias": attention, "attention_out_bias": attention, "mlp_bias": c.flag("mlp_bias")}


def _layer_windows(c: Config, default: Callable[[int], bool], window: int | None) -> tuple[int | None, ...]:
    """One window per layer from `layer_types`, or from `default(i)`: does layer i slide."""
    layers = c.integer("num_hidden_layers")
    types = c.get("layer_types") or [SLIDING if default(i) else FULL for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        raise BadSource(f"{c.where}: layer_types must name one type for each of {layers} layers")
    if unknown := set(types) - {SLIDING, FULL}:
        raise c.refuse("layer_types", f"Known types: {SLIDING}, {FULL}; not {sorted(unknown)}.")
    if SLIDING in types and window is None:
        raise BadSource(f"{c.where}: layers of type {SLIDING} without a sliding_window")
    return tuple(window if kind == SLIDING else None for kind in types)


def _one_window(c: Config) -> tuple[int | None, ...]:
    window = c.integer("sliding_window") if c.get("sliding_window") is not None else None
    return (window,) * c.integer("num_hidden_layers")


def _qwen_windows(c: Config) -> tuple[int | None, ...]:
    window = c.integer("sliding_window", 4096) if c.flag("use_sliding_window") else None
    c.get("sliding_window")
    first = c.get("max_window_layers", 28)
    return _layer_windows(c, lambda i: window is not None and i >= first, window)


def _llama(c: Config) -> Spec:
    return _decoder(c, LLAMA, **_biases(c))


def _mistral(c: Config) -> Spec:
    return _decoder(c, LLAMA, windows=_one_window(c))


def _qwen2(c: Config) -> Spec:
    return _decoder(c, LLAMA, qkv_bias=True, windows=_qwen_windows(c))


def _qwen3(c: Config) -> Spec:
    bias = c.flag("attention_bias")
    windows = _qwen_windows(c)
    return _decoder(c, QWEN3, qk_norm="head", qkv_bias=bias, attention_out_bias=bias, windows=windows)


def _phi3(c: Config) -> Spec:
    params = _rope_section(c)
    for key in ("type", "rope_type"):  # early checkpoints called LongRoPE "su" or "yarn"
        if params.values.get(key) in ("su", "yarn"):
            params.values[key] = "longrope"
    original = c.integer("original_max_position_embeddings", 4096)
    if params.values.get("rope_type", params.values.get("type")) == "longrope":
        params.values["original_max_position_embeddings"] = original
    else:
        params.values.pop("original_max_position_embeddings", None)
    return _decoder(c, PHI3, partial=1.0, windows=_one_window(c))


def _smollm3(c: Config) -> Spec:
    layers, interval = c.integer("num_hidden_layers"), c.integer("no_rope_layer_interval", 4)
    rotates = c.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(layers)]
    head_dim = c.integer("head_dim", c.integer("hidden_size") // c.integer("num_attention_heads"))
    rope = _rope(c, 2_000_000.0, head_dim, c.integer("max_position_embeddings"), None)
    window = c.integer("sliding_window") if c.flag("use_sliding_window") and c.get("sliding_window") else None
    c.get("sliding_window")
    windows = _layer_windows(c, lambda i: window is not None and not rotates[i], window)
    ropes = tuple(rope if rotates[i] else None for i in range(min(layers, len(rotates))))
    return _decoder(c, LLAMA, tied=c.flag("tie_word_embeddings", True), windows=windows, ropes=ropes, **_biases(c))


def _granite(c: Config) -> Spec:
    return _decoder(
        c,
        LLAMA,
        embedding_scale=c.number("embedding_multiplier", 1.0),
        residual_scale=c.number("residual_multiplier", 1.0),
        attention_scale=c.number("attention_multiplier", 1.0),
        logit_divisor=c.number("logits_scaling", 1.0),
        **_biases(c),
    )


def _olmo2(c: Config) -> Spec:
    bias = c.flag("attention_bias")
    c.values.setdefault("rms_norm_eps", 1e-5)
    return _decoder(c, OLMO2, qk_norm="all", qkv_bias=bias, attention_out_bias=bias)


def _gemma_facts(c: Config) -> dict[str, Any]:
    bias = c.flag("attention_bias")
    return {
        "tied": c.flag("tie_word_embeddings", True),
        "norm_offset": 1.0,
        "embedding_scale": float(c.integer("hidden_size") ** 0.5),
        "qkv_bias": bias,
        "attention_out_bias": bias,
    }


def _gemma(c: Config) -> Spec:
    c.get("hidden_activation")
    activation = _activation(c, "gelu_pytorch_tanh")
    # The first releases wrote "gelu" and meant its tanh form.
    return _decoder(c, LLAMA, activation="gelu_tanh" if activation == "gelu" else activation, **_gemma_facts(c))


def _gemma2_facts(c: Config) -> dict[str, Any]:
    c.get("hidden_act")  # written by old releases beside hidden_activation, which is what runs
    return _gemma_facts(c) | {
        "activation": _activation(c, "gelu_pytorch_tanh", "hidden_activation"),
        "attention_scale": c.number("query_pre_attn_scalar", 256.0) ** -0.5,
    }


def _gemma2(c: Config) -> Spec:
    return _decoder(
        c,
        GEMMA2,
        attention_softcap=_softcap(c, "attn_logit_softcapping", 50.0),
        logit_softcap=_softcap(c, "final_logit_softcapping", 30.0),
        windows=_layer_windows(c, lambda i: i % 2 == 0, c.integer("sliding_window", 4096)),
        **_gemma2_facts(c),
    )


def _softcap(c: Config, key: str, default: float) -> float:
    """A key that is absent means the default, a null one means none."""
    return c.number(key, 0.0) if key in c.values else default


_GEMMA3_DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
}


def _gemma3_text(c: Config) -> Spec:
    for key, value in _GEMMA3_DEFAULTS.items():
        c.values.setdefault(key, value)
    pattern = c.integer("_sliding_window_pattern", c.integer("sliding_window_pattern", 6))
    windows = _layer_windows(c, lambda i: bool((i + 1) % pattern), c.integer("sliding_window", 4096))
    by_type = _gemma3_ropes(c)
    return _decoder(
        c,
        GEMMA3,
        qk_norm="head",
        windows=windows,
        ropes=tuple(by_type[FULL if window is None else SLIDING] for window in windows),
        logit_softcap=_softcap(c, "final_logit_softcapping", 0.0),
        **_gemma2_facts(c),
    )


def _gemma3_ropes(c: Config) -> dict[str, Rope]:
    """Long and local rope: nested by layer type, or the old rope_theta, rope_local_base_freq and rope_scaling."""
    head_dim, context = c.integer("head_dim"), c.integer("max_position_embeddings")
    section = _rope_section(c)
    nested = any(isinstance(section.values.get(kind), dict) for kind in (FULL, SLIDING))
    thetas = {FULL: c.number("rope_theta", 1e6), SLIDING: c.number("rope_local_base_freq", 1e4)}
    sections = {FULL: section, SLIDING: Config({}, c.where)}
    if nested:
        sections = {kind: section.section(kind) for kind in (FULL, SLIDING)}
        section.finish()
    return {
        kind: read_rope(section, theta=thetas[kind], head_dim=head_dim, context=context)
        for kind, section in sections.items()
    }


def _gemma3(c: Config) -> Spec:
    """The text part of a Gemma 3 that also sees pictures; its vision tower is left behind."""
    text = c.section("text_config")
    for key in ("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index"):
        c.get(key)
    text.values.setdefault("model_type", "gemma3_text")
    text.values.setdefault("tie_word_embeddings", c.flag("tie_word_embeddings", True))
    spec = _gemma3_text(text)
    text.finish()
    return replace(spec, family="gemma3", notes=(*spec.notes, "text part only: the vision tower was left behind"))


def _gpt2(c: Config) -> Spec:
    hidden, heads, layers = c.integer("n_embd"), c.integer("n_head"), c.integer("n_layer")
    if c.flag("scale_attn_by_inverse_layer_idx"):
        raise c.refuse("scale_attn_by_inverse_layer_idx")
    return Spec(
        family="gpt2",
        names=GPT2,
        vocab=c.integer("vocab_size"),
        hidden=hidden,
        ffn=c.integer("n_inner", 4 * hidden),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        context=c.integer("n_positions"),
        eps=c.number("layer_norm_epsilon", 1e-5),
        activation=_activation(c, "gelu_new", "activation_function"),
        windows=(None,) * layers,
        ropes=(None,) * layers,
        tied=c.flag("tie_word_embeddings", True),
        gated=False,
        norm="layer",
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        attention_scale=(hidden // heads) ** -0.5 if c.flag("scale_attn_weights", True) else 1.0,
    )


LANGUAGE_FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", _llama),
        Family("mistral", _mistral),
        Family("qwen2", _qwen2),
        Family("qwen3", _qwen3),
        Family("phi3", _phi3),
        Family("smollm3", _smollm3),
        Family("granite", _granite),
        Family("olmo2", _olmo2),
        Family("gemma", _gemma),
        Family("gemma2", _gemma2),
        Family("gemma3_text", _gemma3_text),
        Family("gemma3", _gemma3),
        Family("gpt2", _gpt2),
    )
}
