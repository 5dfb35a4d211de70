"""`edgekit export --lora` end to end: the picture is that of diffusers with the adapter fused, under its scheduler."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors.torch import save_file

from edgekit.bundle.store import read_bundle
from tests.export.diffusion import tiny_pipelines as tiny
from tests.export.diffusion.conftest import Exported
from tests.export.diffusion.test_diffusers_parity import assert_same, in_bundle, in_torch

SCALE = 0.7
RANK = 2
SIZE = {"height": 16, "width": 16}  # pixels

pytestmark = tiny.FOREIGN


def write_lora(pipeline: Any, path: Path) -> None:
    """A random adapter of every query projection of the UNet, in peft's spelling."""
    generator = torch.Generator().manual_seed(5)
    keys = {}
    for name, weight in pipeline.unet.named_parameters():
        if name.endswith("to_q.weight"):
            module = name.removesuffix(".weight")
            keys[f"unet.{module}.lora_A.weight"] = torch.randn(RANK, weight.shape[1], generator=generator)
            keys[f"unet.{module}.lora_B.weight"] = torch.randn(weight.shape[0], RANK, generator=generator)
    assert keys
    save_file(keys, path)


def base_model() -> Any:
    """Stable Diffusion as it is published: undistilled, PNDMScheduler, betas that are no class's defaults."""
    pipeline = tiny.sd_turbo()
    pipeline.register_modules(scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **tiny.BETAS))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_command_distils_a_base_model_by_a_lora(tmp_path: Path) -> None:
    """`--lora FILE:SCALE --family tcd` of a base folder draws what diffusers draws: adapter fused, TCDScheduler from
    the base's config, and not the picture without the adapter."""
    pipeline = base_model()
    pipeline.save_pretrained(tmp_path / "model")
    lora, target = tmp_path / "tcd.safetensors", tmp_path / "distilled.bundle"
    write_lora(pipeline, lora)
    command = [sys.executable, "-m", "edgekit.cli", "export", tmp_path / "model", "-o", target, "--family", "tcd"]
    subprocess.run([*command, "--lora", f"{lora}:{SCALE}"], check=True, capture_output=True)
    bundle = read_bundle(target)
    assert bundle.manifest.provenance.loras[0].startswith("tcd.safetensors sha256:")
    assert bundle.manifest.family == "tcd"

    example = Exported("distilled", pipeline, tmp_path / "model", bundle, ())
    pipeline.scheduler = diffusers.TCDScheduler.from_config(pipeline.scheduler.config)
    plain = in_torch(example, 2, eta=0.3, **SIZE)
    pipeline.load_lora_weights(str(lora))
    pipeline.fuse_lora(lora_scale=SCALE)
    fused = in_torch(replace(example, pipeline=pipeline), 2, eta=0.3, **SIZE)
    assert np.abs(fused[0] - plain[0]).max() > 0.01 * np.abs(plain[0]).max()
    assert_same(in_bundle(example, 2, **SIZE), fused)
