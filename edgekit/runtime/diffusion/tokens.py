"""Runners of discrete tokens: parallel decoding by confidence, renoising, and the absorbing posterior.

A kernel yields the tokens after each row, and the whole clean sequence they were made from. Tokens are drawn by `race`,
with a uniform per token and value. Settings are checked when a kernel is called, before its first row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from edgekit.errors import BadRequest
from edgekit.runtime.diffusion.grids import linspace32
from edgekit.runtime.random import Purpose, UniformSource, race, softmax, truncate

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Schedule = Literal["cosine", "cosine_closed", "linear"]
Remasking = Literal["cap", "rescale", "confidence", "loop"]

TINY = np.float32(1e-20)  # no logarithm of less, as in diffusers
COLDEST = np.float32(1e-2)  # the lowest sampling temperature of a ramp, as in MAGNeT


class TokenRow(NamedTuple):
    """What a network is told about a row of `masked_tokens`."""

    row: int  # counted over all codebooks
    codebook: int
    masked: float  # the share of the codebook the schedule leaves masked; guidance ramps follow it (MAGNeT)


MaskedNet = Callable[[I64, TokenRow], F32]
TimedNet = Callable[[I64, float], F32]
Rows = Iterator[tuple[I64, I64]]


def require(**good: tuple[Any, bool, str]) -> None:
    """Settings as (value, whether it can be meant, what it must be). Raises BadRequest for the first that cannot."""
    for name, (value, fine, rule) in good.items():
        if not fine:
            raise BadRequest(f"{name} is {value}; it must be {rule}")


def require_truncation(top_k: int, top_p: float) -> None:
    """Raises BadRequest where top-k or top-p cannot be meant."""
    require(
        top_k=(top_k, top_k >= 0, "at least 0 (0 keeps every token)"),
        top_p=(top_p, 0 <= top_p <= 1, "at least 0 and at most 1 (0 and 1 keep every token)"),
    )


def random_tokens(shape: Sequence[int], vocabulary: int, uniforms: UniformSource) -> I64:
    """Tokens (batch, ...) drawn evenly from `vocabulary` values: the start of `renoise_tokens`."""
    return (uniforms.uniform(shape, 0, Purpose.TOKEN) * vocabulary).astype(np.int64)


def masked_share(schedule: Schedule, row: int, rows: int) -> float:
    """The share of tokens that is masked when row `row` of `rows` begins, a float32 number: 1 at row 0.

    `cosine` is cos(pi/2 row / rows) (MaskGIT, Chang et al. 2022, sec. 3.2), `linear` is 1 - row / rows; after the last
    row both are 0. `cosine_closed` is the cosine on a grid that reaches 0 at the last row already (MAGNeT).
    """
    done = np.float32(row / rows)
    if schedule == "cosine_closed":
        done = _ramp((0.0, 1.0), rows)[min(row, rows - 1)]
    if schedule == "linear":
        return float(np.float32(1) - done)
    # N cos(pi/3) is a whole number for even N: the angle is rounded as in torch, the cosine correctly
    return float(np.float32(np.cos(float(done * np.float32(np.pi) / np.float32(2)))))


def masked_tokens(
    tokens: I64,
    net: MaskedNet,
    uniforms: UniformSource,
    *,
    mask_id: int,
    steps: int | tuple[int, ...],
    schedule: Schedule = "cosine",
    temperature: tuple[float, float] = (1.0, 1.0),
    anneal: bool = False,
    choice_temperature: tuple[float, float] = (2.0, 0.0),
    top_k: int = 0,
    top_p: float = 1.0,
    span: int = 1,
    start_share: float = 1.0,
    confidence: MaskedNet | None = None,
) -> Rows:
    """Parallel decoding (MaskGIT, Chang et al. 2022, sec. 3.2; aMUSEd, Patil et al. 2024; MAGNeT, Ziv et al. 2024).

    Each row draws every masked token, then masks the n least confident again: by ln p(token) + choice temperature
    times Gumbel noise, with n = floor(N share), at least one, and fewer than before unless the schedule is closed. What
    ties with the first one kept stays. Tokens that are not `mask_id` at the start are given, and never change.

    Args:
        tokens: (batch, N), or (batch, codebooks, N), which are decoded one codebook after the other.
        net: (tokens, row) to logits of the row's codebook (batch, N, vocabulary), after guidance.
        uniforms: asked at draw 1 + row, for TOKEN (batch, N, vocabulary) and GUMBEL (batch, N / span).
        mask_id: the token that means "masked".
        steps: rows, or rows of each codebook.
        schedule: how many stay masked (`masked_share`).
        temperature: of the softmax tokens are drawn from, first and last row; not below 0.01.
        anneal: instead temperature[0] (rows left) / rows, as in MAGNeT.
        choice_temperature: of the Gumbel noise, first and last row. 0 asks for no noise.
        top_k, top_p: truncate what tokens are drawn from; confidence is the probability before.
        span: so many neighbours are masked and kept together, by the best confidence among them.
        start_share: of all tokens that may be masked, where part of the sequence is given.
        confidence: (tokens, row) to scores (batch, N) in (0, 1], of a learned evaluator (Lezama et al. 2022, ITER), in
            place of p(token); tokens decided in earlier rows then compete too.

    Raises:
        BadRequest: a setting out of its range, step counts that are not one per codebook, N no multiple of span.
    """
    books, length = (tokens.shape[1] if tokens.ndim == 3 else 1), tokens.shape[-1]
    counts = (steps,) if isinstance(steps, int) else tuple(steps)
    require_truncation(top_k, top_p)
    require(
        tokens=(tokens.shape, tokens.ndim in (2, 3), "of shape (batch, N) or (batch, codebooks, N)"),
        steps=(steps, len(counts) == books and min(counts) > 0, f"a positive count for each of {books} codebooks"),
        schedule=(schedule, schedule in ("cosine", "cosine_closed", "linear"), "cosine, cosine_closed or linear"),
        temperature=(temperature, min(temperature) >= 0, "at least 0"),
        choice_temperature=(choice_temperature, min(choice_temperature) >= 0, "at least 0"),
        span=(span, span > 0 and length % span == 0, f"a divisor of the {length} tokens"),
        start_share=(start_share, 0 < start_share <= 1, "above 0 and at most 1"),
    )
    plan: list[_Row] = []
    for codebook, rows in enumerate(counts):
        heats = _annealed(temperature[0], rows) if anneal else _ramp(temperature, rows)
        spans = [_spans_left(schedule, row, rows, length // span, start_share) for row in range(1, rows + 1)]
        for row, settings in enumerate(zip(heats, _ramp(choice_temperature, rows), spans, strict=True)):
            plan.append(_Row(TokenRow(len(plan), codebook, masked_share(schedule, row, rows)), *settings))
    draw = partial(_draw, top_k=top_k, top_p=top_p)
    hide = partial(_hide, span=span, fewer=schedule != "cosine_closed")
    return _decode(tokens, net, uniforms, mask_id, plan, draw, hide, confidence)


class _Row(NamedTuple):
    """One row of parallel decoding, all its numbers settled."""

    at: TokenRow
    temperature: np.float32
    choice: np.float32
    spans: int  # that are masked again; 0 after a codebook's last row


def _ramp(ends: tuple[float, float], rows: int) -> F32:
    """A straight line over the rows, first and last included."""
    return linspace32(*ends, rows) if rows > 1 else np.array(ends[:1], np.float32)


def _annealed(temperature: float, rows: int) -> F32:
    """MAGNeT's ramp: the temperature times the rows that are left after this one, of all."""
    return np.array([temperature * (left / rows) for left in range(rows)][::-1], np.float32)


