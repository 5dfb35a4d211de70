"""Weights as hubs store them: halves, shards, variants; and what is no weight file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from edgekit.errors import BadSource
from edgekit.export.families.networks import UNet
from edgekit.export.families.weights import parameters, shapes, variant_of
from edgekit.export.headers import read_header
from tests.export.diffusion.tiny_pipelines import FOREIGN, unet

pytestmark = FOREIGN

STORED: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "halves": (torch.float16, {}),
    "bfloat16": (torch.bfloat16, {}),
    "the fp16 variant": (torch.float16, {"variant": "fp16"}),
    "shards": (torch.float32, {"max_shard_size": "8KB"}),
    "shards of the fp16 variant": (torch.float16, {"max_shard_size": "8KB", "variant": "fp16"}),
}


@pytest.mark.parametrize("form", STORED)
def test_a_unet_is_read_as_from_pretrained_reads_it(tmp_path: Path, form: str) -> None:
    """One weight at a time gives, bit for bit, the float32 module that diffusers loads whole."""
    dtype, options = STORED[form]
    unet().to(dtype).save_pretrained(tmp_path, **options)
    theirs = UNet2DConditionModel.from_pretrained(
        tmp_path, torch_dtype=torch.float32, variant=options.get("variant"), low_cpu_mem_usage=False
    )
    ours = UNet(tmp_path).inner
    wanted = dict(theirs.named_parameters())
    given = dict(ours.named_parameters())
    assert given.keys() == wanted.keys()
    assert all(weight.dtype == torch.float32 and weight.equal(wanted[name]) for name, weight in given.items())
    assert not ours.training
    assert shapes(tmp_path) == {name: tuple(weight.shape) for name, weight in wanted.items()}
    assert parameters(tmp_path, ("mid_block.",)) == sum(p.numel() for p in theirs.mid_block.parameters())


def test_full_precision_is_preferred_to_its_variant(tmp_path: Path) -> None:
    """A folder with both is read from the exact file."""
    model = unet()
    model.save_pretrained(tmp_path, variant="fp16")
    assert variant_of(tmp_path) == "fp16"
    model.save_pretrained(tmp_path)
    assert variant_of(tmp_path) is None


def test_weights_and_config_must_agree(tmp_path: Path) -> None:
    """A weight too many, too few or of another shape is named."""
    folder = tmp_path / "unet"
    unet().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for changes, words in (
        ({"time_cond_proj_dim": 32}, "missing, among them time_embedding.cond_proj"),
        ({"cross_attention_dim": 24}, "is no weight of the unet"),
        ({"mid_block_type": None}, r"mid_block\..* is no weight"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(BadSource, match=words):
            UNet(folder)


def test_incomplete_and_pickled_weights_are_refused(tmp_path: Path) -> None:
    """A missing shard is named; pickles are refused with the way out; an empty folder is told apart."""
    with pytest.raises(BadSource, match=r"no \*\.safetensors"):
        variant_of(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BadSource, match="pickled"):
        variant_of(tmp_path)
    unet().save_pretrained(tmp_path, max_shard_size="8KB")
    shard = sorted(tmp_path.glob("*-of-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(BadSource, match=shard.name):
        shapes(tmp_path)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"1234567",
        (2**40).to_bytes(8, "little"),
        (2).to_bytes(8, "little") + b"[]",
        (3).to_bytes(8, "little") + b"{}",
    ],
    ids=["empty", "short", "vast", "no object", "cut"],
)
def test_hostile_headers_end_in_an_error(tmp_path: Path, raw: bytes) -> None:
    """A header is believed only in so far as the file bears it out."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(BadSource, match="safetensors"):
        read_header(path)


def test_a_cut_file_is_noticed(tmp_path: Path) -> None:
    """A download that broke off has a whole header and half its bytes."""
    unet().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(BadSource, match="complete"):
        UNet(tmp_path)
