"""Stable Video Diffusion (Blattmann et al. 2023), plain or distilled to a few steps: one picture set in motion.

A StableVideoDiffusionPipeline folder. Its scheduler says which contract: Euler steps on Karras sigmas (SVD, SVD-XT), or
consistency steps, as AnimateLCM-SVD's own scheduler has them (Wang et al. 2024) or as diffusers' class does.
"""

from __future__ import annotations

from typing import Any

from edgekit.bundle.manifest import Dim
from edgekit.bundle.recipe import Call, Decode, Denoise, Grid, Guidance, Init, Media, Recipe, Sampler, Stage
from edgekit.errors import BadSource, UnsupportedModel
from edgekit.export.families import Family, PartJob, PromptTokenizer
from edgekit.export.families.parts import BATCH, HEIGHT, KL_SCALE, WIDTH, component, f32
from edgekit.export.families.schedulers import Config, refuse, scheduler_config
from edgekit.export.sources import Source

NETWORKS = "edgekit.export.families.networks_svd"
EULER, CONSISTENCY = "EulerDiscreteScheduler", "CMStochasticIterativeScheduler"
ANIMATELCM = "AnimateLCMSVDStochasticIterativeScheduler"  # in the authors' code; its config is CONSISTENCY's
# Defaults of StableVideoDiffusionPipeline: size, frames a second, how much motion, noise on the picture.
FULL_WIDTH, FULL_HEIGHT, RATE, MOTION, AUGMENTATION = 1024, 576, 7.0, 127.0, 0.02
EULER_STEPS, CONSISTENCY_STEPS = (4, 6, 8, 10, 15, 20, 25, 30, 50), (1, 2, 4, 8)
CHUNK = 8  # frames that are decoded together, AnimateLCM-SVD's choice: the pipeline takes all, some 90 GB of 25
CLIP_SIDE = 224  # pixels the pipeline shows CLIP
EMBEDS, LATENTS = "image_encoder.image_embeds", "vae_encoder.latent_sample"
PICTURE_SIZES = {"picture_height": (250, 40, 700), "picture_width": (300, 64, 229)}  # larger and smaller than CLIP's
TIME = (-1.6, 1.6)  # ln(sigma) / 4 of sigmas 0.002 to 700


def matches(source: Source) -> bool:
    """A Stable Video Diffusion pipeline with a scheduler of one of three classes."""
    is_svd = source.index.get("_class_name") == "StableVideoDiffusionPipeline"
    return is_svd and source.class_of("scheduler") in (EULER, CONSISTENCY, ANIMATELCM)


def recipe(source: Source) -> Recipe:
    """Twenty-five Euler steps with guidance to 3, or four consistency steps with guidance to 1.2.

    Raises:
        BadSource, UnsupportedModel: a component or a scheduler that is not modelled.
    """
    unet, vae = _unet(source), _autoencoder(source)
    sampler, guidance = _contract(source)
    stage = Stage(
        name="base",
        init=Init(
            channels=unet["out_channels"],
            downscale=_factor(vae),
            width=FULL_WIDTH,
            height=FULL_HEIGHT,
            shape=("frames", unet["out_channels"], "height", "width"),
            frames=int(unet.get("num_frames", 25)),
        ),
        sampler=sampler,
        denoise=Denoise(
            part="unet",
            feeds={
                "sample": "@x",
                "timestep": "@t",
                "image_embeds": EMBEDS,
                "image_latents": LATENTS,
                "added_time_ids": "@const.added_time_ids",
            },
            output="out_sample",
        ),
        guidance=guidance,
        decode=Decode(
            "vae_decoder",
            {"latent_sample": "@latent"},
            "sample",
            scale=float(vae.get("scaling_factor", KL_SCALE)),
            chunk=CHUNK,
        ),
    )
    noised = {"sample": "@image", "noise": "@random.augmentation", "added_time_ids": "@const.added_time_ids"}
    return Recipe(
        stages=(stage,),
        conditions=(Call("image_encoder", {"image": "@original"}), Call("vae_encoder", noised)),
        constants={"added_time_ids": (RATE - 1, MOTION, AUGMENTATION)},  # trained on frames a second less one
        media=Media("video", RATE),
    )