def _spans_left(schedule: Schedule, row: int, rows: int, spans: int, start_share: float) -> int:
    """How many spans are masked before row `row`, unless fewer still were; none after the last."""
    share = np.float32(start_share) * np.float32(masked_share(schedule, row, rows))
    return max(1, int(np.float32(spans) * share)) if row < rows else 0


def _decode(
    tokens: I64,
    net: MaskedNet,
    uniforms: UniformSource,
    mask_id: int,
    plan: Sequence[_Row],
    draw: Callable[..., tuple[I64, F32]],
    hide: Callable[..., Flags],
    confidence: MaskedNet | None,
) -> Rows:
    state = tokens.copy()
    free = tokens == mask_id
    for at, temperature, choice, spans in plan:
        book = np.s_[:] if tokens.ndim == 2 else np.s_[:, at.codebook]
        masked = state[book] == mask_id
        logits = net(state.copy(), at)
        picks, score = draw(logits, temperature, uniforms.uniform(logits.shape, 1 + at.row, Purpose.TOKEN))
        state[book] = np.where(masked, picks, state[book])
        clean = state.copy()
        if spans:
            rivals = masked if confidence is None else free[book]
            score = score if confidence is None else confidence(clean.copy(), at)
            noise = partial(uniforms.uniform, draw=1 + at.row, purpose=Purpose.GUMBEL)
            state[book] = np.where(hide(score, rivals, masked, choice, spans, noise), mask_id, state[book])
        yield state.copy(), clean


