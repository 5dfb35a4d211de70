"""Image prompts (IP-Adapter, Ye et al. 2023, arXiv 2308.06721): a picture that a Stable Diffusion UNet is told of.

CLIP sees the reference picture once, as the part `image_encoder`. The adapter's file goes into the UNet's graph: its
projection of the embedding to a few tokens, and a second key and value for every layer that attends to the text.
The projection is there and not in the encoder's graph because guidance tells the negative half an embedding of zeros,
which its bias and norm turn into tokens that are not zero.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edgekit.bundle.recipe import Call, Recipe, Stage
from edgekit.errors import BadSource, UnsupportedModel
from edgekit.export.families import PartJob
from edgekit.export.families.parts import BATCH, NETWORKS, component, f32
from edgekit.export.families.schedulers import refuse
from edgekit.export.families.weights import PICKLED, shapes
from edgekit.export.headers import read_header
from edgekit.export.sources import Source, read_json

TORCH_SIDE = "edgekit.export.families.networks_ip"
ENCODER = "image_encoder"
ENCODER_CLASS = "CLIPVisionModelWithProjection"
EMBEDS = f"{ENCODER}.image_embeds"

PROJECTION = ("image_proj.proj.weight", "image_proj.proj.bias", "image_proj.norm.weight", "image_proj.norm.bias")
LAYER = re.compile(r"ip_adapter\.(\d+)\.to_([kv])_ip\.weight")
OTHER_KINDS = {  # a weight that no other kind has -> what it is called
    "image_proj.latents": "IP-Adapter-Plus",
    "image_proj.proj.3.weight": "IP-Adapter-FullFace",
    "image_proj.perceiver_resampler.proj_in.weight": "IP-Adapter-FaceID-Plus",
    "image_proj.proj.0.weight": "IP-Adapter-FaceID",
}
BLOCKS = ("down_blocks", "up_blocks", "mid_block")  # as UNet2DConditionModel holds them, which numbers its layers
CROSS = re.compile(r"((?:down_blocks|up_blocks|mid_block)\..*\.attn2)\.to_k\.weight")
SHOWN = 3  # keys an error names

# What CLIP's pictures are normalised by: the mean and spread of its training set's colours (Radford et al. 2021).
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Adapter:
    """What the header of an adapter's file says.

    `embedding` is the width of the picture's embedding, `layers` are the shapes of the keys' weights, in the order of
    their numbers; the values' are alike.
    """

    path: Path
    embedding: int
    layers: tuple[tuple[int, ...], ...]


def read_adapter(path: Path) -> Adapter:
    """The plain IP-Adapter in a safetensors file, from its header alone.

    Raises:
        BadSource: pickled weights, no safetensors file, or weights that are no adapter's.
        UnsupportedModel: another kind of adapter, by name.
    """
    if path.suffix in PICKLED:
        raise BadSource(
            f"{path} holds pickled weights, which can run code when opened; take the *.safetensors file of this adapter"
        )
    entries = read_header(path).entries
    other = next((kind for key, kind in OTHER_KINDS.items() if key in entries), None)
    if other is not None:
        raise UnsupportedModel(
            f"{path} is an {other}; only the plain IP-Adapter is exported (image_proj.proj and image_proj.norm)"
        )
    strange = [key for key in entries if key not in PROJECTION and not LAYER.fullmatch(key)]
    if strange or not set(PROJECTION) <= set(entries):
        held = f"holds {', '.join(strange[:SHOWN])}" if strange else "lacks image_proj.proj or image_proj.norm"
        raise BadSource(f"{path} {held}; an IP-Adapter has image_proj.* and ip_adapter.N.to_k_ip, to_v_ip")
    (rows, embedding), (width,) = entries[PROJECTION[0]].shape, entries[PROJECTION[2]].shape
    numbers = sorted({int(found[1]) for key in entries if (found := LAYER.fullmatch(key))})
    names = [f"ip_adapter.{number}.to_{each}_ip.weight" for number in numbers for each in "kv"]
    found_shapes = [entries[name].shape for name in names if name in entries]
    numbered = numbers == [2 * n + 1 for n in range(len(numbers))] and len(found_shapes) == len(names)
    if not numbered or rows % width or found_shapes[::2] != found_shapes[1::2]:
        raise BadSource(f"{path}: its layers are not numbered 1, 3, 5... with a key and a value each; is it whole?")
    return Adapter(path, embedding, tuple(found_shapes[::2]))


def cross_attentions(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every layer of a UNet that attends to the text, and the shape of its key's weight, in the adapters' order.

    Raises:
        BadSource: no weights there.
    """

    def place(name: str) -> tuple[int, list[int]]:
        first, *rest = name.split(".")
        return BLOCKS.index(first), [int(part) for part in rest if part.isdigit()]

    found = {match[1]: shape for name, shape in shapes(folder).items() if (match := CROSS.fullmatch(name))}
    return {name: found[name] for name in sorted(found, key=place)}


