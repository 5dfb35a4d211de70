"""A second, small decoder of the same latents (TAESD and its kin): for previews, and for decoding on small devices.

TAESD, TAESDXL, TAESD3 and TAEF1 are AutoencoderTiny folders. Each is trained on what its denoiser makes, so that the
sample goes in as it is, unless the folder's own `scaling_factor` or `shift_factor` says otherwise; the large
autoencoder's scale and shift have no part in it.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgekit.bundle.recipe import Recipe
from edgekit.errors import BadSource, UnsupportedModel
from edgekit.export.families import PartJob
from edgekit.export.families.parts import Autoencoder
from edgekit.export.sources import Source, read_json

FOLDERS = ("vae_tiny", "tiny_vae", "taesd")  # looked for in the model folder, in this order
PART = "tiny_decoder"
PICTURE_CHANNELS = 3


def tiny_folder(source: Source) -> Path | None:
    """The small autoencoder that lies in a model folder, if any."""
    for name in FOLDERS:
        if (source.root / name / "config.json").is_file():
            return source.root / name
    return None


def with_tiny_decoder(recipe: Recipe, jobs: tuple[PartJob, ...], folder: Path) -> tuple[Recipe, tuple[PartJob, ...]]:
    """Add a small decoder to what a family made: a part of its own, and the recipe's preview of the last picture.

    Args:
        recipe: whose last decoding stage is given the preview.
        jobs: the parts of that recipe.
        folder: of an AutoencoderTiny, inside the model folder or anywhere else.

    Raises:
        BadSource: no AutoencoderTiny folder, or one with other latents than the model's decoder.
        UnsupportedModel: nothing is decoded, or not picture by picture from latents.
    """
    tiny = _read(folder)
    stages = [number for number, stage in enumerate(recipe.stages) if stage.decode is not None]
    if not stages:
        raise UnsupportedModel("this model decodes nothing, so a small decoder has no place; leave it out")
    stage = recipe.stages[stages[-1]]
    assert stage.decode is not None
    (large,) = (job for job in jobs if job.part == stage.decode.part)
    _check_fit(folder, tiny, large)
    preview = msgspec.structs.replace(tiny.decode(PART), per_frame=stage.decode.per_frame)
    changed = msgspec.structs.replace(stage, decode=msgspec.structs.replace(stage.decode, preview=preview))
    kept = (*recipe.stages[: stages[-1]], changed, *recipe.stages[stages[-1] + 1 :])
    # absolute, so that the model folder it is joined to does not matter
    return msgspec.structs.replace(recipe, stages=kept), (*jobs, tiny.decoder_job(str(folder.resolve()), PART))


def _read(folder: Path) -> Autoencoder:
    config = read_json(folder / "config.json")
    kind = config.get("_class_name")
    if kind != "AutoencoderTiny":
        raise BadSource(f"{folder} holds a {kind}; a small decoder is an AutoencoderTiny folder (TAESD)")
    return Autoencoder.of(str(kind), config, str(folder))


def _check_fit(folder: Path, tiny: Autoencoder, large: PartJob) -> None:
    """Both take the same sample and give pictures of the same size."""
    latent, picture = large.inputs[0], large.outputs[0]
    pictures = len(latent.shape) == len(picture.shape) == 4 and picture.shape[1] == PICTURE_CHANNELS
    if len(large.inputs) != 1 or not pictures:
        raise UnsupportedModel(f"{large.part} does not decode single pictures from latents, as a small decoder does")
    factor = large.shape(picture, 0)[2] // large.shape(latent, 0)[2]
    if (tiny.channels, tiny.factor) != (latent.shape[1], factor):
        raise BadSource(
            f"{folder} decodes {tiny.channels} channels to {tiny.factor} times their size, {large.part} "
            f"{latent.shape[1]} channels to {factor} times; was it made for another model?"
        )
