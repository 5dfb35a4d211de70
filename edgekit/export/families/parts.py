"""The graphs that latent-diffusion pipelines share, as PartJobs read from component configs: CLIP text, autoencoders.

Any family may use these beside a denoiser of its own. Names of inputs and outputs are those of diffusers' ONNX exports
(`input_ids`, `sample`, `latent_sample`). Axes: `batch`; `height`, `width` of the latent; `image_height`, `image_width`
of the picture; `length` of the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgekit.bundle.manifest import Dim, TensorSpec
from edgekit.bundle.recipe import Call, Decode, Init
from edgekit.errors import BadSource, UnsupportedModel
from edgekit.export.families import PartJob
from edgekit.export.families.schedulers import refuse
from edgekit.export.sources import Source

NETWORKS = "edgekit.export.families.networks"
TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
KL_SCALE, TINY_SCALE = 0.18215, 1.0  # diffusers' defaults of scaling_factor

# One size per probe; the first is traced. An odd latent makes diffusers' UNet resize by the sizes of its skip tensors,
# so that the graph answers for every size and not just for multiples of 2 ** (number of downsamplings).
BATCH = (2, 1, 2)
HEIGHT, WIDTH = (9, 8, 5), (13, 8, 10)
LENGTH = (7, 77, 77)
TIME = (0.0, 999.0)


def f32(name: str, *shape: Dim) -> TensorSpec:
    """A float32 tensor of a graph's signature."""
    return TensorSpec(name, "float32", shape)


def component(source: Source, name: str, classes: tuple[str, ...]) -> dict[str, Any]:
    """The config of a component whose class is one of `classes`.

    Raises:
        BadSource: the folder has no such component. UnsupportedModel: it is of another class.
    """
    kind = source.class_of(name)
    if kind is None:
        raise BadSource(f"{source.root}/model_index.json names no {name}; an export needs one")
    if kind not in classes:
        raise UnsupportedModel(f"{name} is a {kind}; only {' or '.join(classes)} is exported")
    return source.config(name)


def text_encoders(source: Source) -> tuple[str, ...]:
    """Names of the pipeline's text encoders: one, or SDXL's two."""
    return ("text_encoder", "text_encoder_2") if source.class_of("text_encoder_2") else ("text_encoder",)


def text_jobs(source: Source) -> tuple[PartJob, ...]:
    """Every text encoder: `input_ids` int64 (batch, length of its positions) -> hidden states, and SDXL's pooled text.

    Stable Diffusion takes the last hidden state; SDXL the penultimate of both, and the second's projected pooled one.

    Raises:
        BadSource, UnsupportedModel: another class of encoder, or one that needs an attention mask.
    """
    if len(text_encoders(source)) == 1:
        return (clip_job(source, "text_encoder", "LastHidden"),)
    first = clip_job(source, "text_encoder", "Penultimate")
    return (first, clip_job(source, "text_encoder_2", "PenultimateAndPooled"))


def clip_job(source: Source, name: str, network: str) -> PartJob:
    """One CLIP text encoder: `input_ids` int64 (batch, its number of positions) to what `network` gives.

    Args:
        source: the model folder.
        name: the component, which the part is named after.
        network: in edgekit.export.families.networks: `LastHidden` (`last_hidden_state`), `Penultimate`
            (`hidden_states`), `PenultimateAndPooled` (also `text_embeds`, projected) or `Pooled` (`pooler_output`).

    Raises:
        BadSource, UnsupportedModel: another class of encoder, or one that needs an attention mask.
    """
    config = component(source, name, TEXT_ENCODERS)
    refuse(name, config, {"use_attention_mask": (False, None)})
    length, hidden = config["max_position_embeddings"], config["hidden_size"]
    outputs: dict[str, tuple[TensorSpec, ...]] = {
        "LastHidden": (f32("last_hidden_state", "batch", length, hidden),),
        "Penultimate": (f32("hidden_states", "batch", length, hidden),),
        "Pooled": (f32("pooler_output", "batch", hidden),),
    }
    if network == "PenultimateAndPooled":
        outputs[network] = (*outputs["Penultimate"], f32("text_embeds", "batch", projection(source, name)))
    return PartJob(
        part=name,
        network=f"{NETWORKS}:{network}",
        folder=name,
        inputs=(TensorSpec("input_ids", "int64", ("batch", length)),),
        outputs=outputs[network],
        sizes={"batch": BATCH[:2]},
        fill={"input_ids": (0, config["vocab_size"])},
        lora=name,
    )


def projection(source: Source, name: str) -> int:
    """Width of a CLIP text encoder's projected pooled text. Raises BadSource, UnsupportedModel."""
    return int(component(source, name, ("CLIPTextModelWithProjection",))["projection_dim"])


