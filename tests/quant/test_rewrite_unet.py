"""All rewrites on UNets as the exporter writes them, Stable Diffusion's and SDXL's: exact, with the units promised."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.bundle.manifest import TensorSpec
from edgekit.export.families import PartJob
from edgekit.export.parity import probe
from edgekit.export.worker import Task, run_task
from edgekit.quant.graph import Unit, find_units, load_graph, normalised
from edgekit.quant.rewrite import find_constant_rows, smooth, split_rows, split_shortcuts
from edgekit.runtime.backends import open_session
from tests.export.diffusion import tiny_pipelines as tiny
from tests.quant.tiny_graphs import prompts, relative

pytestmark = [*tiny.FOREIGN, pytest.mark.slow]

FORMS: dict[str, tuple[dict[str, Any], tuple[tuple[str, tuple[Any, ...]], ...]]] = {
    "sd": (
        {"block_out_channels": (16,), "use_linear_projection": True},
        (("encoder_hidden_states", ("length", 32)),),
    ),
    "sdxl": (
        {
            "block_out_channels": (16,),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
            "cross_attention_dim": 56,
        },
        (
            ("encoder_hidden_states", ("length", 32)),
            ("encoder_hidden_states_2", ("length", 24)),
            ("text_embeds", (32,)),
            ("time_ids", (6,)),
        ),
    ),
}


@pytest.fixture(scope="module", params=FORMS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PartJob]:
    """One level with attention down, in the middle and up, random weights; traced in a child."""
    folder = tmp_path_factory.mktemp(request.param)
    changes, more = FORMS[request.param]
    tiny.unet(**{**tiny.ONE_LEVEL, **changes}).save_pretrained(folder / "unet")
    latent = TensorSpec("sample", "float32", ("batch", 4, "height", "width"))
    time = TensorSpec("timestep", "float32", ("batch",))
    texts = tuple(TensorSpec(name, "float32", ("batch", *shape)) for name, shape in more)
    sizes = {"batch": (2, 3), "height": (8, 6), "width": (6, 8), "length": (7, 5)}
    out = TensorSpec("out_sample", "float32", latent.shape)
    job = PartJob("unet", "edgekit.export.families.networks:UNet", "unet", (latent, time, *texts), (out,), sizes)
    (folder / "graphs").mkdir()
    run_task(Task("trace", (job,), str(folder), str(folder / "graphs"), str(folder / "graphs")), lambda event: None)
    return folder / "graphs/unet.onnx", job


def fed(job: PartJob, number: int) -> dict[str, np.ndarray]:
    """The exporter's own probe, its texts replaced by such as have a large first token."""
    feeds = probe(job, number)
    for name in feeds:
        if name.startswith("encoder_hidden_states"):
            batch, tokens, width = feeds[name].shape
            feeds[name] = prompts(batch, tokens=tokens, width=width, larger=4.5, seed=number)
    return feeds


def answers(model: ir.Model, folder: Path, feeds: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """What a graph gives, written and opened as the runtime does."""
    ir.save(model, folder / "graph.onnx", external_data="graph.onnx.data")
    session = open_session(folder / "graph.onnx", threads=1)
    return [session.run(each) for each in feeds]


def by_id(model: ir.Model) -> dict[str, Unit]:
    """Units by name."""
    return {unit.id: unit for unit in find_units(model)}


def test_every_rewrite_is_exact_on_an_exported_unet(exported: tuple[Path, PartJob], tmp_path: Path) -> None:
    """Keys and values of each cross-attention, each shortcut and each norm before products: to 1e-5 on two shapes."""
    path, job = exported
    feeds = [fed(job, number) for number in (0, 1)]
    model = normalised(load_graph(path))
    before, units = answers(model, tmp_path, feeds), by_id(model)
    rows = {name: find_constant_rows([each[name] for each in feeds]) for name in feeds[0] if feeds[0][name].ndim == 3}
    split = split_rows(model, find_units(model), rows)
    cut = split_shortcuts(model, find_units(model))
    smoothed = smooth(model, find_units(model), {unit.data: np.linspace(0.5, 4, unit.k) for unit in find_units(model)})
    after = answers(model, tmp_path, feeds)
    sys.stdout.write(
        f"{len(split)} keys and values, {len(cut)} shortcuts, {len(smoothed)} norms: largest difference "
        f"{max(relative(a['out_sample'], b['out_sample']) for a, b in zip(after, before, strict=True)):.1e}\n"
    )
    assert (len(split), len(cut)) == (8, 2)  # two projections in each of four attentions; two blocks on the way up
    assert smoothed
    for a, b in zip(after, before, strict=True):
        assert relative(a["out_sample"], b["out_sample"]) < 1e-5
        assert all(value < 1e-6 for name, value in a.items() if name.startswith("guard."))
        assert sorted(a) == sorted(["out_sample", *(f"guard.{name}" for name in rows)])
    _check_units(units, by_id(model), [each.node for each in cut], [each.node for each in split])


def _check_units(before: dict[str, Unit], after: dict[str, Unit], cut: list[str], split: list[str]) -> None:
    """The units of before, halves in place of what was cut, each with the role it had."""
    assert set(before) - set(after) == set(cut)
    assert set(after) - set(before) == {f"{name}.{half}" for name in cut for half in (0, 1)}
    kept = {name for name in before if name in after and (name not in split or before[name].role == "cross_kv")}
    assert {name: before[name].role for name in kept} == {name: after[name].role for name in kept}
    assert {after[f"{name}.{half}"].role for name in cut for half in (0, 1)} == {"shortcut"}
    assert {before[name].role for name in cut} == {"shortcut"}
    assert sum(unit.params for unit in after.values()) == sum(unit.params for unit in before.values())
