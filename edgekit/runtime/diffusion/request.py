"""What a person asks for, and the few-step contract it is held against before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgekit.bundle.recipe import Recipe, Stage
from edgekit.errors import BadManifest, BadRequest, IllegalSteps
from edgekit.runtime.diffusion.tables import SAMPLERS
from edgekit.runtime.random import NOISE

F32 = npt.NDArray[np.float32]

DEFAULT_STRENGTH = 0.8
LARGEST_SIDE = 65536  # pixels
NO_GUIDANCE = (0.0, 1.0)  # both are said for "off"


@dataclass(frozen=True, eq=False)
class ImageRequest:
    """One call of `generate`; None leaves a choice to the bundle.

    `width` and `height` are those of the finished picture. `latents` replaces the initial unit noise, (batch, channels,
    height, width) of the sample. `first_image` is the batch index of the first image: image k of a batch is
    `batch=1, first_image=k`.
    """

    prompt: str = ""
    negative: str = ""
    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    batch: int = 1
    seed: int = 0
    seed_mode: str = "philox"
    image: Image.Image | None = None
    strength: float | None = None
    latents: F32 | None = None
    first_image: int = 0

    def __post_init__(self) -> None:
        """Refuse what no bundle could honour. Raises BadRequest."""
        if self.seed_mode not in NOISE:
            raise BadRequest(f"no seed mode {self.seed_mode!r}; known: {', '.join(NOISE)}")
        bounds = {"seed": (0, 2**64 - 1), "batch": (1, 2**16), "first_image": (0, 2**31)}
        bounds |= {"width": (1, LARGEST_SIDE), "height": (1, LARGEST_SIDE)}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise BadRequest(f"{name} is {value}; it must be from {low} to {high}")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise BadRequest(f"guidance is {self.guidance}; it must be a finite number")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise BadRequest(f"strength is {self.strength}; it must be above 0 and at most 1")
        if self.latents is not None and not np.isfinite(self.latents).all():
            raise BadRequest("latents hold a value that is not finite")


@dataclass(frozen=True)
class Settled:
    """A request with every choice made: what was really used, and all it takes to draw the picture again."""

    prompt: str
    negative: str
    steps: int
    guidance: float
    width: int
    height: int
    batch: int
    seed: int
    seed_mode: str
    strength: float | None
    first_image: int


@dataclass(frozen=True)
class Contract:
    """What the stages of a recipe allow.

    `main` is the stage that steps, guidance, size and strength are about: the first that draws, or the first of all.
    """

    recipe: Recipe
    main: Stage
    draws: bool  # whether main starts from noise, rather than from a given picture alone
    enlarge: int  # finished pixels per pixel of main's picture

    @classmethod
    def of(cls, recipe: Recipe) -> Contract:
        """Read the contract off a recipe. Raises BadManifest: a stage start the runtime does not define."""
        for number, stage in enumerate(recipe.stages):
            if stage.sampler.kind != "direct" and (number or stage.init.kind != "noise"):
                raise BadManifest(
                    f"stage {stage.name!r}: only the first stage starts from noise and may take steps; later ones are "
                    f"`direct`, not {stage.sampler.kind!r}"
                )
        main = recipe.stages[0]
        draws = main.sampler.kind != "direct"
        return cls(recipe, main, draws, math.prod(s.upscale for s in recipe.stages if s.sampler.kind == "direct"))

    def settle(self, request: ImageRequest) -> Settled:
        """Hold a request against the contract and make every open choice.

        Raises:
            IllegalSteps: a step count the model was not distilled for. BadRequest: any other option out of place.
        """
        self._check_picture(request)
        steps = self._steps(request)
        guidance = self._guidance(request)
        width, height = self._size(request)
        if request.prompt and not self.tokenizers:
            raise BadRequest("this bundle takes no prompt; leave it out")
        starts_from_image = request.image is not None and self.draws and self.main.init.encode is not None
        strength = (request.strength or DEFAULT_STRENGTH) if starts_from_image else None
        return Settled(
            prompt=request.prompt,
            negative=request.negative,
            steps=steps,
            guidance=guidance,
            width=width,
            height=height,
            batch=request.batch,
            seed=request.seed,
            seed_mode=request.seed_mode,
            strength=strength,
            first_image=request.first_image,
        )

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Names of the tokenizers whose ids are fed somewhere."""
        fed = (source.partition(".") for source in self._sources())
        return tuple(dict.fromkeys(name or "default" for kind, _, name in fed if kind == "@tokens"))

    def guided(self, settled: Settled) -> bool:
        """Whether the network also runs on the negative prompt."""
        return self.main.guidance.kind == "cfg" and settled.guidance > 1

    def _sources(self) -> Iterator[str]:
        """Every source something is fed from, image-to-image's encoder left out."""
        for call in self.recipe.conditions:
            yield from call.feeds.values()
        for stage in self.recipe.stages:
            yield from stage.denoise.feeds.values()
            if stage.decode is not None:
                yield from stage.decode.feeds.values()

    def _check_picture(self, request: ImageRequest) -> None:
        if request.latents is not None and not self.draws:
            raise BadRequest("this bundle samples nothing, so there is nothing latents could replace; leave them out")
        needed = "@image" in self._sources()
        optional = self.draws and self.main.init.encode is not None
        if request.image is None:
            if needed:
                raise BadRequest("this bundle starts from a picture; give one (image)")
            if request.strength is not None:
                raise BadRequest("strength says how far to leave a given picture; give one (image) or leave it out")
            return
        if not needed and not optional:
            raise BadRequest("this bundle draws from text alone: it has no encoder for pictures; leave the image out")
        if request.latents is not None:
            raise BadRequest("image and latents both say where to start; give one of them")
        if optional and not SAMPLERS[self.main.sampler.kind].from_image:
            raise BadRequest(f"sampler {self.main.sampler.kind!r} cannot start from a picture; leave the image out")

    def _steps(self, request: ImageRequest) -> int:
        sampler = self.main.sampler
        if request.steps is None:
            return sampler.steps
        if request.steps not in sampler.legal_steps:
            legal = ", ".join(map(str, sorted(sampler.legal_steps)))
            raise IllegalSteps(
                f"steps is {request.steps}; this model was distilled for {legal} (its own choice is {sampler.steps})"
            )
        return request.steps

    def _guidance(self, request: ImageRequest) -> float:
        guidance = self.main.guidance
        if guidance.kind == "none":
            if request.guidance is not None and request.guidance not in NO_GUIDANCE:
                raise BadRequest(f"guidance is {request.guidance}; this model was distilled without it, leave it out")
            if request.negative:
                raise BadRequest("this model was distilled without guidance, so a negative prompt cannot act; drop it")
            return 1.0
        scale = guidance.scale if request.guidance is None else request.guidance
        if not guidance.minimum <= scale <= guidance.maximum:
            raise BadRequest(f"guidance is {scale}; this bundle takes {guidance.minimum} to {guidance.maximum}")
        if request.negative and guidance.kind == "w_embedding":
            raise BadRequest("this model takes the guidance scale as an input and has no negative prompt; drop it")
        if request.negative and scale <= 1:
            raise BadRequest(f"at guidance {scale} a negative prompt has no effect; raise guidance above 1 or drop it")
        return scale

    def _size(self, request: ImageRequest) -> tuple[int, int]:
        if not self.draws:
            return self._size_of_given(request)
        init, unit = self.main.init, self.main.init.downscale * self.enlarge
        own = {"width": init.width * self.enlarge, "height": init.height * self.enlarge}
        if request.image is not None and not init.fixed_size:  # a given picture keeps its size, cut to whole units
            own = {"width": request.image.width, "height": request.image.height}
            own = {name: max(side * self.enlarge // unit * unit, unit) for name, side in own.items()}
        size = []
        for name, default in own.items():
            side = getattr(request, name) or default
            if init.fixed_size and side != default:
                made = f" ({init.width} x {init.height}, enlarged {self.enlarge} times)" if self.enlarge > 1 else ""
                raise BadRequest(
                    f"{name} is {side}; this bundle draws {own['width']} x {own['height']} pixels only{made}"
                )
            if side % unit:
                raise BadRequest(f"{name} is {side}; it must be a multiple of {unit}")
            size.append(side)
        return size[0], size[1]

    def _size_of_given(self, request: ImageRequest) -> tuple[int, int]:
        if request.image is None:
            raise BadRequest("this bundle starts from a picture; give one (image)")
        if request.width is not None or request.height is not None:
            raise BadRequest("this bundle enlarges the picture it is given; leave width and height out")
        init, image = self.main.init, request.image
        if init.fixed_size and image.size != (init.width, init.height):
            raise BadRequest(
                f"the picture is {image.width} x {image.height}; this bundle takes {init.width} x {init.height} only"
            )
        return image.width * self.enlarge, image.height * self.enlarge
