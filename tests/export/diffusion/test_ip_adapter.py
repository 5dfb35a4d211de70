"""Image prompts: an IP-Adapter in a Stable Diffusion UNet, against diffusers with the same adapter loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from PIL import Image

from edgekit.bundle.recipe import Call
from edgekit.errors import BadRequest, BadSource, UnsupportedModel
from edgekit.export.families import family_of
from edgekit.export.families.export import DiffusionOptions, plan_diffusion
from edgekit.export.families.ip_adapter import EMBEDS, cross_attentions
from edgekit.export.families.networks import UNet
from edgekit.export.families.networks_ip import PromptedUNet
from edgekit.export.lora import fold
from edgekit.export.parity import probe
from edgekit.export.sources import read_source
from tests.export.diffusion import tiny_ip as tiny
from tests.export.diffusion.conftest import Exported, export_folder
from tests.export.diffusion.test_diffusers_parity import PROMPT, SEED, assert_same, in_bundle, in_torch
from tests.export.diffusion.test_lora_command import write_lora
from tests.export.diffusion.tiny_conditioned import CONDITIONED
from tests.export.diffusion.tiny_dits import pixart
from tests.export.diffusion.tiny_pipelines import FOREIGN, unet
from tests.export.diffusion.tiny_svd import image_encoder

pytestmark = FOREIGN

SIZE = {"height": 16, "width": 24}  # pixels
ETA = {"ip-sd": {}, "ip-sdxl": {"eta": 0.3}}  # the pipelines' own defaults are other than the schedulers'


@dataclass(frozen=True)
class Saved:
    """A pipeline without an adapter, its folder, and the adapter's file; beside it an image encoder, for ip-sd."""

    pipeline: Any
    folder: Path
    adapter: Path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """Every pipeline of tiny_ip, by name."""
    made = {}
    for name, build in tiny.PROMPTED.items():
        root, pipeline = tmp_path_factory.mktemp(name), build()
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(root / "folder")
        made[name] = Saved(pipeline, root / "folder", tiny.save_adapter(pipeline.unet, root / "adapter"))
    image_encoder().save_pretrained(made["ip-sd"].adapter.parent / "image_encoder")
    return made


