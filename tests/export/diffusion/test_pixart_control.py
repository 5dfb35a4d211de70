"""PixArt's ControlNet-Transformer: the contract and its refusals, the network against its twin, pictures end to end."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from diffusers.models.attention_processor import Attention
from PIL import Image
from safetensors.torch import load_file, save_file

from edgekit.bundle.recipe import Call
from edgekit.errors import BadRequest, BadSource, UnsupportedModel
from edgekit.export.families import PartJob, family_of, pixart
from edgekit.export.families.export import DiffusionOptions, plan_diffusion
from edgekit.export.families.networks_pixart_control import ControlledPixArt, ControlPicture
from edgekit.export.sources import read_source
from edgekit.runtime.diffusion.pipeline import FewStepPipeline
from tests.export.diffusion import tiny_pixart_control as tiny
from tests.export.diffusion.conftest import Exported, export_folder
from tests.export.diffusion.test_conditioned_parity import control
from tests.export.diffusion.test_dit_parity import PROMPT, SEED, assert_same
from tests.export.diffusion.tiny_pipelines import FOREIGN

pytestmark = FOREIGN

HEIGHT, WIDTH, BATCH = 32, 64, 2
WEIGHTS = "controlnet/diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Made:
    """A tiny pipeline, the ControlNet of it, and the folder of both."""

    pipeline: Any
    adapter: tiny.Adapter
    folder: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Made once."""
    pipeline = tiny.pixart()
    adapter = tiny.Adapter(pipeline.transformer)
    return Made(pipeline, adapter, tiny.save(pipeline, adapter, tmp_path_factory.mktemp("pixart") / "controlled"))


@pytest.fixture(scope="module")
def exported(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Its bundle."""
    return export_folder("controlled", made.pipeline, made.folder, tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture(scope="module")
def model(exported: Exported) -> Iterator[FewStepPipeline]:
    """The bundle, open."""
    with FewStepPipeline(exported.bundle) as opened:
        yield opened


def drawn_by(model: FewStepPipeline, **asked: Any) -> tuple[np.ndarray, np.ndarray]:
    """Latents and 8-bit pictures of the torch-free runtime."""
    settings = {"height": HEIGHT, "width": WIDTH, "batch": BATCH, **asked}
    result = model.generate(PROMPT, seed=SEED, seed_mode="torch-cpu", **settings)
    return result.latents, np.stack([np.asarray(image) for image in result.images])


def drawn_in_torch(
    made: Made, steps: int, guidance: float = 1.0, negative: str = "", size: tuple[int, int] = (HEIGHT, WIDTH)
) -> tuple[np.ndarray, np.ndarray]:
    """Latents and 8-bit pictures of the real PixArtAlphaPipeline and LCMScheduler, whatever its transformer is now."""

    def draw(kind: str) -> Any:
        return made.pipeline(
            prompt=PROMPT,
            negative_prompt=negative,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=size[0],
            width=size[1],
            num_images_per_prompt=BATCH,
            generator=torch.Generator("cpu").manual_seed(SEED),
            use_resolution_binning=False,
            clean_caption=False,
            output_type=kind,
        ).images

    return draw("latent").numpy(), np.stack([np.asarray(image) for image in draw("pil")])


@pytest.mark.parametrize(
    ("steps", "guidance", "negative", "scale"), [(1, 1.0, "", 1.0), (4, 1.0, "", 0.5), (2, 2.0, "an old house", 1.5)]
)
def test_a_control_picture_steers_as_the_blocks_run_one_by_one(
    made: Made, model: FewStepPipeline, steps: int, guidance: float, negative: str, scale: float
) -> None:
    """A batch of two, wider than high, at several strengths, guided or not: latents and pictures of the twin inside
    diffusers' own pipeline, which differ from those without control."""
    picture = control(40, 40)
    latent = tiny.latent_of(made.pipeline, picture, HEIGHT, WIDTH)
    with tiny.followed(made.pipeline, made.adapter, latent, scale):
        expected = drawn_in_torch(made, steps, guidance, negative)
    asked = {"steps": steps, "guidance": guidance, "negative": negative}
    assert_same(drawn_by(model, control=picture, control_scale=scale, **asked), expected)
    plain = drawn_in_torch(made, steps, guidance, negative)
    assert np.abs(plain[0] - expected[0]).max() > 0.05 * np.abs(plain[0]).max()


def test_the_strength_is_one_unless_said(made: Made, model: FewStepPipeline) -> None:
    """At another size, higher than wide, with nothing said but the picture."""
    latent = tiny.latent_of(made.pipeline, control(), 48, 24)
    with tiny.followed(made.pipeline, made.adapter, latent, 1.0):
        expected = drawn_in_torch(made, 2, size=(48, 24))
    assert_same(drawn_by(model, steps=2, height=48, width=24, control=control()), expected)


@pytest.mark.parametrize("steps", [1, 4])
def test_without_control_it_is_the_plain_pipeline(made: Made, model: FewStepPipeline, steps: int) -> None:
    """At strength 0, with a picture or with none, what PixArtAlphaPipeline draws that never heard of a ControlNet."""
    expected = drawn_in_torch(made, steps, 2.0)
    with_picture = drawn_by(model, steps=steps, guidance=2.0, control=control(), control_scale=0.0)
    assert_same(with_picture, expected)
    assert_same(drawn_by(model, steps=steps, guidance=2.0, control_scale=0.0), expected)


def test_a_forgotten_picture_is_not_passed_over(model: FewStepPipeline) -> None:
    """No picture and no strength, or one above 0, is refused, and the way to draw without is named."""
    for asked in ({}, {"control_scale": 0.5}):
        with pytest.raises(BadRequest, match=r"needs a control picture; give one .control., or say control_scale 0"):
            drawn_by(model, **asked)


def test_the_picture_is_encoded_once(exported: Exported) -> None:
    """Beside the text, before the first row: one run of the encoder and of what changes the picture's unit, four of the
    transformer."""
    with FewStepPipeline(exported.bundle) as opened:
        result = opened.generate(PROMPT, steps=4, height=HEIGHT, width=WIDTH, control=control())
    once = {"text_encoder": 1, "control_picture": 1, "vae_encoder": 1, "vae_decoder": 1}
    assert result.stats.runs == {**once, "transformer": 4}


def test_the_graph_is_readable_and_holds_every_weight_once(made: Made, exported: Exported) -> None:
    """Every attention of transformer and copies is one node, inputs are named and shaped as the manifest says, and the
    file is no larger than the weights of both folders."""
    part = exported.bundle.manifest.parts["transformer"]
    graph = onnx_ir.load(exported.bundle.graph("transformer")).graph
    operators = Counter(node.op_type for node in graph)
    models = (made.pipeline.transformer, made.adapter)
    assert operators["MultiHeadAttention"] == sum(isinstance(each, Attention) for m in models for each in m.modules())
    assert not operators["Softmax"]
    for value, said in zip([*graph.inputs, *graph.outputs], [*part.inputs, *part.outputs], strict=True):
        assert value.name == said.name
        assert tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape) == said.shape
    weights = sum(weight.numel() for m in models for weight in m.state_dict().values())
    assert part.parameters == weights
    stored = sum(value.const_value.nbytes for value in graph.initializers.values())
    assert 0.95 * 4 * weights < stored < 1.05 * 4 * weights


