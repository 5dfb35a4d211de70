"""Runners of autoregressive generation: block by block, and speculatively in parallel.

A kernel yields after each call of the network. Settings are checked when a kernel is called, before its first row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from edgekit.errors import BadRequest
from edgekit.runtime.diffusion.guidance import classifier_free
from edgekit.runtime.diffusion.tokens import require, require_truncation
from edgekit.runtime.random import Purpose, UniformSource, race, softmax, truncate

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Inputs = TypeVar("Inputs")
Carry = TypeVar("Carry")
Scores = F32 | tuple[F32, F32]  # logits, or those without and with the prompt
BlockNet = Callable[[Inputs, Carry, int], tuple[Scores, Carry]]
WindowNet = Callable[[I64, I64], F32]


def ar_blocks(
    inputs: Inputs,
    carry: Carry,
    net: BlockNet[Inputs, Carry],
    next_inputs: Callable[[I64, int], Inputs],
    uniforms: UniformSource,
    *,
    sizes: tuple[int, ...],
    guidance: tuple[float, float] | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Iterator[tuple[I64, I64]]:
    """Draw block after block, the tokens of a block at once and independently, given all blocks before.

    Blocks of one token are ordinary autoregression, of a row or a frame next-block prediction (NBP, Ren et al. 2025),
    of a scale next-scale prediction (VAR, Tian et al. 2024, eq. 2; FlexVAR, Jiao et al. 2025).

    Args:
        inputs: what the network takes for the first block; the kernel only hands it on.
        carry: what the network remembers (a KV cache); handed from call to call.
        net: (inputs, carry, block) to (logits, carry). Logits are (batch, n, vocabulary) with n at least the block's
            size, of which the last are used; with `guidance` they are a pair, without the prompt and with it.
        next_inputs: (tokens of a block (batch, size), its number) to the inputs of the next one (an embedding, or the
            picture so far at the next scale).
        uniforms: asked at draw 1 + block for TOKEN (batch, size, vocabulary).
        sizes: tokens of each block.
        guidance: scale of classifier-free guidance at the first and the last block, a straight line between. FlexVAR's
            (1 + w) c - w u with w up to 1.5 is (1, 2.5).
        temperature, top_k, top_p: of the softmax, in this order, after guidance.

    Yields:
        after each block, all tokens so far (batch, sum of sizes so far), and the block's own (batch, size), which of a
        next-scale model are the whole picture at that scale.

    Raises:
        BadRequest: a setting out of its range, a block without tokens, logits that are a pair where there is no
            guidance or no pair where there is, or fewer than the block needs.
    """
    require_truncation(top_k, top_p)
    require(
        sizes=(sizes, len(sizes) > 0 and min(sizes, default=0) > 0, "the tokens of each block, at least 1"),
        temperature=(temperature, temperature > 0, "above 0"),
    )
    law = partial(_law, temperature=temperature, top_k=top_k, top_p=top_p)

    def rows() -> Iterator[tuple[I64, I64]]:
        fed, memory, decided = inputs, carry, []
        for block, size in enumerate(sizes):
            scores, memory = net(fed, memory, block)
            logits = _guided(scores, _scale(guidance, block, len(sizes)), block)
            if logits.shape[1] < size:
                raise BadRequest(f"block {block} has {size} tokens; the network gave logits of {logits.shape[1]}")
            p = law(logits[:, -size:])
            tokens = race(p, uniforms.uniform(p.shape, 1 + block, Purpose.TOKEN))
            decided.append(tokens)
            if block + 1 < len(sizes):
                fed = next_inputs(tokens.copy(), block)
            yield np.concatenate(decided, axis=1), tokens

    return rows()


def _scale(ends: tuple[float, float] | None, block: int, blocks: int) -> float | None:
    if ends is None:
        return None
    return ends[0] + (ends[1] - ends[0]) * (block / max(blocks - 1, 1))


def _guided(scores: Scores, scale: float | None, block: int) -> F32:
    """Logits after guidance. Raises BadRequest where the network answers for another kind of guidance."""
    if isinstance(scores, tuple):
        if scale is None:
            raise BadRequest(f"block {block}: the network gave a pair of logits, and no guidance is set to join them")
        return classifier_free(*scores, scale)
    if scale is not None:
        raise BadRequest(
            f"block {block}: guidance needs logits without and with the prompt; the network gave one array"
        )
    return scores


def _law(logits: F32, temperature: float, top_k: int, top_p: float) -> F64:
    """p over the last axis in float64: temperature, then top-k, then top-p."""
    return softmax(truncate(logits.astype(np.float64) / temperature, top_k, top_p))


def jacobi_tokens(
    net: WindowNet,
    uniforms: UniformSource,
    *,
    batch: int,
    length: int,
    window: int,
    vocabulary: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Iterator[tuple[I64, I64]]:
    """Speculative Jacobi decoding (Teng et al. 2024, alg. 1): autoregression of the same distribution in fewer calls.

    A window of guesses is scored in one call. Guess j, drawn from q_j, stands if u < p_j / q_j (as in speculative
    decoding, Leviathan et al. 2023, sec. 2.3). At the first that falls a token is drawn from the positive part of
    p_j - q_j, and the guesses after it are drawn anew from the p just computed, which is their q in the next call. A
    guess that enters the window is drawn evenly. Each image goes on at its own pace, and at least by one token a call.

    Args:
        net: (tokens (batch, length), decided (batch,)) to logits (batch, window, vocabulary): entry [k, j] is for token
            decided[k] + j of image k, given its tokens before that one. Entries past the end are not read. The prompt
            is the network's own matter.
        uniforms: asked at draw 0 for TOKEN (batch, length), the first guesses; at draw 1 + call for ACCEPT
            (batch, window) and TOKEN (batch, window, vocabulary).
        batch, length: images, and tokens of each.
        window: guesses that are scored in one call; 1 is ordinary autoregression.
        vocabulary: values of a token.
        temperature, top_k, top_p: of the softmax, in this order; they are part of p and q.

    Yields:
        after each call, the decided tokens with -1 where there is none yet, and the same with the guesses.

    Raises:
        BadRequest: a setting out of its range.
    """
    require_truncation(top_k, top_p)
    require(
        batch=(batch, batch > 0, "at least 1"),
        length=(length, length > 0, "at least 1"),
        window=(window, window > 0, "at least 1"),
        vocabulary=(vocabulary, vocabulary > 0, "at least 1"),
        temperature=(temperature, temperature > 0, "above 0"),
    )
    law = partial(_law, temperature=temperature, top_k=top_k, top_p=top_p)

    def rows() -> Iterator[tuple[I64, I64]]:
        tokens = (uniforms.uniform((batch, length), 0, Purpose.TOKEN) * vocabulary).astype(np.int64)
        decided = np.zeros(batch, np.int64)
        q = np.full((batch, window, vocabulary), 1 / vocabulary)  # of the guesses from `decided` on
        call = 0
        while decided.min() < length:
            p = law(net(tokens.copy(), decided.copy()))
            coins = uniforms.uniform((batch, window), 1 + call, Purpose.ACCEPT)
            clocks = uniforms.uniform(p.shape, 1 + call, Purpose.TOKEN)
            for k in np.flatnonzero(decided < length):
                guesses = tokens[k, decided[k] : decided[k] + window]  # a view: it is rewritten in place
                moved = _verify(guesses, p[k], q[k], coins[k], clocks[k])
                decided[k] += moved
                q[k] = np.concatenate([p[k, moved:], np.full((moved, vocabulary), 1 / vocabulary)])
            call += 1
            yield np.where(np.arange(length) < decided[:, None], tokens, -1), tokens.copy()

    return rows()


def _verify(guesses: I64, p: F64, q: F64, coins: F64, clocks: F64) -> int:
    """Judge the guesses of one image, redraw from the first that falls on, in place; how many tokens are decided."""
    places = np.arange(len(guesses))
    stands = coins[places] * q[places, guesses] < p[places, guesses]
    fallen = int(np.argmin(stands)) if not stands.all() else len(guesses)
    if fallen == len(guesses):
        return fallen
    laws = p[fallen : len(guesses)].copy()
    rest = np.maximum(p[fallen] - q[fallen], 0)
    laws[0] = rest if rest.any() else p[fallen]  # equal but for rounding: then p itself is what is left to draw from
    guesses[fallen:] = race(laws, clocks[fallen : len(guesses)])
    return fallen + 1
