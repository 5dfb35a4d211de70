"""What the builder does not model, it refuses by name; what it cannot read, it says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgekit.errors import BadRequest, BadSource, EdgekitError, UnknownFamily, UnsupportedModel
from edgekit.export.language.config import Config
from edgekit.export.language.export import compile_language, export_language
from edgekit.export.language.families import read_spec
from edgekit.quant.precision import PRECISIONS

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 90,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GEMMA3 = LLAMA | {"model_type": "gemma3_text", "head_dim": 16}
GPT2 = {"model_type": "gpt2", "vocab_size": 90, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128}

# (configuration, change, what the refusal names)
UNSUPPORTED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    (LLAMA, {"num_local_experts": 8}, "num_local_experts"),
    (LLAMA, {"sliding_window": 512}, "sliding_window"),
    (LLAMA, {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    (LLAMA, {"rope_scaling": {"type": "su", "factor": 2.0}}, "type = 'su'"),
    (LLAMA, {"rope_parameters": {"rope_type": "mrope"}}, "mrope"),
    (LLAMA, {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
    (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (LLAMA, {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
    (LLAMA, {"rope_interleaved": True}, "rope_interleaved"),
    (LLAMA, {"hidden_act": "xielu"}, "hidden_act"),
    (LLAMA, {"alibi": True}, "alibi"),
    (LLAMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    (LLAMA | {"model_type": "mistral"}, {"layer_types": ["full_attention"] * 2}, "layer_types"),
    (LLAMA | {"model_type": "qwen3"}, {"layer_types": ["linear_attention"] * 2}, "linear_attention"),
    (LLAMA | {"model_type": "gemma2"}, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    (GEMMA3, {"rope_parameters": {"chunked_attention": {}, "full_attention": {"rope_theta": 1e6}, "x": 1}}, "x"),
    (GPT2, {"add_cross_attention": True}, "add_cross_attention"),
    (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
]

MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"num_hidden_layers": True}, "num_hidden_layers"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ({"attention_bias": 1}, "attention_bias"),
    ({"rope_scaling": "linear"}, "rope_scaling"),
    ({"rope_scaling": {"type": "linear"}}, "factor"),
    ({"num_key_value_heads": 3}, "key-value heads"),
    ({"num_attention_heads": 64}, "rotary dimension"),
]


@pytest.mark.parametrize(
    ("base", "change", "named"), UNSUPPORTED, ids=[f"{b['model_type']}-{n}" for b, _, n in UNSUPPORTED]
)
def test_unmodelled_features_are_refused_by_name(base: dict[str, Any], change: dict[str, Any], named: str) -> None:
    """One feature too many refuses the model and names the feature; without it the same configuration is read."""
    read_spec(Config(dict(base) | _needs(base), "config.json"))
    with pytest.raises(UnsupportedModel, match=named):
        read_spec(Config(base | _needs(base) | change, "config.json"))


def _needs(base: dict[str, Any]) -> dict[str, Any]:
    return {"sliding_window": 16} if base["model_type"] in ("mistral", "gemma2", "gemma3_text") else {}


@pytest.mark.parametrize(("change", "named"), MALFORMED, ids=[f"{n}-{i}" for i, (_, n) in enumerate(MALFORMED)])
def test_malformed_values_are_named(change: dict[str, Any], named: str) -> None:
    """A value of the wrong kind is the source's fault, and the message says which."""
    with pytest.raises(BadSource, match=named):
        read_spec(Config(LLAMA | change, "config.json"))


def test_sliding_layers_need_a_window() -> None:
    """A layer pattern with windows of no stated size is incomplete."""
    base = LLAMA | {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}
    with pytest.raises(BadSource, match="sliding_window"):
        read_spec(Config(base, "config.json"))


def test_unknown_families_list_the_known() -> None:
    """A model type without a row is refused with the rows there are."""
    with pytest.raises(UnknownFamily, match=r"'mamba'.*gemma2.*llama"):
        read_spec(Config(LLAMA | {"model_type": "mamba"}, "config.json"))


@pytest.mark.parametrize("raw", [b"{", b"[1]", b"\xff", b"null"])
def test_a_broken_config_is_a_bad_source(raw: bytes, tmp_path: Path) -> None:
    """config.json that is no JSON object is refused as such."""
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(BadSource, match=r"config\.json"):
        compile_language(tmp_path, PRECISIONS["fp32"], "ort")


@pytest.mark.parametrize("what", ["missing folder", "no config", "no weights"])
def test_an_incomplete_folder_is_a_bad_source(what: str, tmp_path: Path) -> None:
    """A folder that is not there, or lacks configuration or weights, is refused, each with its own words."""
    folder = tmp_path / "model"
    words = {"missing folder": "not a folder", "no config": "no config", "no weights": "safetensors"}
    if what != "missing folder":
        folder.mkdir()
    if what == "no weights":
        (folder / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(BadSource, match=words[what]):
        export_language(folder, tmp_path / "out")


def test_unknown_dialects_and_precisions_are_refused(tmp_path: Path) -> None:
    """Both lists are closed."""
    with pytest.raises(BadRequest, match="ort, std"):
        compile_language(tmp_path, PRECISIONS["fp32"], "trt")
    with pytest.raises(BadRequest, match="int4"):
        export_language(tmp_path, tmp_path / "out", precision="int5")


def test_refusals_are_usage_errors() -> None:
    """Every refusal here ends the command with exit code 2."""
    kinds: list[type[EdgekitError]] = [BadRequest, BadSource, UnknownFamily, UnsupportedModel]
    assert {kind.exit_code for kind in kinds} == {2}