@pytest.fixture(scope="module")
def prompted(saved: dict[str, Saved], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """`prompted(name)`: a bundle with the adapter in it, and the pipeline into which diffusers loaded the same one."""
    kept: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in kept:
            from_file, pipeline = saved[name].adapter, tiny.PROMPTED[name]()
            words = {part: made for part, made in saved[name].pipeline.components.items() if "tokenizer" in part}
            pipeline.register_modules(**words)  # two trainings of one vocabulary may break ties differently
            pipeline.set_progress_bar_config(disable=True)
            pipeline.load_ip_adapter(str(from_file.parent), subfolder="", weight_name=tiny.FILE, local_files_only=True)
            target = tmp_path_factory.mktemp("bundle") / "b"
            kept[name] = export_folder(name, pipeline, saved[name].folder, target, ip_adapter=str(from_file))
        return kept[name]

    return get


@pytest.mark.parametrize(
    ("steps", "guidance", "scale", "batch"), [(1, 0.0, 1.0, 1), (4, 0.0, 0.6, 2), (1, 2.0, 0.6, 1), (4, 2.0, 1.0, 2)]
)
@pytest.mark.parametrize("name", tiny.PROMPTED)
def test_a_reference_picture_acts_as_in_diffusers(
    prompted: Callable[[str], Exported], name: str, steps: int, guidance: float, scale: float, batch: int
) -> None:
    """Unguided, and guided against a negative prompt, for which the embedding is zeros: latents and pictures are those
    of diffusers, change with the picture, and are others without it."""
    example = prompted(name)
    ours: dict[str, Any] = {"guidance": guidance, "negative": "an old house"} if guidance else {}
    theirs = {"guidance_scale": guidance, "negative_prompt": ours.get("negative"), **ETA[name], **SIZE}
    example.pipeline.set_ip_adapter_scale(scale)
    picture = tiny.reference()
    expected = in_torch(example, steps, ip_adapter_image=picture, num_images_per_prompt=batch, **theirs)
    asked = {"batch": batch, **ours, **SIZE}
    given = in_bundle(example, steps, reference=picture, reference_scale=scale, **asked)
    assert_same(given, expected)
    another = in_bundle(example, steps, reference=tiny.reference(seed=8), reference_scale=scale, **asked)
    without = in_bundle(example, steps, reference_scale=0.0, **asked)
    for other, least in ((another, 0.003), (without, 0.03)):
        assert np.abs(given[0] - other[0]).max() > least * np.abs(given[0]).max()


@pytest.mark.parametrize("name", tiny.PROMPTED)
def test_at_scale_0_it_is_the_plain_pipeline(
    prompted: Callable[[str], Exported], saved: dict[str, Saved], name: str
) -> None:
    """With a picture or without: what the pipeline draws that never heard of an adapter."""
    example, plain = prompted(name), saved[name]
    expected = in_torch(
        Exported(name, plain.pipeline, plain.folder, example.bundle, ()), 4, guidance_scale=2.0, **ETA[name], **SIZE
    )
    for given in ({}, {"reference": tiny.reference()}):
        assert_same(in_bundle(example, 4, guidance=2.0, reference_scale=0.0, **given, **SIZE), expected)


def test_a_forgotten_picture_is_not_passed_over(prompted: Callable[[str], Exported]) -> None:
    """No picture and no scale, or one above 0, is refused, and the way to draw without is named."""
    for asked in ({}, {"reference_scale": 0.6}):
        with pytest.raises(BadRequest, match="or say reference_scale 0 to draw without"):
            in_bundle(prompted("ip-sd"), 1, **asked)


def edgekit(*arguments: object) -> str:
    """What the command prints."""
    command = [sys.executable, "-m", "edgekit.cli", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_command_line_takes_adapter_and_picture(
    prompted: Callable[[str], Exported], saved: dict[str, Saved], tmp_path: Path
) -> None:
    """`export --ip-adapter` plans the encoder; `run --reference` draws what the API draws."""
    made = saved["ip-sd"]
    told = edgekit("export", made.folder, "-o", tmp_path / "b", "--ip-adapter", made.adapter, "--dry-run", "--json")
    assert json.loads(told)["plan"]["parts"][0]["name"] == "image_encoder"
    picture, drawn = tmp_path / "picture.png", tmp_path / "drawn.png"
    tiny.reference().save(picture)
    asked = ("-p", PROMPT, "--seed", SEED, "--seed-mode", "torch-cpu", "--steps", 2, "-o", drawn)
    edgekit("run", prompted("ip-sd").bundle.root, *asked, "--reference", picture, "--reference-scale", 0.6)
    (expected,) = in_bundle(prompted("ip-sd"), 2, reference=tiny.reference(), reference_scale=0.6)[1]
    assert np.array_equal(np.asarray(Image.open(drawn)), expected)


@pytest.mark.parametrize("name", tiny.PROMPTED)
def test_the_graphs_are_readable(prompted: Callable[[str], Exported], name: str) -> None:
    """The UNet's last inputs are the embedding and the scale, and it has one attention node a layer and one more where
    a layer attends to the picture; the notes name the adapter, and the encoder where it came with it."""
    example = prompted(name)
    manifest, graph = example.bundle.manifest, onnx_ir.load(example.bundle.graph("unet")).graph
    assert [value.name for value in graph.inputs][-2:] == ["image_embeds", "ip_scale"]
    layers = [each for each in example.pipeline.unet.modules() if isinstance(each, Attention)]
    seeing = [each for each in layers if isinstance(each.processor, IPAdapterAttnProcessor2_0)]
    operators = Counter(node.op_type for node in graph)
    assert operators["MultiHeadAttention"] == len(layers) + len(seeing) > len(layers) > 0
    assert not operators["Softmax"]
    assert manifest.parts["image_encoder"].inputs[0].shape == ("batch", 3, 224, 224)
    assert manifest.notes["ip_adapter"].startswith(f"{tiny.FILE} sha256:")
    assert ("image_encoder" in manifest.notes) == (name == "ip-sd")
    assert "left_out" not in manifest.notes
    assert manifest.parts["unet"].parameters == sum(weight.numel() for weight in example.pipeline.unet.parameters())


def test_the_recipe_feeds_the_picture(prompted: Callable[[str], Exported]) -> None:
    """One condition more, whose output and scale the UNet is fed, and zeros for a negative prompt."""
    recipe = prompted("ip-sd").bundle.manifest.recipe
    assert recipe is not None
    assert recipe.conditions[-1] == Call("image_encoder", {"image": "@reference"})
    (stage,) = recipe.stages
    assert (stage.denoise.feeds["image_embeds"], stage.denoise.feeds["ip_scale"]) == (EMBEDS, "@reference_scale")
    assert stage.guidance.zero_negative == (EMBEDS,)


def test_layers_are_numbered_as_diffusers_numbers_them(tmp_path: Path) -> None:
    """Down, up, middle, in a UNet deep enough to need more than ten of a kind."""
    model = unet(transformer_layers_per_block=(1, 12))
    model.save_pretrained(tmp_path / "unet")
    theirs = [name.removesuffix(".processor") for name in model.attn_processors if name.endswith("attn2.processor")]
    assert list(cross_attentions(tmp_path / "unet")) == theirs
    assert len(theirs) > 24


def test_a_lora_is_folded_beneath_an_adapter(saved: dict[str, Saved], tmp_path: Path) -> None:
    """It changes the UNet's own projections and no weight of the adapter."""
    made = saved["ip-sd"]
    write_lora(made.pipeline, tmp_path / "lora.safetensors")
    network = PromptedUNet(made.folder / "unet", made.adapter)
    before = {name: weight.clone() for name, weight in network.named_parameters()}
    fold(network.inner, "unet", tmp_path / "lora.safetensors", 1.0)
    changed = {name for name, weight in network.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if name.endswith("to_q.weight")}


@pytest.mark.parametrize("name", ["control-sd", "control-sdxl", "inpaint-sd"])
def test_it_goes_beside_a_controlnet_and_into_an_inpainting_unet(tmp_path: Path, name: str) -> None:
    """Its inputs come after residuals, mask and masked latents; at scale 0 the answer is the UNet's without it, and
    another at 1."""
    pipeline = CONDITIONED[name]()
    pipeline.save_pretrained(tmp_path / "m")
    adapter = tiny.save_adapter(pipeline.unet, tmp_path / "adapter")
    image_encoder().save_pretrained(tmp_path / "adapter" / "image_encoder")
    (job,) = (part for part in planned(tmp_path / "m", adapter).parts if part.name == "unet")
    assert [spec.name for spec in job.inputs[-2:]] == ["image_embeds", "ip_scale"]
    source = read_source(tmp_path / "m")
    (plain,) = (each for each in family_of(source).jobs(source) if each.part == "unet")
    feeds = [torch.from_numpy(value) for value in probe(plain, 0).values()]
    own, network = UNet(tmp_path / "m" / "unet"), PromptedUNet(tmp_path / "m" / "unet", adapter)
    with torch.no_grad():
        expected = own(*feeds)
        without, with_it = (network(*feeds, torch.ones(2, tiny.EMBEDDING), torch.full((2,), s)) for s in (0.0, 1.0))
    torch.testing.assert_close(without, expected, rtol=1e-5, atol=1e-5)
    assert (with_it - expected).abs().max() > 0.01 * expected.abs().max()


def planned(folder: Path, adapter: Path) -> Any:
    """What an export with an adapter would make."""
    return plan_diffusion(read_source(folder), DiffusionOptions(ip_adapter=str(adapter)))


def test_without_an_adapter_an_image_encoder_is_left_out(saved: dict[str, Saved]) -> None:
    """As it always was; with one, it and the feature extractor are taken, and the plan counts the adapter's weights."""
    made = saved["ip-sdxl"]
    plain, more = plan_diffusion(read_source(made.folder), DiffusionOptions()), planned(made.folder, made.adapter)
    assert [note.split()[0] for note in plain.notes] == ["image_encoder", "feature_extractor"]
    assert not more.notes
    assert [part.name for part in more.parts] == ["image_encoder", *(part.name for part in plain.parts)]
    weights = sum(weight.numel() for weight in tiny.weights(made.pipeline.unet).values())
    counts = {part.name: part.parameters for part in more.parts}
    assert counts["unet"] == weights + {part.name: part.parameters for part in plain.parts}["unet"]


def test_the_folders_own_encoder_is_taken_first(saved: dict[str, Saved], tmp_path: Path) -> None:
    """As in diffusers: one beside the adapter's file is for folders that have none, and is not even read."""
    adapter = tiny.save_adapter(saved["ip-sdxl"].pipeline.unet, tmp_path)
    (tmp_path / "image_encoder").mkdir()
    assert planned(saved["ip-sdxl"].folder, adapter).parts[0].name == "image_encoder"


WEIGHT = torch.ones(1)
REFUSED_FILES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "Plus": ({"image_proj__latents": WEIGHT}, UnsupportedModel, "is an IP-Adapter-Plus; only the plain"),
    "FullFace": ({"image_proj__proj__3__weight": WEIGHT}, UnsupportedModel, "IP-Adapter-FullFace"),
    "FaceID": ({"image_proj__proj__0__weight": WEIGHT}, UnsupportedModel, "IP-Adapter-FaceID;"),
    "FaceID-Plus": (
        {"image_proj__perceiver_resampler__proj_in__weight": WEIGHT},
        UnsupportedModel,
        "IP-Adapter-FaceID-Plus",
    ),
    "another thing": ({"lora_unet_x": WEIGHT}, BadSource, "holds lora_unet_x"),
    "no projection": ({"image_proj__norm__bias": None}, BadSource, "lacks image_proj"),
    "half a layer": ({"ip_adapter__1__to_v_ip__weight": None}, BadSource, "a key and a value each"),
    "a layer left out": (
        {"ip_adapter__1__to_v_ip__weight": None, "ip_adapter__1__to_k_ip__weight": None},
        BadSource,
        "numbered 1, 3, 5",
    ),
    "a bent value": ({"ip_adapter__1__to_v_ip__weight": torch.ones(2, 2)}, BadSource, "a key and a value each"),
    "another encoder": ({"image_proj__proj__weight": torch.ones(128, 48)}, UnsupportedModel, "48 wide.*gives 32"),
}


@pytest.mark.parametrize("what", REFUSED_FILES)
def test_a_file_of_another_kind_is_refused(saved: dict[str, Saved], tmp_path: Path, what: str) -> None:
    """By the name of what it is or the weight that is wrong, from its header alone."""
    changes, error, words = REFUSED_FILES[what]
    adapter = tiny.save_adapter(saved["ip-sd"].pipeline.unet, tmp_path, **changes)
    shutil.copytree(saved["ip-sd"].adapter.parent / "image_encoder", tmp_path / "image_encoder")
    with pytest.raises(error, match=words):
        planned(saved["ip-sd"].folder, adapter)


def test_pickled_weights_are_not_opened(saved: dict[str, Saved], tmp_path: Path) -> None:
    """The error says why, and what to take instead."""
    (tmp_path / "ip-adapter_sd15.bin").write_bytes(b"\x80\x02")
    with pytest.raises(BadSource, match=r"can run code when opened; take the .*safetensors"):
        planned(saved["ip-sd"].folder, tmp_path / "ip-adapter_sd15.bin")


def test_an_adapter_of_another_unet_is_refused(saved: dict[str, Saved]) -> None:
    """SDXL's in a Stable Diffusion folder, with the widths of both."""
    with pytest.raises(UnsupportedModel, match=r"another UNet: .* states 56 wide, .* states 32 wide"):
        planned(saved["ip-sd"].folder, saved["ip-sdxl"].adapter)


def test_a_model_without_such_a_unet_is_refused(saved: dict[str, Saved], tmp_path: Path) -> None:
    """A diffusion transformer."""
    pixart().save_pretrained(tmp_path / "pixart")
    with pytest.raises(UnsupportedModel, match="goes into Stable Diffusion's UNet"):
        planned(tmp_path / "pixart", saved["ip-sd"].adapter)


def test_no_encoder_or_another_is_refused(saved: dict[str, Saved], tmp_path: Path) -> None:
    """Neither in the folder nor beside the file; or a tower without a projection."""
    adapter = tiny.save_adapter(saved["ip-sd"].pipeline.unet, tmp_path)
    with pytest.raises(BadSource, match="none lies beside"):
        planned(saved["ip-sd"].folder, adapter)
    (tmp_path / "image_encoder").mkdir()
    (tmp_path / "image_encoder" / "config.json").write_text('{"architectures": ["CLIPVisionModel"]}')
    with pytest.raises(UnsupportedModel, match="only CLIPVisionModelWithProjection"):
        planned(saved["ip-sd"].folder, adapter)


@pytest.mark.parametrize(
    ("field", "value", "refused"),
    [
        ("crop_size", 224, False),
        ("size", 224, False),
        ("crop_size", {"height": 336, "width": 336}, True),
        ("size", {"height": 224, "width": 224}, False),
        ("do_center_crop", False, True),
        ("resample", 2, True),
        ("image_mean", [0.5, 0.5, 0.5], True),
    ],
)
def test_pictures_are_prepared_as_clip_does_it(
    saved: dict[str, Saved], tmp_path: Path, field: str, value: Any, refused: bool
) -> None:
    """A feature extractor that says otherwise is refused by the field; older spellings of CLIP's are taken."""
    made, folder = saved["ip-sdxl"], shutil.copytree(saved["ip-sdxl"].folder, tmp_path / "m")
    config = folder / "feature_extractor" / "preprocessor_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), field: value}))
    if refused:
        with pytest.raises(UnsupportedModel, match=f"feature_extractor: {field}"):
            planned(folder, made.adapter)
    else:
        assert planned(folder, made.adapter).parts[0].name == "image_encoder"
