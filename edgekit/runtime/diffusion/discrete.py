"""Stages that are not a table: samplers of tokens, blocks and rigid frames, run on a stage's predictor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from edgekit.bundle.recipe import Stage, Tokens
from edgekit.errors import BadManifest
from edgekit.runtime.backends import Array
from edgekit.runtime.diffusion import blocks, rigid
from edgekit.runtime.diffusion import tokens as kernels
from edgekit.runtime.diffusion.kernels import Step
from edgekit.runtime.diffusion.predict import Predictor
from edgekit.runtime.random import NoiseSource

I64 = npt.NDArray[np.int64]
Walk = Iterator[tuple[Array, Array]]
Score = Callable[[str, dict[str, Array]], Array]


def rows_of(stage: Stage, steps: int) -> int:
    """How often the stage's network is asked at most: the rows its events count."""
    sampler = stage.sampler
    if sampler.kind == "ar_blocks" and sampler.blocks is not None:
        return len(sampler.blocks.sizes)
    if sampler.kind == "jacobi_tokens" and sampler.blocks is not None:
        return sum(sampler.blocks.sizes)
    if sampler.tokens is not None and sampler.tokens.codebook_steps:
        return sum(sampler.tokens.codebook_steps)
    return steps + (sampler.kind == "discrete_posterior" and _tokens(stage).times[1] > 0)


def walk(stage: Stage, steps: int, batch: int, predict: Predictor, noise: NoiseSource, score: Score) -> Iterator[Step]:
    """Run a stage of discrete or rigid state.

    Args:
        stage: of a kind that has no table.
        steps: rows, where the recipe leaves them open.
        batch: samples.
        predict: the stage's network.
        noise: uniforms, and normals for rigid frames.
        score: (part, sources) to a learned evaluator's scores, where the recipe names one.

    Raises:
        BadManifest: a sampler without its numbers. BadRequest: numbers the kernel refuses, or noise without uniforms.
    """
    run = KINDS[stage.sampler.kind]
    for row, (state, clean) in enumerate(run(stage, steps, batch, predict, noise, score)):
        yield Step(row, state, clean)


def _masked(stage: Stage, steps: int, batch: int, predict: Predictor, noise: NoiseSource, score: Score) -> Walk:
    t = _tokens(stage)
    shape = (batch, t.length) if t.codebooks == 1 else (batch, t.codebooks, t.length)

    def told(row: kernels.TokenRow) -> dict[str, Array]:
        return {"@codebook": np.full(batch, row.codebook, np.int64), "@t": np.full(batch, row.masked, np.float32)}

    def confidence(state: I64, row: kernels.TokenRow) -> Array:
        assert t.confidence is not None, "asked only where one is named"
        return score(t.confidence, {"@x": state, **told(row)})

    return kernels.masked_tokens(
        np.full(shape, t.mask_id, np.int64),
        lambda state, row: predict(state, row.row, told(row)),
        noise,
        mask_id=t.mask_id,
        steps=t.codebook_steps or steps,
        schedule=t.schedule,
        temperature=t.temperature,
        anneal=t.anneal,
        choice_temperature=t.choice_temperature,
        top_k=t.top_k,
        top_p=t.top_p,
        span=t.span,
        confidence=confidence if t.confidence is not None else None,
    )


def _renoise(stage: Stage, steps: int, batch: int, predict: Predictor, noise: NoiseSource, _: Score) -> Walk:
    t = _tokens(stage)
    shape = (batch, t.length)
    return kernels.renoise_tokens(
        kernels.random_tokens(shape, t.vocabulary, noise),
        _timed(predict, batch),
        noise,
        steps=steps,
        times=t.times,
        temperature=t.temperature,
        renoise_steps=t.renoise_steps,
        top_k=t.top_k,
        top_p=t.top_p,
    )


