"""One request on its way through a recipe: conditions once, then every stage, row by row."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit import __version__
from edgekit.bundle.recipe import TABLE_FREE, Call, NoiseSchedule, Rank, Retrieve, Stage, Table, TimeShift
from edgekit.bundle.store import Bundle
from edgekit.errors import BadRequest
from edgekit.runtime.backends import Array
from edgekit.runtime.diffusion import discrete, hooks, kernels
from edgekit.runtime.diffusion.contract import Contract
from edgekit.runtime.diffusion.finish import decoded, frames_axis, small_decoder
from edgekit.runtime.diffusion.given import put_given, put_reference, sample_shape
from edgekit.runtime.diffusion.kernels import Step
from edgekit.runtime.diffusion.networks import Meter, Networks
from edgekit.runtime.diffusion.predict import Predictor, once
from edgekit.runtime.diffusion.prompts import Prompts
from edgekit.runtime.diffusion.request import DrawRequest
from edgekit.runtime.diffusion.result import DrawResult, DrawStats, StepEvent, presented
from edgekit.runtime.diffusion.sources import IMAGE, LINE, Sources
from edgekit.runtime.diffusion.starts import Started, blend, hold, start
from edgekit.runtime.diffusion.tables import compile_stage, noise_levels
from edgekit.runtime.random import open_noise

F32 = npt.NDArray[np.float32]

STAGE_DRAWS = 1 << 16  # draws set aside for each stage, so that two stages never share noise
RANDOM_DRAWS = 1 << 24  # where the draws of @random sources begin
CONDITION_DRAWS = 1 << 31  # and those of the ones that conditions are fed


class Drawing:
    """Made per request, which is checked in full by then; `events` runs it, once.

    Raises:
        IllegalSteps, BadRequest: the request is outside the contract.
    """

    def __init__(
        self, bundle: Bundle, contract: Contract, prompts: Prompts, networks: Networks, request: DrawRequest
    ) -> None:
        self._bundle, self._contract, self._request = bundle, contract, request
        self._prompts, self._networks = prompts, networks
        self._used = contract.settle(request)
        self._noise = open_noise(self._used.seed_mode, self._used.seed, self._used.first_image)
        self._guided = contract.guided(self._used)
        self._sources = Sources(1 + self._guided, self._used.batch, contract.guide.guidance.zero_negative)
        self._meter = Meter()
        self._steps = self._used.steps
        put_given(self._sources, contract, request, self._used)
        if contract.draws:
            self._table(contract.main)  # refuses a strength that leaves nothing to do
        self._check_latents()

    def events(self) -> Iterator[StepEvent | DrawResult]:
        """A StepEvent per row, then the result. Raises SessionFailed, BadRequest, BadManifest."""
        begin = time.perf_counter()
        self._conditions()
        self._select()
        latents: Array | None = None
        x: Array = np.zeros(0)
        for number, stage in enumerate(self._contract.recipe.stages):
            for event in self._run_stage(number, stage):
                x = event.x
                yield event
            if stage is self._contract.main and self._contract.draws:
                latents = x
            x = self._decode(stage, x)
            picture = stage.decode is not None and self._contract.recipe.media.kind == "image"
            self._sources.put("@previous", IMAGE, np.clip(x, -1, 1) if picture else x)
            if self._accepted(stage):
                break
        x, latents = self._ranked(x, latents)
        meter = self._meter
        stats = DrawStats(time.perf_counter() - begin, dict(meter.seconds), dict(meter.opening), dict(meter.runs))
        yield presented(x, latents, self._contract, stats, self._used, self._source())

    def _check_latents(self) -> None:
        """Latents of another shape are refused before anything runs, unless an encoder decides what the shape is."""
        given, init = self._request.latents, self._contract.main.init
        if given is None or init.kind != "noise":
            return
        shape = sample_shape(self._contract.main, self._contract, self._used, self._sources)
        if given.shape != shape:
            raise BadRequest(f"latents are {given.shape}; this request needs {shape}")

    def _conditions(self) -> None:
        """Every source that is the same for all rows; one line per prompt, the negative one first where it counts."""
        sources, used = self._sources, self._used
        texts = (used.negative, used.prompt) if self._guided else (used.prompt,)
        self._put_texts(texts)
        draws = count(CONDITION_DRAWS)
        for call in self._contract.recipe.conditions:
            self._networks.phase([call.part])
            self._put_reference(call)
            self._put_random(call, draws)
            once(call, sources, self._networks, self._meter)
            if self._guided and self._contract.guide.guidance.zero_empty and not used.negative:
                sources.zero_line(call.part, 0)

    def _put_texts(self, texts: tuple[str, ...]) -> None:
        """Ids of every line, and the masks of their padding where they are fed."""
        fed = set(self._contract.sources())
        for name in self._contract.tokenizers:
            spellings = ("", f".{name}") if name == "default" else (f".{name}",)
            for spelling in spellings:
                self._sources.put(f"@tokens{spelling}", LINE, self._prompts.ids(name, texts))
                if f"@mask{spelling}" in fed:
                    self._sources.put(f"@mask{spelling}", LINE, self._prompts.masks(name, texts))

    def _put_reference(self, call: Call) -> None:
        """The reference picture, of the side the graph declares."""
        for name, source in call.feeds.items():
            if source == "@reference":
                side = self._networks.inputs(call.part)[name].shape[-1]
                assert isinstance(side, int)  # edgekit.bundle.feeds checked it
                put_reference(self._sources, self._request.reference, side)

    def _put_random(self, call: Call, draws: Iterator[int]) -> None:
        """A condition's noise, each picture's own; where else a condition is fed one for all, it then runs for each."""
        is_random = {name: source.startswith("@random.") for name, source in call.feeds.items()}
        fed = {name: self._sources.value(source) for name, source in call.feeds.items() if not is_random[name]}
        for name, source in call.feeds.items():
            if is_random[name]:
                _, *shape = self._networks.shape_like(call.part, name, fed)
                self._sources.put(source, IMAGE, self._noise.normal((self._used.batch, *shape), next(draws)))

    def _select(self) -> None:
        """A policy's step count for this prompt, where the recipe has one and the request leaves it open."""
        select = self._contract.recipe.select
        if select is None or self._request.steps is not None:
            return
        once(Call(select.part, select.feeds), self._sources, self._networks, self._meter)
        scores = self._sources.images(f"{select.part}.{select.output}")
        self._steps = select.steps[int(scores[0].argmax())]

    def _table(self, stage: Stage) -> Table | None:
        if stage.sampler.kind in TABLE_FREE:
            return None
        main = stage is self._contract.main
        steps = self._steps if main else stage.sampler.steps
        if main and self._used.strength is not None:
            # painting all of what a mask covers starts from noise alone, as in diffusers' pipelines
            noise_alone = self._used.inpaint and self._used.strength == 1
            return compile_stage(stage, steps, None if noise_alone else self._used.strength)
        shipped = {(table.stage, table.steps): table for table in self._bundle.manifest.tables}
        return shipped.get((stage.name, steps)) or compile_stage(stage, steps)

    def _run_stage(self, number: int, stage: Stage) -> Iterator[StepEvent]:
        """A StepEvent per row of a stage."""
        table = self._table(stage)
        first = [stage.init.encode.part] if stage.init.encode is not None else []
        rows = [stage.denoise.part, *stage.sampler.nets, *(call.part for call in stage.denoise.before)]
        self._networks.phase([*first, *rows])
        if stage.sampler.kind == "direct":
            walk, times = self._direct(stage), [0.0]
        elif table is not None:
            walk, times = self._sample(number, stage, table), [row[0] for row in table.rows]
        else:
            steps = self._steps if stage is self._contract.main else stage.sampler.steps
            times = [float(row) for row in range(discrete.rows_of(stage, steps))]
            predict = self._predictor(number, stage, times, ())
            walk = discrete.walk(stage, steps, self._used.batch, predict, self._noise, self._score(stage))
        clock = time.perf_counter()
        for step in walk:
            yield StepEvent(
                stage.name,
                step.row,
                len(times),
                times[step.row],
                time.perf_counter() - clock,
                step.clean,
                step.x,
                self._previewer(stage),
            )
            clock = time.perf_counter()

    def _predictor(
        self,
        number: int,
        stage: Stage,
        times: list[float],
        nets: tuple[str, ...],
        retime: Callable[[int, F32], F32 | None] | None = None,
    ) -> Predictor:
        def random(name: str, row: int, shape: tuple[int, ...]) -> F32:
            place = sorted(set(stage.denoise.feeds.values())).index(f"@random.{name}")
            return self._noise.normal(shape, RANDOM_DRAWS * (1 + place) + number * STAGE_DRAWS + row)

        scale = self._used.guidance if stage is self._contract.guide else stage.guidance.scale
        axis = frames_axis(stage)
        return Predictor(stage, times, nets, scale, self._sources, self._networks, self._meter, random, axis, retime)

    def _sample(self, number: int, stage: Stage, table: Table) -> Iterator[Step]:
        """Run the table on the network, guided as the stage says."""
        main, offset = stage is self._contract.main, number * STAGE_DRAWS
        started = start(
            stage,
            table,
            sample_shape(stage, self._contract, self._used, self._sources),
            self._sources,
            self._once_alone,
            self._noise,
            from_image=main and self._used.strength is not None,
            latents=self._request.latents if main else None,
            draw=offset,
        )
        # a noise start around a mean draws every later noise around it too (CoMoSpeech)
        centre = stage.init.mean if stage.init.kind == "noise" else None
        mean = self._sources.images(centre) if centre is not None else None

        def noise(row: int) -> F32:
            z = self._noise.normal(started.x.shape, offset + 1 + row)
            return z if mean is None else np.asarray(z + mean, np.float32)

        times = [row[0] for row in table.rows]
        retime, after = self._hooks(stage, times)
        return kernels.linear(
            table.rows,
            started.x,
            self._predictor(number, stage, times, table.nets, retime),
            noise,
            clip=stage.sampler.clip,
            clip_out=stage.sampler.clip_out,
            impose=self._imposed(stage, started),
            after=after,
        )

    def _hooks(self, stage: Stage, times: list[float]) -> tuple[Any, Any]:
        """The recipe's hooks on main's rows: another time, and a jump."""
        retime = after = None
        if stage is self._contract.main:
            for hook in self._contract.recipe.hooks:
                if isinstance(hook, TimeShift):
                    retime = hooks.time_shift(hook, stage.sampler.noise_schedule or NoiseSchedule(), times)
                elif isinstance(hook, Retrieve):
                    stored = self._networks.run(hook.part, {}, self._meter)
                    after = hooks.retrieve(hook, stored["keys"], stored["values"])
        return retime, after

    def _imposed(self, stage: Stage, started: Started) -> Callable[[int, F32], F32] | None:
        """What is put back into the sample: known entries, or the picture outside a mask."""
        if stage.denoise.fixed is not None:
            return hold(self._sources.images(stage.denoise.fixed), started.x.shape)
        if stage is not self._contract.main or not self._used.inpaint or not self._contract.blends:
            return None
        levels = noise_levels(stage, self._steps, self._used.strength)
        return blend(started, levels, self._sources.value("@inpaint_mask"))

    def _direct(self, stage: Stage) -> Iterator[Step]:
        """One call on the picture so far: the last stage's, or the given one."""
        given = "@previous" if "@previous" in self._sources else "@image"
        x = self._sources.images(given) if given in self._sources else np.zeros((self._used.batch, 1), np.float32)
        predict = self._predictor(0, stage, [0.0], ())
        return kernels.direct(x, predict)

    def _once_alone(self, call: Call) -> dict[str, Array]:
        """A call on pictures, once for all where they are one."""
        _, feeds = self._sources.feeds(call.feeds)
        return self._networks.run(call.part, feeds, self._meter)

    def _score(self, stage: Stage) -> discrete.Score:
        def score(part: str, now: dict[str, Array]) -> Array:
            feeds = {}
            for name in self._networks.inputs(part):
                source = stage.denoise.feeds.get(name, "@x")
                feeds[name] = now[source] if source in now else self._sources.images(source)
            return next(iter(self._networks.run(part, feeds, self._meter).values()))

        return score

    def _decode(self, stage: Stage, x: Array) -> Array:
        decode = small_decoder(stage.decode) if self._used.tiny else stage.decode
        if decode is None:
            return x
        self._networks.phase([decode.part])
        if not self._contract.is_seen:
            return decoded(stage, decode, x, self._sources, self._networks, self._meter)
        tile, at_once, axis = self._used.tile, None, frames_axis(stage)
        if x.ndim == 4 or (axis is not None and x.ndim == 5):
            height, width = (side * stage.init.downscale for side in x.shape[-2:])
            if tile is None:
                tile = self._networks.decoder_tile(decode.part, (height, width))
            if axis is not None and (decode.per_frame or decode.chunk):
                sides = (min(height, tile or height), min(width, tile or width))
                frames = decode.chunk or x.shape[axis]
                at_once = self._networks.decoder_frames(decode.part, sides, frames, len(x))
        tile = tile // stage.init.downscale if tile is not None else None
        return decoded(stage, decode, x, self._sources, self._networks, self._meter, tile, at_once)

    def _previewer(self, stage: Stage) -> Callable[[Array], Array]:
        if not self._contract.is_seen:
            return lambda _: np.zeros(0)
        return lambda x: decoded(stage, small_decoder(stage.decode), x, self._sources, self._networks, self._meter)

    def _accepted(self, stage: Stage) -> bool:
        """Whether the pictures of a stage are good enough to stop: all of them score at least the threshold."""
        if stage.accept is None:
            return False
        once(Call(stage.accept.part, stage.accept.feeds), self._sources, self._networks, self._meter)
        score = self._sources.images(f"{stage.accept.part}.{stage.accept.output}")
        return bool((score >= stage.accept.threshold).all())

    def _ranked(self, x: Array, latents: Array | None) -> tuple[Array, Array | None]:
        """Best first, where the recipe ranks."""
        for hook in self._contract.recipe.hooks:
            if isinstance(hook, Rank):
                once(Call(hook.part, hook.feeds), self._sources, self._networks, self._meter)
                score = self._sources.images(f"{hook.part}.{hook.output}").reshape(self._used.batch, -1)[:, 0]
                order = np.argsort(-score, kind="stable")
                x, latents = x[order], latents[order] if latents is not None else None
        return x, latents

    def _source(self) -> dict[str, Any]:
        """What else the result depends on: the bundle, and arrays too large to write down."""
        manifest = self._bundle.manifest
        source: dict[str, Any] = {
            "edgekit": __version__,
            "bundle": f"sha256:{self._bundle.digest}",
            "model": manifest.provenance.source,
            "sampler": self._contract.main.sampler.kind,
        }
        arrays = {"given_latents": self._request.latents}
        for name in ("@image", "@original", "@inpaint_mask", "@control", "@reference"):
            if name in self._sources:
                arrays[f"given_{name[1:]}"] = self._sources.value(name)
        arrays |= {f"given_{name}": value for name, value in self._request.inputs.items()}
        for name, value in arrays.items():
            if value is not None:
                source[name] = f"sha256:{hashlib.sha256(np.asarray(value, np.float32).tobytes()).hexdigest()}"
        if self._steps != self._used.steps:
            source["chosen_steps"] = self._steps
        return source
