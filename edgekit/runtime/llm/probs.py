"""From a row of logits to one token: penalty, temperature, top-k, top-p, min-p, and noise with an address.

The filters and their order are those of transformers' logits processors, so that a `generation_config.json` means here
what it means there. The draw is the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030): adding
independent standard Gumbel noise to log-probabilities and taking the largest samples the softmax. The noise of a token
depends on (seed, position, token) and on nothing else, so a draw is the same in any batch, beside any draft and on any
replica; greedy decoding is the same rule without noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgekit.errors import BadRequest, SessionFailed
from edgekit.runtime.random import philox4x32

Row = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_LANES = 4  # random words in one Philox block
_MOST = -math.log(-math.log1p(-(2.0**-33)))  # the largest noise that 32 bits can give, 22.87
_DEPTHS = (5.0, 10.0, 20.0, math.inf)  # how far below the best score the others are looked for, in nats


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen; the defaults are greedy decoding.

    Attributes:
        temperature: 0 is greedy; the scores are divided by it.
        top_k: keep the k best; 0 keeps all.
        top_p: keep the smallest set of best tokens whose probabilities reach this sum; 1 keeps all.
        min_p: keep tokens at least this probable relative to the best; 0 keeps all.
        repetition_penalty: divides (positive) or multiplies (negative) the logit of every token already in the text.
        seed: addresses the noise, in [0, 2^64).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        limits = (
            ("temperature", self.temperature, self.temperature >= 0, "at least 0 (0 is greedy)"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0 (0 keeps every token)"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0 (1 is none)"),
            ("seed", self.seed, 0 <= self.seed < 1 << 64, "at least 0 and below 2^64"),
        )
        for name, value, fine, words in limits:
            if not (fine and math.isfinite(value)):
                raise BadRequest(f"{name} is {value}; it must be {words}")

    def __call__(self, logits: Row, context: tuple[int, ...]) -> int:
        """Choose the token that follows `context`.

        Args:
            logits: float32 (vocabulary,), left as it is.
            context: all tokens before it; its length is the position that addresses the noise.

        Raises:
            SessionFailed: the row holds no number.
        """
        scores = penalize(logits, context, self.repetition_penalty)
        best = int(scores.argmax())
        if not math.isfinite(scores[best]):
            raise SessionFailed(
                f"the model's logits at position {len(context)} are {scores[best]}: its arithmetic overflowed. Export "
                "it again at fp32, or leave the failing layers in higher precision."
            )
        if self.temperature == 0:
            return best
        scores = scores / np.float32(self.temperature)
        tokens = survivors(scores, self.top_k, self.top_p, self.min_p)
        return _gumbel_max(scores[tokens], tokens, self.seed, len(context))


def penalize(logits: Row, context: tuple[int, ...], penalty: float) -> Row:
    """Repetition penalty (Keskar et al. 2019, arXiv:1909.05858): make the tokens of `context` less likely."""
    if penalty == 1:
        return logits
    ids = np.array(context, np.int64)
    seen = logits[ids]
    out: Row = logits.copy()
    out[ids] = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))
    return out


def survivors(scores: Row, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Ids:
    """Token ids, ascending, that top-k, then top-p, then min-p leave; tokens tied with the k-th stay."""
    tokens: Ids | None = None
    if 0 < top_k < len(scores):
        tokens = _best(scores, top_k)
    if top_p < 1:
        kept = _nucleus(scores if tokens is None else scores[tokens], top_p)
        tokens = kept if tokens is None else tokens[kept]
    if min_p > 0:
        left = scores if tokens is None else scores[tokens]
        kept = np.flatnonzero(left >= left.max() + np.float32(math.log(min_p)))
        tokens = kept if tokens is None else tokens[kept]
    return np.arange(len(scores)) if tokens is None else tokens


def _best(scores: Row, count: int) -> Ids:
    """Top-k (Fan et al. 2018, arXiv:1805.04833): the `count` best and all tied with the last of them."""
    best = scores.max()
    for depth in _DEPTHS:
        near = np.flatnonzero(scores >= best - depth)
        if len(near) >= count:
            break
    close = scores[near]
    kept: Ids = near[close >= np.partition(close, -count)[-count]]
    return kept


def _nucleus(scores: Row, top_p: float) -> Ids:
    """Top-p (Holtzman et al. 2020, arXiv:1904.09751): keep a token while those before it sum to less than `top_p`.

    Only the tokens near the best are sorted; the search goes deeper until they hold enough probability. Of tokens
    tied at the edge the lowest ids stay.
    """
    best = scores.max()
    weights = scores - best
    np.exp(weights, out=weights)
    enough = top_p * float(weights.sum())
    for depth in _DEPTHS:
        near = np.flatnonzero(scores >= best - depth)
        if depth == math.inf or weights[near].sum(dtype=np.float64) >= enough:
            break
    close = scores[near]
    falling = np.sort(close)[::-1]
    sums = np.cumsum(np.exp(falling - best), dtype=np.float64)
    size = min(len(near), int(np.searchsorted(sums, enough)) + 1)
    edge = falling[size - 1]
    above, tied = near[close > edge], near[close == edge]
    kept: Ids = np.sort(np.concatenate([above, tied[: size - len(above)]]))
    return kept


def _gumbel_max(scores: Row, tokens: Ids, seed: int, position: int) -> int:
    """The token with the largest noisy score; of equals the lowest id. `scores` are those of `tokens`."""
    best = int(scores.argmax())
    reach = float(scores[best]) + float(gumbel(tokens[best : best + 1], seed, position)[0])
    able = np.flatnonzero(scores >= reach - _MOST - 1e-3)  # the others lose to `best` even with the largest noise
    noisy = scores[able].astype(np.float64) + gumbel(tokens[able], seed, position)
    return int(tokens[able[noisy.argmax()]])


def gumbel(tokens: Ids, seed: int, position: int) -> npt.NDArray[np.float64]:
    """Standard Gumbel noise of each token at a position: -log(-log u), float64, one value per token.

    u is `philox_uniform((vocabulary,), seed, draw=position)[token]`, for any vocabulary: token t is word t mod 4 of the
    block with counter (t div 4, 0, position, 0) under the key `seed`.
    """
    tokens = np.asarray(tokens, np.int64)
    key = (seed & 0xFFFFFFFF, seed >> 32)
    last = int(tokens.max()) // _LANES
    many = len(tokens) > last  # then drawing every block once is less work
    blocks = np.arange(last + 1) if many else tokens // _LANES
    words = np.stack(philox4x32((blocks.astype(np.uint64), 0, position, 0), key))
    picked = words[tokens % _LANES, tokens // _LANES if many else np.arange(len(tokens))]
    return -np.log(-np.log((picked.astype(np.float64) + 0.5) * 2.0**-32))
