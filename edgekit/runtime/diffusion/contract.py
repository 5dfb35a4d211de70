"""The few-step contract of a recipe, which every request is held against before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from edgekit.bundle.recipe import Decode, Recipe, Retrieve, Stage
from edgekit.errors import BadManifest, BadRequest, IllegalSteps
from edgekit.runtime.diffusion.request import DrawRequest, Settled
from edgekit.runtime.diffusion.tables import SAMPLERS

DEFAULT_STRENGTH = 0.8
NO_GUIDANCE = (0.0, 1.0)  # both are said for "off"
PICTURE_STARTS = ("encode", "input")


@dataclass(frozen=True)
class Contract:
    """What the stages of a recipe allow.

    `main` is the stage that steps, size and strength are about: the first that samples, or the first of all. `guide` is
    the one the guidance scale is about: the last that is guided, or main.
    """

    recipe: Recipe
    main: Stage
    guide: Stage
    draws: bool  # whether main samples, rather than answering in one direct call
    enlarge: int  # finished pixels per pixel of main's picture

    @classmethod
    def of(cls, recipe: Recipe) -> Contract:
        """Read the contract off a recipe. Raises BadManifest: a stage start the runtime does not define."""
        for number, stage in enumerate(recipe.stages):
            if number == 0 and stage.init.kind == "previous":
                raise BadManifest(f"stage {stage.name!r} is the first and starts from what came before it")
        sampling = [stage for stage in recipe.stages if stage.sampler.kind != "direct"]
        main = sampling[0] if sampling else recipe.stages[0]
        guided = [stage for stage in recipe.stages if stage.guidance.kind != "none"]
        after = recipe.stages[recipe.stages.index(main) :]
        enlarge = math.prod(stage.upscale for stage in after if stage.sampler.kind == "direct")
        for stage in after[1:]:
            enlarge *= stage.init.resize.factor if stage.init.resize is not None else 1
        return cls(recipe, main, guided[-1] if guided else main, bool(sampling), enlarge)

    def settle(self, request: DrawRequest) -> Settled:
        """Hold a request against the contract and make every open choice.

        Raises:
            IllegalSteps: a step count the model was not distilled for. BadRequest: any other option out of place.
        """
        self._check_picture(request)
        self._check_extras(request)
        steps = self._steps(request)
        guidance = self._guidance(request)
        width, height = self._size(request)
        if request.prompt and not self.tokenizers:
            raise BadRequest("this bundle takes no prompt; leave it out")
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
            strength=self._strength(request),
            first_image=request.first_image,
            frames=self._frames(request),
            seconds=self._seconds(request),
            control_scale=_scale_of(request.control, request.control_scale),
            reference_scale=_scale_of(request.reference, request.reference_scale),
            inpaint=request.mask is not None,
            tiny=request.tiny,
            tile=request.tile,
        )

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Names of the tokenizers whose ids or masks are fed somewhere."""
        fed = (source.partition(".") for source in self.sources())
        return tuple(dict.fromkeys(name or "default" for kind, _, name in fed if kind in ("@tokens", "@mask")))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the arrays the caller has to give."""
        fed = (source.partition(".") for source in self.sources())
        return tuple(dict.fromkeys(name for kind, _, name in fed if kind == "@input"))

    def guided(self, settled: Settled) -> bool:
        """Whether the network also runs on, or is also told, the negative prompt."""
        guidance = self.guide.guidance
        if guidance.kind == "cfg":
            return max(settled.guidance, guidance.start if guidance.ramp != "none" else 0) > 1
        return guidance.kind == "concat_tokens"

    def sources(self) -> Iterator[str]:
        """Every source something is fed from, image-to-image's encoder left out."""
        for call in self.recipe.conditions:
            yield from call.feeds.values()
        if self.recipe.select is not None:
            yield from self.recipe.select.feeds.values()
        for stage in self.recipe.stages:
            yield from _sources_of(stage)

    @property
    def blends(self) -> bool:
        """Whether in-painting puts the known part back in every row, the network knowing nothing of a mask."""
        return "@inpaint_mask" not in self.sources() and self.optional_picture

    @property
    def optional_picture(self) -> bool:
        """Whether main may, but need not, start from a picture."""
        return self.draws and self.main.init.kind == "noise" and self.main.init.encode is not None

    @property
    def is_seen(self) -> bool:
        """Whether what decoders give are pictures; a spectrogram is not counted in pixels, tiled or shown."""
        return self.recipe.media.kind != "audio"

    @property
    def needs_picture(self) -> bool:
        """Whether nothing can be drawn without a picture."""
        return bool({"@image", "@original", "@masked_image"} & set(self.sources())) or (
            self.main.init.kind in PICTURE_STARTS and self.main.init.mean is None
        )

    def _check_picture(self, request: DrawRequest) -> None:
        if request.latents is not None and not self.draws:
            raise BadRequest("this bundle samples nothing, so there is nothing latents could replace; leave them out")
        if request.image is None:
            if self.needs_picture:
                raise BadRequest("this bundle starts from a picture; give one (image)")
            if request.strength is not None:
                raise BadRequest("strength says how far to leave a given picture; give one (image) or leave it out")
            if request.mask is not None:
                raise BadRequest("a mask says where to paint a given picture; give one (image) or leave it out")
            return
        if not self.needs_picture and not self.optional_picture:
            raise BadRequest("this bundle draws from text alone: it has no encoder for pictures; leave the image out")
        if request.latents is not None and not self.needs_picture:
            raise BadRequest("image and latents both say where to start; give one of them")
        bound = bool(self.main.denoise.carry) or any(isinstance(hook, Retrieve) for hook in self.recipe.hooks)
        if self.optional_picture and bound:
            raise BadRequest("this bundle's rows build on those before them, so none can be skipped; drop the image")
        if self.optional_picture and not SAMPLERS[self.main.sampler.kind].from_image:
            raise BadRequest(f"sampler {self.main.sampler.kind!r} cannot start from a picture; leave the image out")

    def _check_extras(self, request: DrawRequest) -> None:
        """Masks, control pictures, arrays and the small decoder: there where they are fed, and only there."""
        fed = set(self.sources())
        if request.mask is None and "@inpaint_mask" in fed:
            raise BadRequest("this bundle paints inside a mask; give one (mask)")
        if request.mask is not None and "@inpaint_mask" not in fed and not self.blends:
            raise BadRequest(
                "this bundle cannot paint inside a mask: it has no encoder for pictures; leave the mask out"
            )
        for name in ("control", "reference"):
            _check_followed(name, fed, getattr(request, name), getattr(request, f"{name}_scale"))
        missing, extra = set(self.inputs) - set(request.inputs), set(request.inputs) - set(self.inputs)
        if missing or extra:
            names = ", ".join(sorted(self.inputs)) or "none"
            raise BadRequest(f"inputs are {', '.join(sorted(request.inputs)) or 'none'}; this bundle takes {names}")
        for name, value in request.inputs.items():
            if value.ndim < 1 or len(value) not in (1, request.batch):
                raise BadRequest(
                    f"input {name!r} has shape {value.shape}; axis 0 must be 1 or the batch {request.batch}"
                )
        if request.tiny and self._small_decoder() is None:
            raise BadRequest("this bundle has no small decoder; leave `tiny` out")
        if request.tile is not None and not any(stage.decode for stage in self.recipe.stages):
            raise BadRequest("this bundle decodes nothing, so there is nothing to tile; leave `tile` out")
        if request.tile is not None and not self.is_seen:
            raise BadRequest("this bundle makes sound, which is not drawn in tiles; leave `tile` out")

    def _small_decoder(self) -> Decode | None:
        decoders = [stage.decode for stage in self.recipe.stages if stage.decode is not None]
        return decoders[-1].preview if decoders else None

    def _strength(self, request: DrawRequest) -> float | None:
        if request.image is None or not self.optional_picture:
            return None
        if request.mask is not None:
            return request.strength or 1.0
        native = bool({"@image", "@masked_image"} & set(self.sources()))
        return request.strength if native else request.strength or DEFAULT_STRENGTH

    def _frames(self, request: DrawRequest) -> int | None:
        has = "frames" in self.main.init.shape
        if request.frames is not None and not has:
            raise BadRequest("this bundle draws no video; leave `frames` out")
        if not has:
            return None
        frames = request.frames or self.main.init.frames
        if self.main.init.fixed_size and frames != self.main.init.frames:
            raise BadRequest(f"frames is {frames}; this bundle draws {self.main.init.frames} only")
        return frames

    def _seconds(self, request: DrawRequest) -> float | None:
        if self.recipe.media.kind != "audio":
            if request.seconds is not None:
                raise BadRequest("this bundle makes no sound; leave `seconds` out")
            return None
        own = self.main.init.length * self.main.init.downscale / self.recipe.media.rate
        if request.seconds is not None and self.main.init.fixed_size and request.seconds > own:
            raise BadRequest(f"seconds is {request.seconds}; this bundle makes at most {own:.3g}")
        return request.seconds or own

    def _steps(self, request: DrawRequest) -> int:
        sampler = self.main.sampler
        if request.steps is None:
            return sampler.steps
        if request.steps not in sampler.legal_steps:
            legal = ", ".join(map(str, sorted(sampler.legal_steps)))
            raise IllegalSteps(
                f"steps is {request.steps}; this model was distilled for {legal} (its own choice is {sampler.steps})"
            )
        return request.steps

    def _guidance(self, request: DrawRequest) -> float:
        guidance = self.guide.guidance
        if guidance.kind == "none":
            if request.guidance is not None and request.guidance not in NO_GUIDANCE:
                raise BadRequest(f"guidance is {request.guidance}; this model was distilled without it, leave it out")
            if request.negative:
                raise BadRequest("this model was distilled without guidance, so a negative prompt cannot act; drop it")
            return 1.0
        scale = guidance.scale if request.guidance is None else request.guidance
        if not guidance.minimum <= scale <= guidance.maximum:
            raise BadRequest(f"guidance is {scale}; this bundle takes {guidance.minimum} to {guidance.maximum}")
        if guidance.kind == "concat_tokens":
            return scale
        if request.negative and guidance.kind != "cfg":
            raise BadRequest("this model takes the guidance scale as an input and has no negative prompt; drop it")
        if request.negative and scale <= 1:
            raise BadRequest(f"at guidance {scale} a negative prompt has no effect; raise guidance above 1 or drop it")
        return scale

    def _size(self, request: DrawRequest) -> tuple[int, int]:
        init = self.main.init
        if not self.draws or init.kind in PICTURE_STARTS:
            return self._size_of_given(request)
        unit = init.downscale * init.multiple * self.enlarge
        own = {"width": init.width * self.enlarge, "height": init.height * self.enlarge}
        if init.shape and not {"width", "height"} & set(init.shape):
            if request.width is not None or request.height is not None:
                raise BadRequest("this bundle draws no picture; leave width and height out")
            return own["width"], own["height"]
        keeps = not init.fixed_size and "frames" not in init.shape  # a video is drawn at the size it was trained at
        if request.image is not None and keeps:  # a given picture keeps its size, cut to whole units
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

    def _size_of_given(self, request: DrawRequest) -> tuple[int, int]:
        init, image = self.main.init, request.image
        if request.width is not None or request.height is not None:
            raise BadRequest("this bundle draws at the size of what it is given; leave width and height out")
        if image is None:
            return init.width * self.enlarge, init.height * self.enlarge
        if init.fixed_size and image.size != (init.width, init.height):
            raise BadRequest(
                f"the picture is {image.width} x {image.height}; this bundle takes {init.width} x {init.height} only"
            )
        factor = self.enlarge * (init.resize.factor if init.resize is not None else 1)
        return image.width * factor, image.height * factor