@dataclass(frozen=True)
class Autoencoder:
    """What a recipe needs to know of an AutoencoderKL or AutoencoderTiny.

    A denoiser's sample is (z - shift) * scale of the autoencoder's latents z. The two of one model differ in both: a
    tiny autoencoder is trained on the sample itself, so its scale is 1 and its shift 0 unless its config says otherwise
    (`latent_magnitude` and `latent_shift` are about storing latents as bytes and touch nothing here).
    """

    kind: str
    channels: int
    factor: int  # picture pixels per latent pixel
    scale: float
    shift: float

    @classmethod
    def of(cls, kind: str, config: dict[str, Any], where: str = "vae") -> Autoencoder:
        """Read a config. Raises UnsupportedModel: another class, or more than a scale and shift before the denoiser."""
        if kind not in AUTOENCODERS:
            raise UnsupportedModel(f"{where} is a {kind}; only {' or '.join(AUTOENCODERS)} is exported")
        tiny = kind == "AutoencoderTiny"
        refuse(where, config, {"latents_mean": (None,), "latents_std": (None,), "upsampling_scaling_factor": (2,)})
        blocks = config["decoder_block_out_channels"] if tiny else config["block_out_channels"]
        return cls(
            kind=kind,
            channels=int(config.get("latent_channels", 4)),
            factor=int(2 ** (len(blocks) - 1)),
            scale=float(config.get("scaling_factor", TINY_SCALE if tiny else KL_SCALE)),
            shift=float(config.get("shift_factor") or 0.0),
        )

    def decode(self, part: str = "vae_decoder") -> Decode:
        """The recipe's step from sample to picture."""
        return Decode(part, {"latent_sample": "@latent"}, "sample", scale=self.scale, shift=self.shift)

    def init(self, height: int, width: int) -> Init:
        """A start from noise, of pictures of `height` by `width` pixels unless asked, or from an encoded picture."""
        return Init(
            channels=self.channels,
            downscale=self.factor,
            height=height,
            width=width,
            encode=Call("vae_encoder", {"sample": "@image"}),
            scale=self.scale,
            shift=self.shift,
        )

    def decoder_job(self, folder: str, part: str = "vae_decoder") -> PartJob:
        """`latent_sample` (batch, channels, height, width) to `sample`, a picture in [-1, 1], unscaled."""
        network = "TinyDecoder" if self.kind == "AutoencoderTiny" else "Decoder"
        latent, image = self._signature()
        return PartJob(
            part=part,
            network=f"{NETWORKS}:{network}",
            folder=folder,
            inputs=(latent,),
            outputs=(image,),
            sizes=self._sizes(),
            weights=("decoder.", "post_quant_conv."),
        )

    def encoder_job(self, folder: str, part: str = "vae_encoder") -> PartJob:
        """`sample`, a picture in [-1, 1], to `latent_sample`: the distribution's mean, so that it is always alike."""
        network = "TinyEncoder" if self.kind == "AutoencoderTiny" else "MeanEncoder"
        latent, image = self._signature()
        return PartJob(
            part=part,
            network=f"{NETWORKS}:{network}",
            folder=folder,
            inputs=(image,),
            outputs=(latent,),
            sizes=self._sizes(),
            weights=("encoder.", "quant_conv."),
        )

    def _signature(self) -> tuple[TensorSpec, TensorSpec]:
        latent = f32("latent_sample", "batch", self.channels, "height", "width")
        return latent, f32("sample", "batch", 3, "image_height", "image_width")

    def _sizes(self) -> dict[str, tuple[int, ...]]:
        small = {"height": HEIGHT[1:], "width": WIDTH[1:]}
        pixels = {f"image_{axis}": tuple(self.factor * size for size in sizes) for axis, sizes in small.items()}
        return {"batch": BATCH[:2], **small, **pixels}


def autoencoder(source: Source, channels: int | None = None) -> Autoencoder:
    """The pipeline's `vae`.

    Args:
        source: the model folder.
        channels: what the denoiser's sample has, to be held against the autoencoder's; None does not ask.

    Raises:
        BadSource, UnsupportedModel: none, or one these graphs cannot have.
    """
    found = Autoencoder.of(source.class_of("vae") or "", vae_config(source))
    if channels is not None and found.channels != channels:
        raise UnsupportedModel(f"the vae has {found.channels} latent channels, the denoiser {channels}")
    return found


def vae_config(source: Source) -> dict[str, Any]:
    """The autoencoder's config, if only a scale and shift part its latents from the sample. Raises UnsupportedModel."""
    config = component(source, "vae", AUTOENCODERS)
    refuse("vae", config, {"latents_mean": (None,), "latents_std": (None,)})
    return config


def downscale(source: Source) -> int:
    """Picture pixels per latent pixel."""
    return autoencoder(source).factor


def vae_jobs(source: Source, channels: int | None = None) -> tuple[PartJob, PartJob]:
    """Decoder and encoder, without the scale and shift between latents and sample: the recipe has those.

    Raises:
        BadSource, UnsupportedModel: a component these graphs cannot have, or with other channels than `channels`.
    """
    vae = autoencoder(source, channels)
    return vae.decoder_job("vae"), vae.encoder_job("vae")


def sides(sample_size: int | list[int]) -> tuple[int, int]:
    """Height and width of a config's `sample_size`, a number where they are equal."""
    if isinstance(sample_size, int):
        return sample_size, sample_size
    height, width = sample_size
    return height, width
