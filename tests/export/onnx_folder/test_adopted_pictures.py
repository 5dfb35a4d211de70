"""Pipelines that optimum exported draw, without torch, what diffusers drew in torch from the same seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekit.bundle.graphfile import read_graph
from edgekit.bundle.store import Bundle
from edgekit.errors import BadRequest, BadSource, IllegalSteps
from edgekit.runtime.backends import open_session
from edgekit.runtime.diffusion.pipeline import FewStepPipeline
from tests.export.onnx_folder.folders import FOLDERS, PIPELINES, adopt, configure, copied, edit, fix, golden

PROMPT, SEED = "a red apple on the grass", 11  # of tests/fixtures/optimum/make.py
LATENT_LIMIT = 1e-5  # of max|x|
CASES = {"1": (1, (16, 16), 1), "4": (4, (16, 16), 1), "batch": (2, (24, 40), 2)}
Adopted = Callable[[str], Bundle]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PIPELINES)
def test_the_same_seed_draws_the_picture_diffusers_drew(adopted: Adopted, name: str, case: str) -> None:
    """One step, four, and a batch of two that is not square: latents to 1e-5 of max|x|, pictures to one of 255."""
    steps, (height, width), batch = CASES[case]
    options = {"guidance": 6.0} if name == "lcm" else {}
    with FewStepPipeline(adopted(name)) as model:
        drawn = model.generate(
            PROMPT, steps=steps, seed=SEED, seed_mode="torch-cpu", height=height, width=width, batch=batch, **options
        )
    right = golden(name)
    latents, pictures = right[f"{case}.latent"], right[f"{case}.np"].astype(int)
    assert np.abs(drawn.latents - latents).max() <= LATENT_LIMIT * np.abs(latents).max()
    assert np.abs(np.stack([np.asarray(image) for image in drawn.images]).astype(int) - pictures).max() <= 1
    assert pictures.std() > 5


@pytest.mark.parametrize("name", PIPELINES)
def test_the_signature_is_the_houses(adopted: Adopted, name: str) -> None:
    """Axes have the names of torch exports, in the manifest and in the graph; times are a float32 vector."""
    bundle = adopted(name)
    unet = bundle.manifest.parts["unet"]
    inputs = {spec.name: (spec.dtype, spec.shape) for spec in unet.inputs}
    assert inputs["sample"] == ("float32", ("batch", 4, "height", "width"))
    assert inputs["timestep"] == ("float32", ("batch",))
    assert inputs["encoder_hidden_states"] == ("float32", ("batch", "length", 8))
    assert [spec.shape for spec in bundle.manifest.parts["vae_encoder"].outputs] == [("batch", 4, "height", "width")]
    for part in bundle.manifest.parts.values():
        graph = read_graph(bundle.root / part.graph)
        assert [tensor.shape for tensor in graph.inputs] == [spec.shape for spec in part.inputs]
        assert [tensor.shape for tensor in graph.outputs] == [spec.shape for spec in part.outputs]
    assert bundle.manifest.family == PIPELINES[name]
    assert bundle.manifest.parts["unet"].parameters > 1000


def test_what_a_recipe_feeds_besides_has_its_place(adopted: Adopted) -> None:
    """LCM's embedded guidance; SDXL's two text states, pooled text and sizes: each an input of its own."""
    lcm, xl = (adopted(name).manifest for name in ("lcm", "sdxl-turbo"))
    assert [s.shape for s in lcm.parts["unet"].inputs if s.name == "timestep_cond"] == [("batch", 8)]
    widths = {spec.name: spec.shape[-1] for spec in xl.parts["unet"].inputs}
    assert (widths["encoder_hidden_states"], widths["encoder_hidden_states_2"]) == (8, 12)
    assert (widths["text_embeds"], widths["time_ids"]) == (8, 6)
    outputs = {name: [spec.name for spec in part.outputs] for name, part in xl.parts.items()}
    assert outputs["text_encoder"] == ["hidden_states"]
    assert sorted(outputs["text_encoder_2"]) == ["hidden_states", "text_embeds"]
    assert [spec.name for spec in lcm.parts["text_encoder"].outputs] == ["last_hidden_state"]


@pytest.mark.parametrize("name", PIPELINES)
def test_every_row_may_have_its_own_time(adopted: Adopted, name: str) -> None:
    """Optimum's graph takes one number for all; adopted, a batch at two times is the two pictures at each."""
    bundle = adopted(name)
    session = open_session(bundle.root / bundle.manifest.parts["unet"].graph)
    rng = np.random.default_rng(5)
    sizes = {"batch": 2, "height": 4, "width": 8, "length": 16}
    feeds = {
        spec.name: rng.normal(size=[sizes.get(dim, dim) for dim in spec.shape]).astype("float32")
        for spec in session.inputs
    }
    feeds["timestep"] = np.array([999, 259], "float32")
    both = session.run(feeds)["out_sample"]
    alone = [session.run({key: value[row : row + 1] for key, value in feeds.items()})["out_sample"] for row in (0, 1)]
    np.testing.assert_allclose(both, np.concatenate(alone), atol=1e-5)
    same = session.run({**feeds, "timestep": np.array([999, 999], "float32")})["out_sample"]
    assert np.abs(same[1] - both[1]).max() > 1e-3
    assert "timestep" not in bundle.manifest.notes