def contract(folder: Path) -> tuple[Any, dict[str, PartJob]]:
    """Recipe and jobs by part."""
    source = read_source(folder)
    family = family_of(source)
    assert family is pixart.FAMILY
    return family.recipe(source), {job.part: job for job in family.jobs(source)}


@pytest.mark.parametrize("name", pixart.PIPELINES)
def test_the_recipe_feeds_the_control(made: Made, tmp_path: Path, name: str) -> None:
    """Under either pipeline's name: picture, encoder, transformer, each fed from the one before."""
    recipe, jobs = contract(edited(made.folder, tmp_path / "m", "model_index.json", _class_name=name))
    assert recipe.conditions[1:] == (
        Call("control_picture", {"control": "@control"}),
        Call("vae_encoder", {"sample": "control_picture.sample"}),
    )
    feeds = recipe.stages[0].denoise.feeds
    assert (feeds["control_latent"], feeds["control_scale"]) == ("vae_encoder.latent_sample", "@control_scale")
    assert list(feeds) == [spec.name for spec in jobs["transformer"].inputs]
    assert jobs["control_picture"].outputs == jobs["vae_encoder"].inputs


def test_a_folder_without_one_is_as_it_was(made: Made, tmp_path: Path) -> None:
    """No part, no input and no condition more."""
    made.pipeline.save_pretrained(tmp_path / "plain")
    recipe, jobs = contract(tmp_path / "plain")
    assert [call.part for call in recipe.conditions] == ["text_encoder"]
    assert set(jobs) == {"text_encoder", "transformer", "vae_decoder", "vae_encoder"}
    assert not {"control_latent", "control_scale"} & {spec.name for spec in jobs["transformer"].inputs}
    assert (jobs["transformer"].network.partition(":")[2], jobs["transformer"].beside) == ("PixArt", ())


def test_the_plan_counts_the_copies(made: Made, tmp_path: Path) -> None:
    """Parameters and peak memory of the transformer's part are those of both folders."""
    made.pipeline.save_pretrained(tmp_path / "plain")
    copies = sum(weight.numel() for weight in made.adapter.parameters())
    plans = [plan_diffusion(read_source(each), DiffusionOptions()) for each in (made.folder, tmp_path / "plain")]
    sizes = [{part.name: part.parameters for part in plan.parts} for plan in plans]
    assert sizes[0].pop("control_picture") == 0
    assert sizes[0].pop("transformer") == copies + sizes[1].pop("transformer")
    assert sizes[0] == sizes[1]
    assert plans[0].peak_bytes - plans[1].peak_bytes == 4 * copies


def edited(folder: Path, to: Path, file: str, **fields: Any) -> Path:
    """A copy of a folder with fields of one JSON file changed; None takes a field away."""
    shutil.copytree(folder, to)
    config = {**json.loads((to / file).read_text()), **fields}
    (to / file).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return to


