"""What a few-step bundle is calibrated and checked on: prompts, seeds, pictures, half of them for each.

How many depends on the size of the denoiser alone, so that the same model gives the same plan on every machine: a small
one is cheap to run and has no other way to average out, a large one is the other way round.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from PIL import Image

from edgekit.bundle.store import Bundle
from edgekit.errors import BadRequest, UsageError
from edgekit.quant.pictures import denoisers
from edgekit.runtime.diffusion.contract import Contract
from edgekit.runtime.diffusion.image import open_image
from edgekit.runtime.diffusion.pipeline import DrawRequest

# by how many words: what a text encoder does to padding is part of what is measured
PROMPTS = (
    "a red fox",
    "a bowl of fruit on a wooden table, morning light from the left",
    "portrait of an old fisherman with a white beard",
    "a lighthouse",
    "a narrow street in the rain at night, neon signs reflected in the puddles, a woman with a yellow umbrella",
    "an astronaut riding a horse",
    "close-up of a bee on a purple flower, shallow depth of field",
    "mountains",
    "a child's drawing of a house, a tree and the sun",
    "black and white photograph of a jazz band in a small club",
    "a steam locomotive crossing a stone bridge over a deep gorge, autumn forest, wide angle",
    "a cup of coffee",
    "isometric view of a tiny workshop, shelves full of tools, a cat asleep on the bench",
    "two sailing boats at sunset",
    "a portrait of a robot in the style of a renaissance painting, oil on canvas, intricate detail",
    "a blue door",
)

# denoisers up to so many parameters: requests, pictures in each, requests that trials are measured on
SIZES = ((50_000_000, 8, 2, 8), (400_000_000, 4, 1, 2))
LARGE = (2, 1, 1)
SMALL_SIDE = 256  # pixels at which a large denoiser's trials are run; what they are compared by is relative
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def picture_requests(
    bundle: Bundle, calibration: Path | None
) -> tuple[tuple[DrawRequest, ...], tuple[DrawRequest, ...]]:
    """Requests to plan on, and others to check the plan on.

    Args:
        bundle: the unquantized bundle.
        calibration: a text file of prompts, one on a line, or a folder of pictures; None takes PROMPTS.

    Raises:
        BadRequest: the task needs what is not given, or there are fewer than two different ones.
    """
    count, batch, _ = _count(bundle)
    prompts, pictures = _given(bundle, calibration)
    side = None if pictures else _side(bundle, count)
    made = []
    for number in range(2 * count):
        picture = pictures[number % len(pictures)] if pictures else None
        prompt = prompts[number % len(prompts)]
        made.append(DrawRequest(prompt=prompt, batch=batch, seed=number, image=picture, width=side, height=side))
    return tuple(made[::2]), tuple(made[1::2])


def digest(requests: tuple[DrawRequest, ...]) -> str:
    """sha256 of prompts, seeds and pictures."""
    found = hashlib.sha256()
    for each in requests:
        found.update(repr((each.prompt, each.seed, each.batch)).encode())
        if each.image is not None:
            found.update(each.image.tobytes())
    return found.hexdigest()


def trial_count(bundle: Bundle) -> int:
    """How many of the requests to plan on the trials of a denoiser's units are measured on."""
    return _count(bundle)[2]


def _count(bundle: Bundle) -> tuple[int, int, int]:
    parameters = sum(bundle.manifest.parts[name].parameters for name in denoisers(bundle))
    return next((counts for most, *counts in SIZES if parameters <= most), LARGE)  # type: ignore[return-value]


def _side(bundle: Bundle, count: int) -> int | None:
    """SMALL_SIDE for large denoisers that draw larger pictures by default and may draw such ones; None elsewhere."""
    assert bundle.manifest.recipe is not None
    contract = Contract.of(bundle.manifest.recipe)
    if count > SIZES[-1][1]:
        return None
    try:
        usual = contract.settle(DrawRequest())
        contract.settle(DrawRequest(width=SMALL_SIDE, height=SMALL_SIDE))
    except UsageError:
        return None
    return SMALL_SIDE if min(usual.width, usual.height) > SMALL_SIDE else None


def deployed(request: DrawRequest) -> DrawRequest:
    """The same request, one picture at the bundle's own size: what time is measured on."""
    return replace(request, batch=1, width=None, height=None)


def _given(bundle: Bundle, calibration: Path | None) -> tuple[tuple[str, ...], tuple[Image.Image, ...]]:
    assert bundle.manifest.recipe is not None
    contract = Contract.of(bundle.manifest.recipe)
    sources = set(contract.sources())
    takes_prompts = bool(contract.tokenizers)
    needs_picture = "@image" in sources or contract.main.init.kind in ("encode", "input")
    if contract.inputs:
        raise BadRequest(
            f"mixed precision is calibrated on prompts or pictures; this model takes {', '.join(contract.inputs)}. "
            "Export it in fp32"
        )
    pictures = _pictures(calibration) if needs_picture else ()
    prompts = _prompts(calibration) if takes_prompts and not needs_picture else PROMPTS
    return (prompts if takes_prompts else ("",)), pictures


def _prompts(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return PROMPTS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as why:
        raise BadRequest(f"--calibration {path}: {why}; give a text file with a prompt on every line") from why
    found = tuple(dict.fromkeys(line.strip() for line in lines if line.strip() and not line.startswith("#")))
    if len(found) < 2:
        raise BadRequest(
            f"--calibration {path} has {len(found)} prompts; half plan and half check, so give two at least"
        )
    return found


def _pictures(path: Path | None) -> tuple[Image.Image, ...]:
    if path is None or not path.is_dir():
        raise BadRequest("this model starts from a picture; give a folder of a few as --calibration")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
    if len(files) < 2:
        raise BadRequest(f"--calibration {path} has {len(files)} pictures; give two at least, of the kind it will see")
    return tuple(open_image(file) for file in files)