def test_a_given_picture_is_redrawn_from_the_encoders_mean(adopted: Adopted) -> None:
    """The encoder gives the mean of its distribution, so the same picture is encoded alike every time."""
    given = Image.fromarray(np.random.default_rng(3).integers(0, 255, (16, 24, 3), dtype=np.uint8))
    options = {"image": given, "strength": 0.5, "steps": 4, "seed": 2, "height": 16, "width": 24}
    with FewStepPipeline(adopted("lcm")) as model:
        first, again = (model.generate(PROMPT, **options).latents for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert np.isfinite(first).all()


def test_sizes_that_the_exporter_ruled_out_are_told(adopted: Adopted) -> None:
    """A UNet that halves its latent, traced on even sizes, fails on odd ones: the recipe refuses them first."""
    lcm, turbo = adopted("lcm").manifest, adopted("sd-turbo").manifest
    assert "multiples of 2" in lcm.notes["sizes"]
    assert "sizes" not in turbo.notes
    assert [manifest.recipe.stages[0].init.multiple for manifest in (lcm, turbo)] == [2, 1]
    with FewStepPipeline(adopted("lcm")) as model:
        with pytest.raises(BadRequest, match="height is 18; it must be a multiple of 4"):
            model.generate(PROMPT, height=18, width=16)
        assert model.generate(PROMPT, height=20, width=16).images[0].size == (16, 20)
    with FewStepPipeline(adopted("sd-turbo")) as model:
        assert model.generate(PROMPT, height=18, width=16).images[0].size == (16, 18)


def test_a_default_size_that_the_graph_cannot_take_is_refused(tmp_path: Path) -> None:
    """The picture that is drawn unless another is asked for would fail in the engine; the message names the key."""
    folder = copied("lcm", tmp_path)
    configure(folder / "unet" / "config.json", sample_size=7)
    with pytest.raises(BadSource, match=r"multiples of 2.*14 x 14.*sample_size"):
        adopt(folder, tmp_path / "x.bundle")


@pytest.mark.parametrize("name", PIPELINES)
def test_the_proof_is_in_the_manifest(adopted: Adopted, name: str) -> None:
    """Every part has a gate: a row of a batch against the same row alone, on at least one shape."""
    manifest = adopted(name).manifest
    assert [gate.what.partition(":")[0] for gate in manifest.precision.gates] == list(manifest.parts)
    assert all(0 <= gate.value <= gate.limit == 1e-4 for gate in manifest.precision.gates)
    assert "torch" not in manifest.provenance.tools
    assert manifest.provenance.tools.keys() >= {"edgekit", "onnx", "onnx-ir"}
    assert len(manifest.tables) == len(manifest.recipe.stages[0].sampler.legal_steps)


def test_another_default_of_steps_is_taken_if_it_is_legal(tmp_path: Path) -> None:
    """`--steps` as for a torch folder."""
    bundle = adopt(FOLDERS / "sd-turbo", tmp_path / "two.bundle", steps=2)
    assert bundle.manifest.recipe.stages[0].sampler.steps == 2
    with pytest.raises(IllegalSteps, match="1, 2, 3, 4"):
        adopt(FOLDERS / "sd-turbo", tmp_path / "nine.bundle", steps=9)


def test_a_graph_of_one_size_makes_a_bundle_of_that_size(tmp_path: Path) -> None:
    """Fixed height, width and batch are the manifest's too; the recipe knows that no other size can be asked for."""
    folder = copied("sd-turbo", tmp_path)
    edit(folder / "unet" / "model.onnx", fix("sample", 1, None, 8, 8))
    bundle = adopt(folder, tmp_path / "fixed.bundle")
    unet = {spec.name: spec.shape for spec in bundle.manifest.parts["unet"].inputs}
    assert unet["sample"] == (1, 4, 8, 8)
    assert unet["timestep"] == (1,)
    assert bundle.manifest.recipe.stages[0].init.fixed_size
    with FewStepPipeline(bundle) as model:
        pictures = model.generate(PROMPT, seed=SEED, seed_mode="torch-cpu", batch=2)
    assert len(pictures.images) == 2
    right = golden("sd-turbo")["1.latent"]
    assert np.abs(pictures.latents[:1] - right).max() <= LATENT_LIMIT * np.abs(right).max()


def test_a_fixed_size_that_is_not_the_configs_is_refused(tmp_path: Path) -> None:
    """The recipe's default picture would not fit the graph; the message names both sizes and the file to mend."""
    folder = copied("sd-turbo", tmp_path)
    edit(folder / "unet" / "model.onnx", fix("sample", None, None, 6, 6))
    with pytest.raises(BadSource, match=r"6 x 6.*8 x 8.*sample_size.*config\.json"):
        adopt(folder, tmp_path / "x.bundle")


def test_a_fixed_length_of_text_is_the_text_encoders(tmp_path: Path) -> None:
    """A UNet that was exported for 7 text states cannot take the 16 that the encoder gives."""
    folder = copied("sd-turbo", tmp_path)
    edit(folder / "unet" / "model.onnx", fix("encoder_hidden_states", None, 7, None))
    with pytest.raises(BadSource, match=r"7 text states.*16"):
        adopt(folder, tmp_path / "x.bundle")


def test_the_scale_of_the_latents_is_the_configs(tmp_path: Path) -> None:
    """The autoencoder's config lies with its decoder; the recipe is made from it as for a torch folder."""
    folder = copied("sd-turbo", tmp_path)
    configure(folder / "vae_decoder" / "config.json", scaling_factor=0.5)
    bundle = adopt(folder, tmp_path / "x.bundle")
    assert bundle.manifest.recipe.stages[0].decode.scale == 0.5
    assert bundle.manifest.recipe.stages[0].init.scale == 0.5