def with_image_prompt(
    source: Source, recipe: Recipe, jobs: tuple[PartJob, ...], path: Path
) -> tuple[Recipe, tuple[PartJob, ...]]:
    """Add an adapter to what a family made: the part that sees the picture, and two inputs more of the UNet.

    Args:
        source: the model folder. Its own image encoder is taken where it has one, as diffusers does it, else the folder
            `image_encoder` beside the adapter.
        recipe, jobs: what the family made.
        path: the adapter's safetensors file.

    Raises:
        BadSource, UnsupportedModel: no plain adapter, one of another UNet or encoder, no encoder, or no UNet.
    """
    adapter = read_adapter(path)
    if not any(job.network == f"{NETWORKS}:UNet" for job in jobs):
        raise UnsupportedModel(
            f"an IP-Adapter goes into Stable Diffusion's UNet, and this model's parts are another's: "
            f"{', '.join(job.part for job in jobs)}"
        )
    wanted = tuple(cross_attentions(source.root / "unet").values())
    if adapter.layers != wanted:
        raise UnsupportedModel(
            f"{path} was made for another UNet: it has {_said(adapter.layers)}, the folder's unet {_said(wanted)}"
        )
    prompted = tuple(_told(job, adapter) if job.network == f"{NETWORKS}:UNet" else job for job in jobs)
    stages = tuple(_fed(stage) for stage in recipe.stages)
    conditions = (*recipe.conditions, Call(ENCODER, {"image": "@reference"}))
    changed: Recipe = msgspec.structs.replace(recipe, stages=stages, conditions=conditions)
    return changed, (_encoder_job(source, adapter), *prompted)


def _said(layers: tuple[tuple[int, ...], ...]) -> str:
    widths = sorted({shape[-1] for shape in layers})
    return f"{len(layers)} layers on states {', '.join(map(str, widths)) or 'of no width'} wide"


def _told(job: PartJob, adapter: Adapter) -> PartJob:
    """The UNet's job with the adapter in its graph."""
    more = (f32("image_embeds", "batch", adapter.embedding), f32("ip_scale", "batch"))
    told: PartJob = msgspec.structs.replace(
        job,
        network=f"{TORCH_SIDE}:PromptedUNet",
        inputs=(*job.inputs, *more),
        fill={**job.fill, "ip_scale": (0.5, 1.5)},
        adapter=str(adapter.path.resolve()),
    )
    return told


def _fed(stage: Stage) -> Stage:
    """A stage whose UNet is told of the picture; the negative half is told an embedding of zeros, as in diffusers."""
    if stage.denoise.part != "unet":
        return stage
    feeds = {**stage.denoise.feeds, "image_embeds": EMBEDS, "ip_scale": "@reference_scale"}
    guidance = stage.guidance
    if guidance.kind == "cfg":
        guidance = msgspec.structs.replace(guidance, zero_negative=(*guidance.zero_negative, EMBEDS))
    denoise = msgspec.structs.replace(stage.denoise, feeds=feeds)
    fed: Stage = msgspec.structs.replace(stage, denoise=denoise, guidance=guidance)
    return fed


def _encoder_job(source: Source, adapter: Adapter) -> PartJob:
    """CLIP's picture tower: (batch, 3, side, side) in [0, 1] to its projected embedding."""
    folder, config = _encoder(source, adapter)
    if config["projection_dim"] != adapter.embedding:
        raise UnsupportedModel(
            f"{adapter.path} reads embeddings {adapter.embedding} wide, the image encoder in {source.root / folder} "
            f"gives {config['projection_dim']}; take the encoder that the adapter was trained with"
        )
    refuse(ENCODER, config, {"num_channels": (3,)})
    side = int(config["image_size"])
    if source.class_of("feature_extractor"):
        _check_extractor(source.config("feature_extractor", "preprocessor_config.json"), side)
    return PartJob(
        part=ENCODER,
        network=f"{TORCH_SIDE}:PromptPicture",
        folder=folder,
        inputs=(f32("image", "batch", 3, side, side),),
        outputs=(f32("image_embeds", "batch", adapter.embedding),),
        sizes={"batch": BATCH[:2]},
        fill={"image": (0.0, 1.0)},
    )


def _encoder(source: Source, adapter: Adapter) -> tuple[str, dict[str, Any]]:
    """The encoder's folder, and its config with what transformers leaves out of one."""
    defaults = {"projection_dim": 512, "image_size": 224, "num_channels": 3}
    if source.class_of(ENCODER):
        return ENCODER, {**defaults, **component(source, ENCODER, (ENCODER_CLASS,))}
    beside = adapter.path.resolve().parent / ENCODER
    if not beside.is_dir():
        raise BadSource(
            f"{source.root} has no {ENCODER}, and none lies beside {adapter.path}; put the adapter's {ENCODER} folder "
            f"({ENCODER_CLASS}) there"
        )
    config = read_json(beside / "config.json")
    if ENCODER_CLASS not in (config.get("architectures") or []):
        raise UnsupportedModel(f"{beside} holds {config.get('architectures')}; only {ENCODER_CLASS} is exported")
    return str(beside), {**defaults, **config}


def _check_extractor(config: dict[str, Any], side: int) -> None:
    """Refuse pictures prepared otherwise than by CLIP: cubic to the shorter side, the middle square, its colours."""
    stated = dict(config)
    for name in ("size", "crop_size"):  # a number, or what newer versions write for it
        given = stated.get(name, side)
        same = {"shortest_edge": side}, {"height": side, "width": side}
        stated[name] = side if given in same else given
    plain: dict[str, tuple[Any, ...]] = {
        **{f"do_{step}": (True,) for step in ("resize", "center_crop", "rescale", "normalize")},
        "size": (side,),
        "crop_size": (side,),
        "resample": (3,),
        "rescale_factor": (1 / 255,),
        "image_mean": (CLIP_MEAN,),
        "image_std": (CLIP_STD,),
    }
    refuse("feature_extractor", stated, plain)
