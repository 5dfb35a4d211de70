"""Folding adapters: equal to the formula written out, and to what diffusers and peft do with the same file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from edgekit.errors import BadSource, UnsupportedModel
from edgekit.export.lora import adapters, check, fold
from tests.export.diffusion import tiny_pipelines as tiny

pytestmark = tiny.FOREIGN

Keys = dict[str, Tensor]

RANK, ALPHA = 2, 3.0
ADAPTED = {  # module of the tiny UNet -> what it is
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": "linear",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": "linear",
    "mid_block.attentions.0.proj_in": "1x1 convolution",
    "down_blocks.1.resnets.0.conv1": "3x3 convolution",
}
TEXT = {"encoder.layers.0.self_attn.q_proj": "linear", "encoder.layers.1.mlp.fc1": "linear"}


@pytest.fixture(scope="module")
def unet() -> Any:
    """A tiny UNet; tests work on copies of it."""
    return tiny.unet()


def pair(weight: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Random A and B of a weight, shaped as LoRA libraries shape them."""
    generator = torch.Generator().manual_seed(seed)
    down, up = (RANK, *weight.shape[1:]), (weight.shape[0], RANK, *[1] * (weight.dim() - 2))
    return torch.randn(down, generator=generator), torch.randn(up, generator=generator)


def kohya(modules: dict[str, str], weights: dict[str, Tensor], prefix: str = "lora_unet", level: str = "") -> Keys:
    """kohya's spelling, with an alpha."""
    keys: Keys = {}
    for seed, module in enumerate(modules):
        down, up = pair(weights[f"{module}.weight"], seed)
        name = f"{prefix}_{level}{module.replace('.', '_')}"
        keys |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
    return keys


def dotted(modules: dict[str, str], weights: dict[str, Tensor], roles: tuple[str, str], prefix: str = "unet") -> Keys:
    """diffusers' or peft's spelling, without an alpha."""
    keys: Keys = {}
    for seed, module in enumerate(modules):
        down, up = pair(weights[f"{module}.weight"], seed)
        keys |= {f"{prefix}.{module}.{roles[0]}.weight": down, f"{prefix}.{module}.{roles[1]}.weight": up}
    return keys


SPELLINGS: dict[str, Any] = {
    "kohya": kohya,
    "peft": lambda modules, weights: dotted(modules, weights, ("lora_A", "lora_B")),
    "diffusers": lambda modules, weights: dotted(modules, weights, ("lora.down", "lora.up")),
}


def folded(
    model: nn.Module, component: str, keys: Keys, path: Path, scale: float, **metadata: str
) -> dict[str, Tensor]:
    """The weights of a copy of `model` after folding a file of `keys`."""
    save_file(keys, path, metadata=metadata or None)
    copied = copy.deepcopy(model)
    fold(copied, component, path, scale)
    return dict(copied.named_parameters())


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_folding_is_the_formula_written_out(unet: Any, tmp_path: Path, spelling: str, scale: float) -> None:
    """Adapted weights, linear or convolution, become W + scale * alpha / r * B A; no other weight moves."""
    before = dict(unet.named_parameters())
    after = folded(unet, "unet", SPELLINGS[spelling](ADAPTED, before), tmp_path / "l.safetensors", scale)
    alpha = ALPHA if spelling == "kohya" else RANK
    for seed, module in enumerate(ADAPTED):
        weight = before[f"{module}.weight"]
        down, up = pair(weight, seed)
        product = torch.einsum("or...,ri...->oi...", up, down)
        twin = weight + scale * alpha / RANK * product
        assert not torch.allclose(twin, weight)
        torch.testing.assert_close(after.pop(f"{module}.weight"), twin, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(weight, before[name]) for name, weight in after.items())


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_folding_is_what_diffusers_fuses(unet: Any, tmp_path: Path, spelling: str) -> None:
    """The UNet equals the one diffusers makes of the same keys by load_lora_weights and fuse_lora."""
    keys = SPELLINGS[spelling](ADAPTED, dict(unet.named_parameters()))
    ours = folded(unet, "unet", keys, tmp_path / "l.safetensors", 0.7)
    pipeline = tiny.sd_turbo()
    pipeline.register_modules(unet=copy.deepcopy(unet))
    pipeline.load_lora_weights(dict(keys))
    pipeline.fuse_lora(lora_scale=0.7)
    pipeline.unload_lora_weights()
    theirs = dict(pipeline.unet.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


def test_names_of_the_first_publication_are_what_diffusers_takes_them_for(tmp_path: Path) -> None:
    """Every kind of module, by block number as SDXL's LoRA files have it, changes what diffusers changes."""
    model = tiny.unet(layers_per_block=2)
    weights = dict(model.named_parameters())
    modules = {
        "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.attentions.0.proj_in": "input_blocks.4.1.proj_in",
        "down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q": (
            "input_blocks.5.1.transformer_blocks.0.attn1.to_q"
        ),
        "down_blocks.1.resnets.0.time_emb_proj": "input_blocks.4.0.emb_layers.1",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
        "mid_block.resnets.0.conv2": "middle_block.0.out_layers.3",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2": "middle_block.1.transformer_blocks.0.ff.net.2",
        "mid_block.resnets.1.conv1": "middle_block.2.in_layers.2",
        "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_k": "output_blocks.2.1.transformer_blocks.0.attn2.to_k",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.1.resnets.0.conv2": "output_blocks.3.0.out_layers.3",
    }
    keys: Keys = {}
    for seed, (here, there) in enumerate(modules.items()):
        down, up = pair(weights[f"{here}.weight"], seed)
        name = f"lora_unet_{there.replace('.', '_')}"
        keys |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
    ours = folded(model, "unet", keys, tmp_path / "l.safetensors", 0.7)
    changed = {name for name, weight in ours.items() if not weight.equal(weights[name])}
    assert changed == {f"{module}.weight" for module in modules}
    pipeline = tiny.sd_turbo()
    pipeline.register_modules(unet=copy.deepcopy(model))
    understood, alphas = pipeline.lora_state_dict(dict(keys), unet_config=model.config)
    pipeline.load_lora_into_unet(understood, alphas, pipeline.unet)
    pipeline.fuse_lora(lora_scale=0.7)
    pipeline.unload_lora_weights()
    for name, weight in pipeline.unet.named_parameters():
        torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=1e-6, msg=name)