def _check_followed(name: str, fed: set[str], picture: Image.Image | None, scale: float | None) -> None:
    """A picture to follow (`control`, `reference`) and its scale: there where they are fed, and only there."""
    if picture is None and f"@{name}" in fed and scale != 0:
        without = f", or say {name}_scale 0 to draw without" if f"@{name}_scale" in fed else ""
        raise BadRequest(f"this bundle needs a {name} picture; give one ({name}){without}")
    if picture is not None and f"@{name}" not in fed:
        raise BadRequest(f"this bundle takes no {name} picture; drop it ({name})")
    if scale is not None and f"@{name}_scale" not in fed:
        raise BadRequest(f"this bundle takes no {name} picture, so {name}_scale cannot act; drop it")


def _scale_of(picture: Image.Image | None, scale: float | None) -> float | None:
    """All of it is followed, unless something else is said."""
    return 1.0 if picture is not None and scale is None else scale


def _sources_of(stage: Stage) -> Iterator[str]:
    """Every source of one stage, its encoder left out."""
    calls = [*stage.denoise.before, stage.denoise, *(each for each in (stage.decode, stage.accept) if each is not None)]
    for call in calls:
        yield from call.feeds.values()
    for source in (stage.denoise.fixed, stage.init.mean, stage.init.chol):
        if source is not None:
            yield source
    if stage.init.kind == "encode" and stage.init.encode is not None:
        yield from stage.init.encode.feeds.values()