def _draw(logits: F32, temperature: np.float32, u: F64, top_k: int, top_p: float) -> tuple[I64, F32]:
    """A token everywhere, and its probability before truncation, in float32 as the references have it."""
    scaled: F32 = logits / np.maximum(temperature, COLDEST)
    p = softmax(scaled)
    picks = race(softmax(truncate(scaled, top_k, top_p)), u)
    return picks, np.take_along_axis(p, picks[..., None], -1)[..., 0]


def _hide(
    score: F32,
    rivals: Flags,
    masked: Flags,
    choice: np.float32,
    count: int,
    noise: Callable[[tuple[int, ...]], F64],
    span: int,
    fewer: bool,
) -> Flags:
    """Which tokens (batch, N) are masked again: the rivals in the `count` least confident spans."""
    batch, length = score.shape
    spans = (batch, length // span, span)
    confident = np.where(rivals, np.log(np.maximum(score, TINY)), -np.inf).astype(np.float32).reshape(spans).max(-1)
    if choice > 0:
        # clipped as in diffusers, so that neither logarithm is infinite
        confident += choice * -np.log(np.maximum(-np.log(np.maximum(noise(spans[:2]), TINY)), TINY)).astype(np.float32)
    confident = np.where(rivals.reshape(spans).any(-1), confident, np.float32(np.inf))
    open_spans = masked.reshape(spans).any(-1).sum(-1)
    count_of = np.maximum(1, np.minimum(open_spans - fewer, count))
    rising = np.concatenate([np.sort(confident, -1), np.full((batch, 1), np.inf, np.float32)], -1)
    cut = np.take_along_axis(rising, count_of[:, None], -1)
    hidden: Flags = rivals & np.repeat(confident < cut, span, axis=-1)
    return hidden


def renoise_tokens(
    tokens: I64,
    net: TimedNet,
    uniforms: UniformSource,
    *,
    steps: int,
    times: tuple[float, float] = (1.0, 0.0),
    temperature: tuple[float, float] = (1.0, 0.2),
    renoise_steps: int | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Rows:
    """Paella (Rampas et al. 2022, sec. 3.2): draw every token, then put initial ones back where u <= t of the next row.

    Args:
        tokens: the start (batch, ...), random tokens (`random_tokens`); it is also what is put back.
        net: (tokens, t) to logits (batch, ..., vocabulary), after guidance.
        uniforms: asked at draw 1 + row, for TOKEN (batch, ..., vocabulary) and ACCEPT (batch, ...).
        times: first time, and the one after the last row: the share of tokens that is noise.
        temperature: of the softmax, first and last row; not below 0.01.
        renoise_steps: rows after which tokens are put back; None: all but the last.
        top_k, top_p: truncate what tokens are drawn from.

    Raises:
        BadRequest: a setting out of its range.
    """
    renoise_steps = steps - 1 if renoise_steps is None else renoise_steps
    require_truncation(top_k, top_p)
    require(
        steps=(steps, steps > 0, "at least 1"),
        times=(times, 1 >= times[0] > times[1] >= 0, "two falling times between 1 and 0"),
        temperature=(temperature, min(temperature) >= 0, "at least 0"),
        renoise_steps=(renoise_steps, 0 <= renoise_steps <= steps, f"between 0 and {steps}, the rows"),
    )

    def rows() -> Rows:
        state, grid = tokens, linspace32(*times, steps + 1)
        for row, heat in enumerate(_ramp(temperature, steps)):
            logits = net(state.copy(), float(grid[row]))
            u = uniforms.uniform(logits.shape, 1 + row, Purpose.TOKEN)
            clean, _ = _draw(logits, heat, u, top_k, top_p)
            state = clean
            if row < renoise_steps:
                noisy = uniforms.uniform(tokens.shape, 1 + row, Purpose.ACCEPT) <= grid[row + 1]
                state = np.where(noisy, tokens, clean)
            yield state.copy(), clean.copy()

    return rows()


def discrete_posterior(
    tokens: I64,
    net: TimedNet,
    uniforms: UniformSource,
    *,
    mask_id: int,
    steps: int,
    times: tuple[float, float] = (1.0, 0.0),
    remask: Remasking | None = None,
    eta: float = 0.02,
    t_on: float = 0.55,
    t_off: float = 0.05,
    alpha_on: float = 0.9,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Rows:
    """Ancestral sampling of masked diffusion (MDLM, Sahoo et al. 2024, eq. 7) with remasking (ReMDM, Wang et al. 2025).

    From time t to s < t, with alpha the share of tokens that is clean (1 - t) and sigma the chance to be masked again:
    a masked token becomes v with chance p(v) (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), a decided one is masked
    with chance sigma (ReMDM eq. 6). The marginal at every time is that of masked diffusion, for any sigma up to
    sigma_max = min(1, (1 - alpha_s) / alpha_t). The strategies (ReMDM sec. 4):
    None: sigma 0, which is MDLM and SDTT (Deschenaux & Gulcehre 2024). "cap": min(eta, sigma_max). "rescale":
    eta sigma_max. "confidence": eta sigma_max, shared out over an image's decided tokens by the softmax of -p each had
    when it was decided. "loop": eta while t_off < t <= t_on, where alpha rests at alpha_on, and 0 elsewhere, with alpha
    a straight line to and from there; a row across a corner uses alpha at both its ends.

    Tokens given at the start are never masked. A last time above 0 leaves masked tokens, which one more call, and row,
    fills with their likeliest values.

    Args:
        tokens: (batch, N), all `mask_id` but for what is given.
        net: (tokens, t) to logits (batch, N, vocabulary), after guidance; that of `mask_id` is not used.
        uniforms: asked at draw 1 + row, for TOKEN (batch, N, vocabulary) and ACCEPT (batch, N).
        mask_id: the token that means "masked"; it may lie in the vocabulary or just past it.
        times: first and last time, 1 being all masked.
        remask, eta, t_on, t_off, alpha_on: the strategy and its numbers.
        temperature, top_k, top_p: of the softmax p.

    Raises:
        BadRequest: a setting out of its range, or an unknown strategy.
    """
    require_truncation(top_k, top_p)
    require(
        tokens=(tokens.shape, tokens.ndim == 2, "of shape (batch, N)"),
        steps=(steps, steps > 0, "at least 1"),
        times=(times, 1 >= times[0] > times[1] >= 0, "two falling times between 1 and 0"),
        remask=(remask, remask in (None, "cap", "rescale", "confidence", "loop"), "None or a strategy of ReMDM"),
        eta=(eta, 0 <= eta <= 1, "between 0 and 1"),
        t_on=(t_on, 1 > t_on > t_off > 0, f"below 1 and above t_off, which is {t_off} and must be above 0"),
        alpha_on=(alpha_on, 0 < alpha_on < 1, "between 0 and 1"),
        temperature=(temperature, temperature > 0, "above 0"),
    )
    alpha = partial(_clean_share, loop=(t_on, t_off, alpha_on) if remask == "loop" else None)
    sigma = partial(_sigma, remask=remask, eta=eta, t_on=t_on, t_off=t_off)
    law = partial(_unmasked_law, mask_id=mask_id, temperature=temperature, top_k=top_k, top_p=top_p)
    return _posterior(tokens, net, uniforms, mask_id, np.linspace(*times, steps + 1).tolist(), alpha, sigma, law)


def _unmasked_law(logits: F32, mask_id: int, temperature: float, top_k: int, top_p: float) -> F64:
    """p (batch, N, vocabulary) in float64, with nothing on the mask."""
    scaled = logits.astype(np.float64) / temperature
    if mask_id < scaled.shape[-1]:
        scaled[..., mask_id] = -np.inf
    return softmax(truncate(scaled, top_k, top_p))


def _clean_share(t: float, loop: tuple[float, float, float] | None) -> float:
    """alpha at time t: 1 - t, or ReMDM-loop's line to alpha_on, rest, and line to 1."""
    if loop is None:
        return 1 - t
    t_on, t_off, alpha_on = loop
    if t > t_on:
        return (1 - t) / (1 - t_on) * alpha_on
    return alpha_on if t > t_off else 1 - t / t_off * (1 - alpha_on)


def _posterior(
    tokens: I64,
    net: TimedNet,
    uniforms: UniformSource,
    mask_id: int,
    grid: Sequence[float],
    alpha: Callable[[float], float],
    sigma: Callable[[float, float, F64], F64],
    law: Callable[[F32], F64],
) -> Rows:
    state, given = tokens.copy(), tokens != mask_id
    doubt = np.full(tokens.shape, -np.inf)  # -p of a token when it was decided, for the confidence strategy
    for row, (t, s) in enumerate(pairwise(grid)):
        now, then = alpha(t), alpha(s)
        again = sigma(t, min(1.0, (1 - then) / now) if now > 0 else 1.0, doubt)
        masked = state == mask_id
        p = law(net(state.copy(), t))
        coin = uniforms.uniform(tokens.shape, 1 + row, Purpose.ACCEPT)
        picks = race(p, uniforms.uniform(p.shape, 1 + row, Purpose.TOKEN))
        clean = np.where(masked, picks, state)
        revealed = masked & (coin < (then - (1 - again) * now) / (1 - now))
        hidden = ~masked & ~given & (coin < again)
        state = np.where(revealed, picks, np.where(hidden, mask_id, state))
        doubt = np.where(revealed, -np.take_along_axis(p, picks[..., None], -1)[..., 0], doubt)
        doubt[hidden] = -np.inf
        yield state.copy(), clean
    if grid[-1] > 0:
        state = np.where(state == mask_id, law(net(state.copy(), grid[-1])).argmax(-1), state)
        yield state.copy(), state.copy()


def _sigma(t: float, most: float, doubt: F64, remask: Remasking | None, eta: float, t_on: float, t_off: float) -> F64:
    """The chance to be masked again, one number or (batch, N); 0 for masked tokens under "confidence"."""
    if remask == "confidence":
        weights = np.exp(doubt)
        shares: F64 = weights / np.maximum(weights.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
        return np.multiply(shares, eta * most)
    if remask == "rescale":
        return np.asarray(eta * most)
    active = remask == "cap" or (remask == "loop" and t_off < t <= t_on)
    return np.asarray(min(eta, most) if active else 0.0)
