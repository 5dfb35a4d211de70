"""One request on its way through a recipe: conditions once, then every stage, row by row."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit import __version__
from edgekit.bundle.recipe import Init, Stage, Table
from edgekit.bundle.store import Bundle
from edgekit.errors import BadManifest, BadRequest
from edgekit.runtime.backends import Array
from edgekit.runtime.diffusion import kernels
from edgekit.runtime.diffusion.guidance import classifier_free, w_embedding
from edgekit.runtime.diffusion.image import from_image, to_images
from edgekit.runtime.diffusion.networks import Meter, Networks
from edgekit.runtime.diffusion.prompts import Prompts
from edgekit.runtime.diffusion.request import Contract, ImageRequest, Settled
from edgekit.runtime.diffusion.result import ImageResult, ImageStats, StepEvent
from edgekit.runtime.diffusion.tables import compile_stage
from edgekit.runtime.random import open_noise

F32 = npt.NDArray[np.float32]
Given = dict[str, Array]  # source -> value, the batch on axis 0
Walk = Iterator[tuple[F32, F32]]  # after each row: the sample, and the estimate of the clean one


class Drawing:
    """Made per request, which is checked in full by then; `events` runs it, once.

    Raises:
        IllegalSteps, BadRequest: the request is outside the contract.
    """

    def __init__(
        self, bundle: Bundle, contract: Contract, prompts: Prompts, networks: Networks, request: ImageRequest
    ) -> None:
        self._bundle, self._contract, self._request = bundle, contract, request
        self._prompts, self._networks = prompts, networks
        self._used = contract.settle(request)
        self._guided = contract.guided(self._used)
        self._table = self._table_of_main() if contract.draws else None
        self._shape = _sample_shape(contract, self._used)
        self._noise = open_noise(self._used.seed_mode, self._used.seed, self._used.first_image)
        self._image = self._read_image()
        self._meter = Meter()
        if request.latents is not None and request.latents.shape != self._shape:
            raise BadRequest(f"latents are {request.latents.shape}; this request needs {self._shape}")

    def events(self) -> Iterator[StepEvent | ImageResult]:
        """A StepEvent per row, then the result. Raises SessionFailed, BadRequest, BadManifest."""
        start = time.perf_counter()
        prompts = self._conditions()
        given = _repeat(prompts, self._used.batch, last=True)
        latents: F32 | None = None
        for stage in self._contract.recipe.stages:
            if self._table is not None and stage is self._contract.main:
                walk, times = self._sample(stage, prompts, given), [row[0] for row in self._table.rows]
                x = latents = yield from _rows(stage.name, walk, times)
            else:
                x = yield from _rows(stage.name, self._direct(stage, given), [0.0])
            picture = self._decode(stage, given, x)
            given["@previous"] = np.clip(picture, -1, 1)
        yield self._result(picture, latents, time.perf_counter() - start)

    def _conditions(self) -> Given:
        """Every source that is the same for all rows; one line per prompt, the negative one first where it counts."""
        texts = (self._used.negative, self._used.prompt) if self._guided else (self._used.prompt,)
        height, width = (side // self._contract.enlarge for side in (self._used.height, self._used.width))
        given: Given = {"@time_ids": np.array([[height, width, 0, 0, height, width]] * len(texts), np.float32)}
        for name in self._contract.tokenizers:
            given[f"@tokens.{name}"] = self._prompts.ids(name, texts)
        if "@tokens.default" in given:
            given["@tokens"] = given["@tokens.default"]
        if self._image is not None:
            given["@image"] = np.repeat(self._image, len(texts), axis=0)
        for call in self._contract.recipe.conditions:
            outputs = self._run(call.part, call.feeds, given)
            if self._guided and self._contract.main.guidance.zero_empty and not self._used.negative:
                for value in outputs.values():
                    value[0] = 0
            given |= {f"{call.part}.{name}": value for name, value in outputs.items()}
        return given

    def _sample(self, stage: Stage, prompts: Given, given: Given) -> Walk:
        """Run the table on the network, guided as the stage says."""
        assert self._table is not None, "main samples only where it has a table"
        net, scale = stage.denoise, self._used.guidance
        rows = _repeat(prompts, self._used.batch) if self._guided else dict(given)
        images = len(next(iter(rows.values())))
        if stage.guidance.kind == "w_embedding":
            rows["@w_embedding"] = np.tile(w_embedding(scale, stage.guidance.dim, stage.guidance.shift), (images, 1))

        def predict(x: F32, t: float) -> F32:
            now = {"@x": np.concatenate([x, x]) if self._guided else x, "@t": np.full(images, t, np.float32)}
            m: F32 = self._run(net.part, net.feeds, {**rows, **now})[net.output][:, : net.keep_channels]
            if not self._guided:
                return m
            negative, positive = np.split(m, 2)
            return classifier_free(negative, positive, scale, stage.guidance.rescale)

        x = self._start(stage.init, self._table, given)
        return kernels.linear(self._table.rows, x, predict, self._row_noise, stage.sampler.clip)

    def _direct(self, stage: Stage, given: Given) -> Walk:
        """One call on the picture so far: the last stage's, or the given one."""
        net = stage.denoise

        def predict(x: F32, t: float) -> F32:
            now = {"@x": x, "@t": np.full(len(x), t, np.float32)}
            return self._run(net.part, net.feeds, {**given, **now})[net.output][:, : net.keep_channels]

        return kernels.direct(given["@previous"] if "@previous" in given else given["@image"], predict)

    def _start(self, init: Init, table: Table, given: Given) -> F32:
        """The sample before the first row: noise, and under it the encoded picture where one was given."""
        noise = self._noise.normal(self._shape, 0) if self._request.latents is None else self._request.latents
        start: F32 = table.init_scale * np.asarray(noise, np.float32)
        if self._used.strength is None or init.encode is None:
            return start
        alone = {source: value[:1] for source, value in given.items()}
        encoded: F32 = next(iter(self._run(init.encode.part, init.encode.feeds, alone).values()))
        if encoded.shape[1:] != self._shape[1:]:
            raise BadManifest(f"the encoder gives {encoded.shape[1:]} per picture; the sample is {self._shape[1:]}")
        clean: F32 = (encoded - init.shift) * init.scale
        return table.init_keep * clean + start

    def _row_noise(self, row: int) -> F32:
        return self._noise.normal(self._shape, 1 + row)

    def _decode(self, stage: Stage, given: Given, x: F32) -> F32:
        if stage.decode is None:
            return x
        latent = x / stage.decode.scale + stage.decode.shift
        return self._run(stage.decode.part, stage.decode.feeds, {**given, "@latent": latent})[stage.decode.output]

    def _run(self, part: str, feeds: Mapping[str, str], given: Given) -> dict[str, Array]:
        return self._networks.run(part, {name: given[source] for name, source in feeds.items()}, self._meter)

    def _table_of_main(self) -> Table:
        main, steps = self._contract.main, self._used.steps
        if self._used.strength is not None:
            return compile_stage(main, steps, self._used.strength)
        return next(t for t in self._bundle.manifest.tables if (t.stage, t.steps) == (main.name, steps))

    def _read_image(self) -> F32 | None:
        """The given picture, (1, 3, height, width) in [-1, 1]; brought to main's size where main draws."""
        if self._request.image is None:
            return None
        width, height = (side // self._contract.enlarge for side in (self._used.width, self._used.height))
        return from_image(self._request.image, (width, height))

    def _result(self, picture: F32, latents: F32 | None, seconds: float) -> ImageResult:
        if picture.shape[2:] != (self._used.height, self._used.width):
            raise BadManifest(
                f"the last stage drew {picture.shape[3]} x {picture.shape[2]} pixels; by the recipe they are "
                f"{self._used.width} x {self._used.height}: check `downscale` and `upscale`"
            )
        meter = self._meter
        stats = ImageStats(seconds, dict(meter.seconds), dict(meter.opening), dict(meter.runs))
        return ImageResult(to_images(picture), latents, stats, self._used, self._source())

    def _source(self) -> dict[str, Any]:
        """What else the picture depends on: the bundle, and arrays too large to write down."""
        manifest = self._bundle.manifest
        source: dict[str, Any] = {
            "edgekit": __version__,
            "bundle": f"sha256:{self._bundle.digest}",
            "model": manifest.provenance.source,
            "sampler": self._contract.main.sampler.kind,
        }
        for name, value in (("given_image", self._image), ("given_latents", self._request.latents)):
            if value is not None:
                source[name] = f"sha256:{hashlib.sha256(np.asarray(value, np.float32).tobytes()).hexdigest()}"
        return source


def _rows(stage: str, walk: Walk, times: list[float]) -> Generator[StepEvent, None, F32]:
    """An event after every row; returns the last sample."""
    clock = time.perf_counter()
    for row, ((x, clean), t) in enumerate(zip(walk, times, strict=True)):
        last = x
        yield StepEvent(stage, row, len(times), t, time.perf_counter() - clock, clean)
        clock = time.perf_counter()
    return last


def _repeat(prompts: Given, batch: int, last: bool = False) -> Given:
    """Every line `batch` times over; with `last`, only the last line, which is the prompt's."""
    return {source: np.repeat(value[-1:] if last else value, batch, axis=0) for source, value in prompts.items()}


def _sample_shape(contract: Contract, used: Settled) -> tuple[int, ...]:
    """(batch, channels, height, width) of main's sample."""
    init, pixels = contract.main.init, contract.main.init.downscale * contract.enlarge
    return used.batch, init.channels, used.height // pixels, used.width // pixels
