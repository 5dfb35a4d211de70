"""Tiny random models of every family, made by transformers, saved as a user would have them on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

VOCAB, WINDOW = 90, 16

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEADS: dict[str, Any] = {"head_dim": 16}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_QWEN_SLIDE = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
_GEMMA_SCALE = {"sliding_window": WINDOW, "query_pre_attn_scalar": 24, "final_logit_softcapping": 5.0}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}

# One or more configurations per model_type: (configuration class, values). Together they turn on all that is modelled.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_parameters": _LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW, "head_dim": 32}),
    "qwen2": ("Qwen2Config", _QWEN_SLIDE),
    "qwen3": ("Qwen3Config", {**_HEADS, **_QWEN_SLIDE, "attention_bias": True}),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}),
    "phi3-partial": (
        "Phi3Config",
        {
            "num_attention_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "phi3-longrope": (
        "Phi3Config",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1 + i / 8 for i in range(8)],
                "long_factor": [4 + i for i in range(8)],
            },
        },
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2, "attention_bias": True, "mlp_bias": True}),
    "smollm3-sliding": (
        "SmolLM3Config",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": WINDOW},
    ),
    "granite": ("GraniteConfig", {**_GRANITE, "attention_bias": True, "mlp_bias": True}),
    "olmo2": ("Olmo2Config", {"attention_bias": True}),
    "gemma": ("GemmaConfig", {**_HEADS, "attention_bias": True}),
    "gemma2": ("Gemma2Config", {**_HEADS, **_GEMMA_SCALE, "attn_logit_softcapping": 2.0}),
    "gemma3_text": (
        "Gemma3TextConfig",
        {
            **_HEADS,
            **_GEMMA_SCALE,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}),
}


def make_model(case: str, **changes: Any) -> Any:
    """A random model in float32; no norm, bias or matrix is so near trivial that an error would hide."""
    kind, values = CASES[case]
    values = {**_BASE, **values, **changes}
    if kind == "GPT2Config":
        known = ("_id", "vocab_size", "tie_word_embeddings")
        values = {key: value for key, value in values.items() if key.startswith("n_") or key.endswith(known)}
    config = getattr(transformers, kind)(**values)
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.3))
            if parameter.dim() == 1:
                parameter.add_(0.7)
    return model.eval()


def save_model(model: Any, folder: Path, **options: Any) -> Path:
    """The folder `save_pretrained` writes, with a tokenizer beside it."""
    model.save_pretrained(folder, **options)
    add_tokenizer(folder)
    return folder


def load_model(folder: Path) -> Any:
    """What transformers makes of a folder, in float32."""
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def add_tokenizer(folder: Path) -> None:
    """A word-level tokenizer of the models' vocabulary."""
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def reference(model: Any, tokens: list[int]) -> Any:
    """transformers' logits for the whole text in one call: (len(tokens), vocab)."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()
