"""`edgekit export --lora` end to end: the picture is that of diffusers with the adapter fused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from edgekit.bundle.store import read_bundle
from tests.export.diffusion import tiny_pipelines as tiny
from tests.export.diffusion.conftest import Exported
from tests.export.diffusion.test_diffusers_parity import assert_same, in_bundle, in_torch

SCALE = 0.7
RANK = 2
SIDE = 16  # pixels

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


def test_the_command_folds_what_diffusers_fuses(tmp_path: Path) -> None:
    """The bundle made with `--lora FILE:SCALE` draws diffusers' fused picture, and not the one without the adapter."""
    pipeline = tiny.sd_turbo()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "model")
    lora, target = tmp_path / "style.safetensors", tmp_path / "styled.bundle"
    write_lora(pipeline, lora)
    command = [sys.executable, "-m", "edgekit.cli", "export", tmp_path / "model", "-o", target]
    subprocess.run([*command, "--lora", f"{lora}:{SCALE}"], check=True, capture_output=True)
    bundle = read_bundle(target)
    assert bundle.manifest.provenance.loras[0].startswith("style.safetensors sha256:")

    example = Exported("sd-turbo", pipeline, tmp_path / "model", bundle, ())
    plain = in_torch(example, 2, height=SIDE, width=SIDE)
    pipeline.load_lora_weights(str(lora))
    pipeline.fuse_lora(lora_scale=SCALE)
    fused = in_torch(replace(example, pipeline=pipeline), 2, height=SIDE, width=SIDE)
    assert np.abs(fused[0] - plain[0]).max() > 0.01 * np.abs(plain[0]).max()
    assert_same(in_bundle(example, 2, height=SIDE, width=SIDE), fused)
