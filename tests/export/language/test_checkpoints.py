"""What save_pretrained wrote is read: shards, half precision, old names, old configurations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from edgekit.errors import BadSource, UnsupportedModel
from edgekit.export.language.config import Config
from edgekit.export.language.export import export_language
from edgekit.export.language.families import read_spec
from tests.export.language import tiny
from tests.export.language.runner import Runner
from tests.export.language.test_decoder_parity import TOKENS, close

pytestmark = pytest.mark.torch

Models = Callable[[str], tuple[Any, Path]]


def logits_of(source: Path, staging: Path, **options: Any) -> np.ndarray:
    return Runner(staging, export_language(source, staging, **options)).forward(TOKENS)


def copied(source: Path, target: Path, tensors: dict[str, np.ndarray] | None = None, **changes: Any) -> Path:
    """The folder again, with other tensors or other configuration values; a value of ... removes the key."""
    target.mkdir()
    config = json.loads((source / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    save_file(load_file(source / "model.safetensors") if tensors is None else tensors, target / "model.safetensors")
    tiny.add_tokenizer(target)
    return target


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_half_precision_checkpoints_are_widened_exactly(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A bfloat16 or float16 checkpoint exports to the float32 model of the same numbers."""
    source = tiny.save_model(tiny.make_model(case).to(dtype), tmp_path / "source")
    assert close(logits_of(source, tmp_path / "out"), tiny.reference(tiny.load_model(source), TOKENS))


def test_float16_export_stays_near(tmp_path: Path, model_of: Models) -> None:
    """An fp16 export of an fp32 model differs by half precision's rounding and no more."""
    model, source = model_of("llama")
    manifest = export_language(source, tmp_path, precision="fp16")
    assert manifest.decoding is not None
    assert manifest.decoding.kv.dtype == "float16"
    logits, wanted = Runner(tmp_path, manifest).forward(TOKENS), tiny.reference(model, TOKENS)
    assert logits.dtype == np.float32
    assert np.abs(logits - wanted).max() < 1e-2 * np.abs(wanted).max()


def test_shards_are_one_checkpoint(tmp_path: Path, model_of: Models) -> None:
    """A checkpoint in many files with an index exports like the same in one."""
    model, _ = model_of("phi3")
    source = tiny.save_model(model, tmp_path / "source", max_shard_size="30KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    assert close(logits_of(source, tmp_path / "out"), tiny.reference(model, TOKENS))


@pytest.mark.parametrize(("case", "prefix"), [("llama", "model."), ("gpt2", "transformer.")])
def test_names_without_prefix_are_found(case: str, prefix: str, tmp_path: Path, model_of: Models) -> None:
    """A checkpoint of the bare model, without the prefix the causal model adds, is the same model."""
    model, source = model_of(case)
    tensors = {name.removeprefix(prefix): value for name, value in load_file(source / "model.safetensors").items()}
    bare = copied(source, tmp_path / "source", tensors)
    assert close(logits_of(bare, tmp_path / "out"), tiny.reference(model, TOKENS))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_part_of_a_multimodal_gemma3(prefix: str, tmp_path: Path, model_of: Models) -> None:
    """A gemma3 folder exports its text part, under the names of transformers 4 and 5, and says what was left behind."""
    model, source = model_of("gemma3_text")
    text = json.loads((source / "config.json").read_text())
    tensors = {n.replace("model.", prefix, 1): v for n, v in load_file(source / "model.safetensors").items()}
    tensors["vision_tower.layer.weight"] = np.zeros((2, 2), np.float32)
    tensors["multi_modal_projector.weight"] = np.zeros((2, 2), np.float32)
    folder = copied(source, tmp_path / "source", tensors)
    outer = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}, "image_token_index": 5}
    (folder / "config.json").write_text(json.dumps(outer))
    manifest = export_language(folder, tmp_path / "out")
    assert close(Runner(tmp_path / "out", manifest).forward(TOKENS), tiny.reference(model, TOKENS))
    assert manifest.family == "gemma3"
    assert "vision" in manifest.notes["export"]


