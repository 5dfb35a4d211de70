"""The child's real work on single parts: the TensorRT dialect, LoRA on the way, and the emoji model's own networks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from safetensors.torch import save_file

from edgekit.export.families import PartJob, family_of
from edgekit.export.families.emoji_networks import ResidualUpscaler, Unfold
from edgekit.export.parity import LIMIT, Comparison, probe
from edgekit.export.sources import read_source
from edgekit.export.worker import Event, Lora, Task, run_task
from edgekit.runtime.backends import open_session
from tests.export.diffusion.tiny_pipelines import FOREIGN

pytestmark = FOREIGN

Folders = dict[str, tuple[Any, Path]]
EMOJI = Path(__file__).parents[3] / "models" / "emoji"


def made(source: Path, jobs: tuple[PartJob, ...], to: Path, **options: Any) -> dict[str, Comparison]:
    """Trace and compare parts; the comparisons, by part. Graphs lie in `to`."""
    heard: list[Event] = []
    for kind in ("trace", "compare"):
        asked = Task(kind=kind, jobs=jobs, source=str(source), graphs=str(to), references=str(to), **options)
        run_task(asked, heard.append)
    return {event.part: event.comparison for event in heard if event.comparison is not None}


def jobs_of(source: Path, *parts: str) -> tuple[PartJob, ...]:
    """Some of a folder's jobs."""
    model = read_source(source)
    return tuple(job for job in family_of(model).jobs(model) if job.part in parts)


def test_the_tensorrt_dialect_with_a_lora_folded_in(folders: Folders, tmp_path: Path) -> None:
    """Opset 23, one standard Attention per attention, equal to the torch model with the LoRA's weights in it."""
    pipeline, folder = folders["sd-turbo"]
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    generator = torch.Generator().manual_seed(5)
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, 8), (8, 2)))
    lora = tmp_path / "style.safetensors"
    save_file({f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}, lora)
    jobs = jobs_of(folder, "unet")
    found = made(folder, jobs, tmp_path, attention="std", loras=(Lora(str(lora), 0.5),))
    assert found["unet"].error < LIMIT / 10
    model = onnx_ir.load(tmp_path / "unet.onnx")
    operators = Counter(node.op_type for node in model.graph)
    assert model.opset_imports[""] == 23
    assert "com.microsoft" not in {node.domain for node in model.graph}
    assert operators["Attention"] == len(pipeline.unet.attn_processors)
    feeds = probe(jobs[0], 0)
    given = [torch.from_numpy(feeds[spec.name]) for spec in jobs[0].inputs]
    out = open_session(tmp_path / "unet.onnx", "cpu").run(feeds)["out_sample"]
    weight = pipeline.unet.get_submodule(name).weight
    with torch.no_grad():
        before = pipeline.unet(*given).sample.numpy()
        weight += 0.5 * up @ down
        after = pipeline.unet(*given).sample.numpy()
        weight -= 0.5 * up @ down
    assert np.abs(after - before).max() > 1e-3 * np.abs(after).max()
    assert np.abs(out - after).max() < 1e-5 * np.abs(after).max()


def test_the_emoji_networks_are_the_trained_ones() -> None:
    """Upscaler and unfolding give what the training scripts' own modules give, with the same weights."""
    training = pytest.importorskip("training.emoji.upscaler", reason="the training scripts are not installed")
    from training.emoji.networks import unfold

    torch.manual_seed(0)
    theirs, ours = training.ResidualUpscaler(blocks=2), ResidualUpscaler(blocks=2)
    torch.nn.init.normal_(theirs.tail2.weight)
    ours.load_state_dict(theirs.state_dict())
    picture, folded = torch.randn(2, 3, 5, 7), torch.randn(2, 12, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(ours(picture), theirs(picture))
        torch.testing.assert_close(Unfold(EMOJI)(folded), unfold(folded))


def test_the_emoji_decoder_and_upscaler_export(tmp_path: Path) -> None:
    """The shipped upscaler passes its gate at two sizes; the decoder is a graph without a weight."""
    found = made(EMOJI, jobs_of(EMOJI, "decoder", "upscaler"), tmp_path)
    assert found["upscaler"].error < LIMIT / 10
    assert found["decoder"].error == 0
    assert [node.op_type for node in onnx_ir.load(tmp_path / "decoder.onnx").graph] == ["DepthToSpace"]
    assert not (tmp_path / "decoder.onnx.data").exists()