def jobs(source: Source) -> tuple[PartJob, ...]:
    """CLIP's picture tower, the autoencoder's two halves and the UNet. Raises BadSource, UnsupportedModel."""
    return (_clip_job(source), *_vae_jobs(source), _unet_job(source))


def tokenizers(source: Source) -> dict[str, PromptTokenizer]:  # noqa: ARG001 - every family is asked
    """None: a picture is all the model is told."""
    return {}


def _contract(source: Source) -> tuple[Sampler, Guidance]:
    """The sampler, and how far guidance rises from the first frame to the last."""
    config, kind = scheduler_config(source), source.class_of("scheduler")
    euler = kind == EULER
    guidance = Guidance(
        kind="cfg",
        scale=3.0 if euler else 1.2,
        maximum=10.0 if euler else 2.0,
        zero_negative=(EMBEDS, LATENTS),
        ramp="frames",
        start=1.0,
    )
    return (_euler(config) if euler else _consistency(config, authors=kind == ANIMATELCM)), guidance


def _euler(config: Config) -> Sampler:
    """EulerDiscreteScheduler as SVD sets it: v-prediction on Karras sigmas, told ln(sigma) / 4."""
    own = {"use_karras_sigmas": False, "prediction_type": "epsilon", "timestep_type": "discrete"}
    stated = {**own, "timestep_spacing": "linspace", **config}  # the class's own defaults
    plain: dict[str, tuple[Any, ...]] = {
        "use_karras_sigmas": (True,),
        "prediction_type": ("v_prediction",),
        "timestep_type": ("continuous",),
        "timestep_spacing": ("leading",),  # starts a unit of variance above the first sigma
        "final_sigmas_type": ("zero",),
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
    }
    refuse("scheduler", stated, plain)
    low, high = (_given(stated, name) for name in ("sigma_min", "sigma_max"))
    return Sampler(
        kind="euler",
        steps=25,
        legal_steps=EULER_STEPS,
        prediction="v_prediction",
        grid=Grid(spacing="karras", sigma_min=low, sigma_max=high),
    )


def _given(config: Config, name: str) -> float:
    """An end of the sigmas. Raises UnsupportedModel: left to the training schedule."""
    value = config.get(name)
    if value is None:
        raise UnsupportedModel(f"scheduler: {name} is None; only Karras sigmas between given ends are exported")
    return float(value)


def _consistency(config: Config, *, authors: bool) -> Sampler:
    """Consistency steps (Song et al. 2023) on every (points // steps)-th of the sigmas the model was distilled on.

    `authors` is AnimateLCM-SVD's scheduler: SVD's own denoiser without a boundary at sigma_min, told ln(sigma) / 4, and
    renoised by the whole of the next sigma. diffusers' class has the boundary, EDM's sign, and 1000 times that time.
    """
    refuse("scheduler", config, {"s_noise": (1.0,)})
    least, points = float(config.get("sigma_min", 0.002)), int(config.get("num_train_timesteps", 40))
    return Sampler(
        kind="edm_consistency",
        steps=4,
        legal_steps=tuple(steps for steps in CONSISTENCY_STEPS if steps <= points),
        prediction="v_prediction" if authors else "epsilon",
        grid=Grid(
            spacing="karras",
            original=points,
            sigma_min=least,
            sigma_max=float(config.get("sigma_max", 80.0)),
            rho=float(config.get("rho", 7.0)),
        ),
        sigma_data=float(config.get("sigma_data", 0.5)),
        sigma_min=0.0 if authors else least,
        time_scale=1.0 if authors else 1000.0,
        clip=1.0 if config.get("clip_denoised", True) else None,
    )


def _unet(source: Source) -> dict[str, Any]:
    """The UNet's config, if frames are joined with one picture's latents, three ids and CLIP's embedding."""
    config = component(source, "unet", ("UNetSpatioTemporalConditionModel",))
    channels = int(_autoencoder(source).get("latent_channels", 4))
    refuse("unet", config, {"in_channels": (2 * channels,), "out_channels": (channels,)})
    ids = 3 * int(config.get("addition_time_embed_dim", 256))
    refuse("unet", config, {"projection_class_embeddings_input_dim": (ids,)})
    width = _clip(source)["projection_dim"]
    refuse("unet", config, {"cross_attention_dim": (width, (width,) * len(config["block_out_channels"]))})
    return config