def test_alphas_in_the_metadata_count(unet: Any, tmp_path: Path) -> None:
    """peft's adapter config, kept in the file's header, gives alpha where no key does, by pattern if it has one."""
    config = {"unet.lora_alpha": 8, "unet.r": RANK, "unet.alpha_pattern": {"mid_block.attentions.0.proj_in": 1}}
    weights = dict(unet.named_parameters())
    keys = dotted(ADAPTED, weights, ("lora_A", "lora_B"))
    after = folded(unet, "unet", keys, tmp_path / "l.safetensors", 1.0, lora_adapter_metadata=json.dumps(config))
    for seed, module in enumerate(ADAPTED):
        down, up = pair(weights[f"{module}.weight"], seed)
        alpha = 1 if module.endswith("proj_in") else 8
        twin = weights[f"{module}.weight"] + alpha / RANK * torch.einsum("or...,ri...->oi...", up, down)
        torch.testing.assert_close(after[f"{module}.weight"], twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prefix", ["lora_te", "lora_te1", "lora_te2", "text_encoder", "text_encoder_2"])
def test_text_encoders_are_adapted_by_every_prefix(tmp_path: Path, prefix: str) -> None:
    """With and without the `text_model` level, which transformers versions differ in."""
    words = tiny.tokenizer()
    second = prefix.endswith("2")
    model = tiny.text_encoder(tiny.CLIPTextModelWithProjection if second else tiny.CLIPTextModel, words)
    plain = {name.removeprefix("text_model."): weight for name, weight in model.named_parameters()}
    if prefix.startswith("lora"):
        keys = kohya(TEXT, plain, prefix, level="text_model_")
    else:
        keys = {
            key.replace(f"{prefix}.encoder", f"{prefix}.text_model.encoder"): value
            for key, value in dotted(TEXT, plain, ("lora_A", "lora_B"), prefix).items()
        }
    after = folded(model, "text_encoder_2" if second else "text_encoder", keys, tmp_path / "l.safetensors", 1.0)
    changed = {
        name.removeprefix("text_model.") for name, weight in model.named_parameters() if not weight.equal(after[name])
    }
    assert changed == {f"{module}.weight" for module in TEXT}


def test_processors_of_old_diffusers_are_understood(unet: Any, tmp_path: Path) -> None:
    """`attn1.processor.to_q_lora.down.weight` adapts attn1.to_q, `to_out_lora` adapts to_out.0."""
    weights, block = dict(unet.named_parameters()), "mid_block.attentions.0.transformer_blocks.0"
    keys: Keys = {}
    for seed, (old, new) in enumerate({"attn1": "to_q", "attn2": "to_out.0"}.items()):
        down, up = pair(weights[f"{block}.{old}.{new}.weight"], seed)
        name = f"unet.{block}.{old}.processor.{new.removesuffix('.0')}_lora"
        keys |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    after = folded(unet, "unet", keys, tmp_path / "l.safetensors", 1.0)
    changed = {name for name, weight in weights.items() if not weight.equal(after[name])}
    assert changed == {f"{block}.attn1.to_q.weight", f"{block}.attn2.to_out.0.weight"}


def test_keys_that_match_nothing_are_named(unet: Any, tmp_path: Path) -> None:
    """Half a style is an error: before anything is loaded, and again where the weights are."""
    weights = dict(unet.named_parameters())
    keys = kohya(ADAPTED, weights)
    strange = {key.replace("mid_block", "mid_blocks"): value for key, value in keys.items()}
    path = tmp_path / "l.safetensors"
    save_file(strange, path)
    with pytest.raises(BadSource, match=r"3 of 4 adapters.*lora_unet_mid_blocks_attentions_0_proj_in"):
        check(path, {"unet": weights})
    with pytest.raises(BadSource, match="mid_blocks"):
        fold(copy.deepcopy(unet), "unet", path, 1.0)


def test_adapters_of_a_component_the_model_lacks_are_named(unet: Any, tmp_path: Path) -> None:
    """A LoRA for SDXL's second text encoder does not fit a model with one."""
    path = tmp_path / "l.safetensors"
    words = tiny.text_encoder(tiny.CLIPTextModel, tiny.tokenizer())
    save_file(kohya(TEXT, dict(words.named_parameters()), "lora_te2"), path)
    with pytest.raises(BadSource, match="lora_te2"):
        check(path, {"unet": dict(unet.named_parameters())})


def test_another_shape_is_refused_with_both(unet: Any, tmp_path: Path) -> None:
    """A LoRA of a wider model is told from one that fits."""
    path = tmp_path / "l.safetensors"
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{name}.lora_down.weight": torch.ones(2, 320), f"{name}.lora_up.weight": torch.ones(320, 2)}, path)
    with pytest.raises(BadSource, match=r"\(2, 320\).*\(320, 2\).*\(8, 8\)"):
        fold(copy.deepcopy(unet), "unet", path, 1.0)


OTHER_FILES = {
    "a key of no known spelling": ({"unet.conv_in.weight": 1}, BadSource, "no known spelling"),
    "an up without a down": ({"lora_unet_conv_in.lora_up.weight": 1}, BadSource, "half missing"),
    "DoRA": ({"lora_unet_conv_in.dora_scale": 1}, UnsupportedModel, "dora"),
    "LoHa": ({"lora_unet_conv_in.hada_w1_a": 1}, UnsupportedModel, "hada"),
    "LoKr": ({"lora_unet_conv_in.lokr_w1": 1}, UnsupportedModel, "lokr"),
    "Tucker": ({"lora_unet_conv_in.lora_mid.weight": 1}, UnsupportedModel, "lora_mid"),
    "nothing": ({}, BadSource, "no adapters"),
}


@pytest.mark.parametrize("what", OTHER_FILES)
def test_other_kinds_of_file_are_refused(tmp_path: Path, what: str) -> None:
    """Adapters that are not plain LoRA are refused by name, and so are files that hold something else."""
    keys, error, words = OTHER_FILES[what]
    path = tmp_path / "l.safetensors"
    save_file({key: torch.ones(1) for key in keys}, path)
    with pytest.raises(error, match=words):
        adapters(path)


def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    """Pickles and truncated downloads end in an error, not in a load."""
    path = tmp_path / "l.safetensors"
    for raw in (b"", b"\x80\x04", b"\xff" * 16, (5).to_bytes(8, "little") + b"[1,2]"):
        path.write_bytes(raw)
        with pytest.raises(BadSource, match="safetensors"):
            adapters(path)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.floats(-2, 2, width=32), second=st.floats(-2, 2, width=32))
def test_scales_add_up(tmp_path: Path, first: float, second: float) -> None:
    """Folding one file at two scales is folding it once at their sum, whatever the scales."""
    model = nn.Sequential()
    model.add_module("linear", nn.Linear(3, 4))
    keys = dotted({"linear": "linear"}, dict(model.named_parameters()), ("lora_A", "lora_B"))
    path = tmp_path / "l.safetensors"
    save_file(keys, path)
    twice, once = copy.deepcopy(model), copy.deepcopy(model)
    for scale in (first, second):
        fold(twice, "unet", path, scale)
    fold(once, "unet", path, first + second)
    torch.testing.assert_close(twice[0].weight, once[0].weight, rtol=1e-5, atol=1e-5)