REFUSED: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "as many copies as blocks": (
        "controlnet/config.json",
        {"num_layers": 4},
        UnsupportedModel,
        "num_layers is 4;.*1 to 3",
    ),
    "no copies": ("controlnet/config.json", {"num_layers": 0}, UnsupportedModel, "num_layers is 0"),
    "no number of copies": ("controlnet/config.json", {"num_layers": None}, UnsupportedModel, "num_layers is None"),
    "another kind": (
        "model_index.json",
        {"controlnet": ["diffusers", "ControlNetModel"]},
        UnsupportedModel,
        "controlnet is a ControlNetModel; only PixArtControlNetAdapterModel",
    ),
    "none where the pipeline says there is": ("model_index.json", {"controlnet": None}, BadSource, "no controlnet"),
    "both in one folder": (
        "model_index.json",
        {"transformer": ["controlnet_pixart_alpha", "PixArtControlNetTransformerModel"]},
        UnsupportedModel,
        "transformer is a PixArtControlNetTransformerModel",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(made: Made, tmp_path: Path, what: str) -> None:
    """By name and value, from configs alone, in the recipe as in the plan."""
    file, fields, kind, words = REFUSED[what]
    source = read_source(edited(made.folder, tmp_path / "m", file, **fields))
    with pytest.raises(kind, match=words):
        pixart.recipe(source)
    with pytest.raises(kind, match=words):
        plan_diffusion(source, DiffusionOptions())


FIRST = "controlnet_blocks.0.before_proj.weight"
STRICT = {
    "one too few": (lambda weights: weights.pop(FIRST), "1 weights are missing, among them controlnet_blocks.0.before"),
    "one too many": (lambda weights: weights.update(more=torch.ones(1)), "more .1,. is no weight of the ControlNet"),
    "another width": (lambda weights: weights.update({FIRST: torch.ones(24, 8)}), "before_proj.weight .24, 8. is no"),
    "a second layer before": (
        lambda weights: weights.update({FIRST.replace(".0.", ".1."): torch.ones(24, 24)}),
        "controlnet_blocks.1.before_proj.weight",
    ),
}


@pytest.mark.parametrize("what", STRICT)
def test_weights_are_those_the_config_asks_for(made: Made, tmp_path: Path, what: str) -> None:
    """One weight more, less or of another shape is an error that names it."""
    change, words = STRICT[what]
    folder = shutil.copytree(made.folder, tmp_path / "m")
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(BadSource, match=words):
        ControlledPixArt(folder / "transformer")


def inputs(seed: int = 3) -> tuple[torch.Tensor, ...]:
    """Sample, time, text states, mask, pixels, aspect, a control picture's latent as an encoder gives it, strengths."""
    generator = torch.Generator().manual_seed(seed)
    x, latent = (torch.randn(3, 4, 6, 10, generator=generator) for _ in range(2))
    text = torch.randn(3, 120, 32, generator=generator)
    mask = (torch.arange(120) < torch.tensor([[5], [120], [40]])).long()
    size = torch.tensor([[12.0, 20.0]] * 3)
    return (
        x,
        torch.tensor([999.0, 500.0, 1.0]),
        text,
        mask,
        size,
        size[:, :1] / size[:, 1:],
        latent,
        torch.tensor([0, 1.0, 2]),
    )


def by_twin(made: Made, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The twin's prediction for `inputs`."""
    x, time, text, mask, size, aspect, latent, scale = given
    scaled, added = latent * made.pipeline.vae.config.scaling_factor, {"resolution": size, "aspect_ratio": aspect}
    with torch.no_grad():
        return tiny.predict(
            made.pipeline.transformer, made.adapter, x, time, text, mask, added, scaled, scale[:, None, None]
        )


def test_the_network_is_its_twin(made: Made) -> None:
    """Each picture of a batch by its own strength, time and mask, twice in a row; the first, at 0, as the stock
    transformer predicts it."""
    network, given = ControlledPixArt(made.folder / "transformer"), inputs()
    x, time, text, mask, size, aspect = given[:6]
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(network(*given), by_twin(made, given), rtol=1e-5, atol=1e-5)
        added = {"resolution": size, "aspect_ratio": aspect}
        stock = made.pipeline.transformer(
            x, encoder_hidden_states=text, timestep=time, added_cond_kwargs=added, encoder_attention_mask=mask
        ).sample
    ours = by_twin(made, given)
    torch.testing.assert_close(ours[0], stock[0], rtol=1e-5, atol=1e-5)
    assert (ours[1:] - stock[1:]).abs().amax((1, 2, 3)).min() > 0.05 * stock.abs().max()
    assert not any(block._forward_pre_hooks for block in network.inner.transformer_blocks)


def test_a_control_picture_takes_the_encoders_unit(tmp_path: Path) -> None:
    """Black is -1, white 1, as diffusers' image processors have it."""
    picture = torch.from_numpy(np.asarray(Image.new("RGB", (2, 2), (0, 255, 51)), np.float32) / 255).permute(2, 0, 1)
    given = ControlPicture(tmp_path)(picture[None])
    torch.testing.assert_close(given[0, :, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))