def _autoencoder(source: Source) -> dict[str, Any]:
    config = component(source, "vae", ("AutoencoderKLTemporalDecoder",))
    refuse("vae", config, {"in_channels": (3,), "out_channels": (3,)})
    return config


def _clip(source: Source) -> dict[str, Any]:
    """CLIP's config. Raises BadSource: nothing says how its pictures are normalised."""
    config = component(source, "image_encoder", ("CLIPVisionModelWithProjection",))
    refuse("image_encoder", config, {"image_size": (CLIP_SIDE,), "num_channels": (3,)})
    normal = source.config("feature_extractor", "preprocessor_config.json")
    for name in ("image_mean", "image_std"):
        if not isinstance(normal.get(name), list):
            raise BadSource(f"{source.root}/feature_extractor/preprocessor_config.json has no {name}; save it anew")
    return {"projection_dim": 512, **config}


def _factor(vae: dict[str, Any]) -> int:
    """Picture pixels per latent pixel."""
    return int(2 ** (len(vae["block_out_channels"]) - 1))


def _clip_job(source: Source) -> PartJob:
    return PartJob(
        part="image_encoder",
        network=f"{NETWORKS}:ImageEncoder",
        folder="image_encoder",
        inputs=(f32("image", "batch", 3, "picture_height", "picture_width"),),
        outputs=(f32("image_embeds", "batch", _clip(source)["projection_dim"]),),
        sizes={"batch": BATCH, **PICTURE_SIZES},
    )


def _vae_jobs(source: Source) -> tuple[PartJob, PartJob]:
    vae = _autoencoder(source)
    channels, factor = int(vae.get("latent_channels", 4)), _factor(vae)
    small = {"height": HEIGHT[1:], "width": WIDTH[1:]}
    sizes = {"batch": BATCH[:2], **small} | {f"image_{axis}": tuple(factor * n for n in small[axis]) for axis in small}
    picture: tuple[Dim, ...] = ("batch", 3, "image_height", "image_width")
    encoder = PartJob(
        part="vae_encoder",
        network=f"{NETWORKS}:NoisedEncoder",
        folder="vae",
        inputs=(f32("sample", *picture), f32("noise", *picture), f32("added_time_ids", "batch", 3)),
        outputs=(f32("latent_sample", "batch", channels, "height", "width"),),
        sizes=sizes,
        weights=("encoder.", "quant_conv."),
    )
    decoder = PartJob(
        part="vae_decoder",
        network=f"{NETWORKS}:FramesDecoder",
        folder="vae",
        inputs=(f32("latent_sample", "batch", "frames", channels, "height", "width"),),
        outputs=(f32("sample", "batch", "frames", 3, "image_height", "image_width"),),
        sizes={**sizes, "frames": (3, 1)},
        weights=("decoder.",),
    )
    return encoder, decoder


def _unet_job(source: Source) -> PartJob:
    channels = _unet(source)["out_channels"]
    frames: tuple[Dim, ...] = ("batch", "frames", channels, "height", "width")
    return PartJob(
        part="unet",
        network=f"{NETWORKS}:FramesUNet",
        folder="unet",
        inputs=(
            f32("sample", *frames),
            f32("timestep", "batch"),
            f32("image_embeds", "batch", _clip(source)["projection_dim"]),
            f32("image_latents", "batch", channels, "height", "width"),
            f32("added_time_ids", "batch", 3),
        ),
        outputs=(f32("out_sample", *frames),),
        sizes={"batch": BATCH, "frames": (3, 4, 2), "height": HEIGHT, "width": WIDTH},
        fill={"timestep": TIME, "added_time_ids": (0.0, 127.0)},
    )


FAMILY = Family("svd", "image-to-video", matches, recipe, jobs, tokenizers)