def _posterior(stage: Stage, steps: int, batch: int, predict: Predictor, noise: NoiseSource, _: Score) -> Walk:
    t = _tokens(stage)
    remask = t.remask
    extra = {} if remask is None else {"eta": remask.eta, "t_on": remask.t_on, "t_off": remask.t_off}
    if remask is not None:
        extra["alpha_on"] = remask.alpha_on
    return kernels.discrete_posterior(
        np.full((batch, t.length), t.mask_id, np.int64),
        _timed(predict, batch),
        noise,
        mask_id=t.mask_id,
        steps=steps,
        times=t.times,
        remask=remask.strategy if remask is not None else None,
        temperature=t.temperature[0],
        top_k=t.top_k,
        top_p=t.top_p,
        **extra,
    )


def _timed(predict: Predictor, batch: int) -> Callable[[I64, float], Array]:
    """A predictor told its time by the kernel, row after row."""
    rows = iter(range(1 << 20))
    return lambda state, t: predict(state, next(rows), {"@t": np.full(batch, t, np.float32)})


def _blocks(stage: Stage, steps: int, batch: int, predict: Predictor, noise: NoiseSource, _: Score) -> Walk:  # noqa: ARG001
    b = stage.sampler.blocks
    if b is None:
        raise BadManifest(f"stage {stage.name!r} is {stage.sampler.kind} and has no `blocks`")
    return blocks.ar_blocks(
        np.zeros((batch, 1), np.int64),  # what comes before the first token: the graph's start token
        None,
        lambda inputs, carry, block: (predict(inputs, block), carry),
        lambda drawn, _: drawn,
        noise,
        sizes=b.sizes,
        temperature=b.temperature,
        top_k=b.top_k,
        top_p=b.top_p,
    )


def _jacobi(stage: Stage, steps: int, batch: int, predict: Predictor, noise: NoiseSource, _: Score) -> Walk:  # noqa: ARG001
    b = stage.sampler.blocks
    if b is None:
        raise BadManifest(f"stage {stage.name!r} is {stage.sampler.kind} and has no `blocks`")
    rows = iter(range(1 << 20))
    return blocks.jacobi_tokens(
        lambda state, decided: predict(state, next(rows), {"@decided": decided}),
        noise,
        batch=batch,
        length=sum(b.sizes),
        window=b.window,
        vocabulary=b.vocabulary,
        temperature=b.temperature,
        top_k=b.top_k,
        top_p=b.top_p,
    )


def _rigid(stage: Stage, steps: int, batch: int, predict: Predictor, noise: NoiseSource, _: Score) -> Walk:
    """Frames as one array (batch, n, 7): a translation and a quaternion each."""
    r = stage.sampler.rigid
    if r is None:
        raise BadManifest(f"stage {stage.name!r} is {stage.sampler.kind} and has no `rigid`")
    ask = _timed(predict, batch)

    def net(frames: rigid.Frames, t: float) -> rigid.Frames:
        out = ask(_joined(frames), t)
        return rigid.Frames(out[..., :3], out[..., 3:])

    start = rigid.random_frames(noise, batch, r.count, r.scale)
    for state, clean in rigid.euler_rigid(start, net, steps=steps, min_t=r.min_t, rotation=r.rotation, rate=r.rate):
        yield _joined(state), _joined(clean)


def _joined(frames: rigid.Frames) -> Array:
    return np.concatenate([frames.translations, frames.quaternions], axis=-1)


def _tokens(stage: Stage) -> Tokens:
    if stage.sampler.tokens is None:
        raise BadManifest(f"stage {stage.name!r} is {stage.sampler.kind} and has no `tokens`")
    return stage.sampler.tokens


KINDS: dict[str, Callable[[Stage, int, int, Predictor, NoiseSource, Score], Walk]] = {
    "masked_tokens": _masked,
    "renoise_tokens": _renoise,
    "discrete_posterior": _posterior,
    "ar_blocks": _blocks,
    "jacobi_tokens": _jacobi,
    "euler_rigid": _rigid,
}