def old_form(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as transformers 4 wrote it: rope_theta and rope_scaling instead of rope_parameters."""
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    rope = dict(config.get("rope_parameters") or {})
    if "full_attention" in rope:
        full, local = rope["full_attention"], rope["sliding_attention"]
        scaling = {key: value for key, value in full.items() if key != "rope_theta"}
        return old | {
            "rope_theta": full["rope_theta"],
            "rope_local_base_freq": local["rope_theta"],
            "rope_scaling": scaling,
        }
    if rope:
        old["rope_theta"] = rope.pop("rope_theta")
        old["partial_rotary_factor"] = rope.pop("partial_rotary_factor", 1.0)
        kind = rope.pop("rope_type")
        old["rope_scaling"] = None if kind == "default" else rope | {"type": kind}
    return old


@pytest.mark.parametrize("case", tiny.CASES)
def test_old_and_new_configurations_mean_the_same(case: str, model_of: Models) -> None:
    """transformers 4's rope keys give the very Spec that transformers 5's rope_parameters give."""
    new = json.loads((model_of(case)[1] / "config.json").read_text())
    old = old_form(new)
    assert case == "gpt2" or old != new
    assert read_spec(Config(old, "old")) == read_spec(Config(new, "new"))


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("qwen2", {"layer_types": ...}),
        ("qwen3", {"layer_types": ...}),
        ("gemma2", {"layer_types": ...}),
        ("smollm3", {"layer_types": ..., "no_rope_layers": ...}),
        ("llama", {"head_dim": ..., "pretraining_tp": 2, "_name_or_path": "x", "rope_interleaved": False}),
        ("phi3", {"full_attn_mod": 1, "lm_head_bias": False}),
    ],
)
def test_what_a_configuration_leaves_out_is_the_familys_default(
    case: str, changes: dict[str, Any], model_of: Models
) -> None:
    """Layer patterns that older configurations leave to the code, and keys that do nothing, change no Spec."""
    config = json.loads((model_of(case)[1] / "config.json").read_text())
    changed = {key: value for key, value in (config | changes).items() if value is not ...}
    assert changed != config
    assert read_spec(Config(changed, "changed")) == read_spec(Config(config, "as saved"))


def test_tied_head_is_stored_once(tmp_path: Path, model_of: Models) -> None:
    """The graph holds one matrix of vocabulary size, and the engine's optimiser makes no second one of it."""
    import onnx
    import onnxruntime as ort

    export_language(model_of("llama-tied")[1], tmp_path)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(tmp_path / "graphs" / "decoder.onnx", options, providers=["CPUExecutionProvider"])
    for file in (tmp_path / "graphs" / "decoder.onnx", tmp_path / "optimized.onnx"):
        weights = onnx.load(str(file), load_external_data=False).graph.initializer
        assert sum(tiny.VOCAB in weight.dims for weight in weights) == 1


def test_a_tied_checkpoint_with_another_head_keeps_that_head(tmp_path: Path, model_of: Models) -> None:
    """Where configuration and checkpoint disagree on tying, the stored head runs, as it does in transformers."""
    _, source = model_of("llama-tied")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1].copy()
    folder = copied(source, tmp_path / "source", tensors)
    tied = logits_of(source, tmp_path / "tied")
    assert close(logits_of(folder, tmp_path / "own"), tied[:, ::-1])


def test_a_tied_checkpoint_with_the_same_head_is_tied(tmp_path: Path, model_of: Models) -> None:
    """A head that repeats the embedding is not stored a second time."""
    _, source = model_of("llama-tied")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    folder = copied(source, tmp_path / "source", tensors)
    first, second = export_language(source, tmp_path / "a"), export_language(folder, tmp_path / "b")
    assert first.parts["decoder"].parameters == second.parts["decoder"].parameters
    sizes = {(tmp_path / name / "graphs" / "decoder.onnx.data").stat().st_size for name in "ab"}
    assert len(sizes) == 1


def test_a_weight_nobody_reads_is_refused(tmp_path: Path, model_of: Models) -> None:
    """A tensor without a place in the decoder means another architecture: refused by name."""
    _, source = model_of("llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.sinks"] = np.zeros(4, np.float32)
    with pytest.raises(UnsupportedModel, match="sinks"):
        export_language(copied(source, tmp_path / "source", tensors), tmp_path / "out")


def test_a_weight_the_configuration_calls_for_must_be_there(tmp_path: Path, model_of: Models) -> None:
    """A missing tensor is named."""
    _, source = model_of("llama")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(BadSource, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        export_language(copied(source, tmp_path / "source", tensors), tmp_path / "out")


@pytest.mark.parametrize("changes", [{"intermediate_size": 95}, {"vocab_size": 97}, {"num_key_value_heads": 1}])
def test_shapes_must_agree_with_the_configuration(changes: dict[str, int], tmp_path: Path, model_of: Models) -> None:
    """A configuration that belongs to other weights is refused before anything is written."""
    source = copied(model_of("llama")[1], tmp_path / "source", **changes)
    with pytest.raises((BadSource, UnsupportedModel), match=r"config\.json"):
        export_language(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_float16_range_is_respected(tmp_path: Path, model_of: Models) -> None:
    """A weight that float16 cannot hold refuses the fp16 export and names its tensor; fp32 takes it."""
    _, source = model_of("llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = 1e6
    folder = copied(source, tmp_path / "source", tensors)
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.out"):
        export_language(folder, tmp_path / "half", precision="fp16")
    export_language(folder, tmp_path / "single")
