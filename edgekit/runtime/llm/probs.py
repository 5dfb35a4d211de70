"""From a row of logits to one token: penalty, temperature, top-k, top-p, min-p, and noise with an address.

The filters and their order are those of transformers' logits processors, so that a `generation_config.json` means here
what it means there. The draw is the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030): adding
independent standard Gumbel noise to log-probabilities and taking the largest samples the softmax. The noise of a token
depends on (seed, position, token) and on nothing else, so a draw is the same in any batch, beside any draft and on any
replica; greedy decoding is the same rule without noise. Acceptance rules that need other random numbers find them in
another Philox stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from edgekit.errors import BadRequest, SessionFailed
from edgekit.runtime.random import U32, philox4x32, philox_u32

Row = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Law = npt.NDArray[np.float64]

_LANES = 4  # random words in one Philox block
_SPAN = 1 << 14  # tokens drawn in one go: what is computed of them stays in a core's cache
_FEW = 1 << 11  # that many tokens get their noise without ado
_SLACK = 1e-3  # far more than float32 costs a bound
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
        scores, best = self._scores(logits, context)
        if self.temperature == 0:
            return best
        tokens = survivors(scores, self.top_k, self.top_p, self.min_p)
        return _gumbel_max(scores[tokens], tokens, self.seed, len(context))

    def law(self, logits: Row, context: tuple[int, ...]) -> Law:
        """The distribution of the token that follows `context`, over seeds: float64 (vocabulary,), its sum 1.

        It is 0 outside the survivors of the filters, and at temperature 0 outside the greedy choice. The arguments
        and errors are those of a draw.
        """
        scores, best = self._scores(logits, context)
        law = np.zeros(len(scores))
        if self.temperature == 0:
            law[best] = 1
            return law
        tokens = survivors(scores, self.top_k, self.top_p, self.min_p)
        weights = np.subtract(scores[tokens], scores[best], dtype=np.float64)
        np.exp(weights, out=weights)
        law[tokens] = np.divide(weights, weights.sum(), out=weights)
        return law

    def _scores(self, logits: Row, context: tuple[int, ...]) -> tuple[Row, int]:
        """The logits, penalised and divided by the temperature, and the first of the best."""
        scores = penalize(logits, context, self.repetition_penalty)
        best = int(scores.argmax())
        if not math.isfinite(scores[best]):
            raise SessionFailed(
                f"the model's logits at position {len(context)} are {scores[best]}: its arithmetic overflowed. Export "
                "it again at fp32, or leave the failing layers in higher precision."
            )
        return (scores / np.float32(self.temperature) if self.temperature > 0 else scores), best


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
    return _every(len(scores)) if tokens is None else tokens


@lru_cache(maxsize=2)
def _every(size: int) -> Ids:
    """All token ids; made once per vocabulary, so read-only."""
    tokens = np.arange(size)
    tokens.flags.writeable = False
    return tokens


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
    """The token with the largest noisy score; of equals the lowest id. `scores` are those of `tokens`, ascending."""
    best = int(scores.argmax())
    reach = float(scores[best]) + float(gumbel(tokens[best : best + 1], seed, position)[0])
    able = np.flatnonzero(scores >= reach - _MOST - _SLACK)  # the others lose to `best` even with the largest noise
    if len(able) > _FEW:
        hopes = []
        for span in (able[start : start + _SPAN] for start in range(0, len(able), _SPAN)):
            near, words = scores[span].astype(np.float64), _words(tokens[span], seed, position)
            bounds = near + _bound(words)
            likely = int(bounds.argmax())
            reach = max(reach, float(near[likely] + _noise(words[likely : likely + 1])[0]))
            hopes.append(span[bounds >= reach - _SLACK])
        able = np.concatenate(hopes)
    noisy = scores[able].astype(np.float64) + gumbel(tokens[able], seed, position)
    return int(tokens[able[noisy.argmax()]])


def gumbel(tokens: Ids, seed: int, position: int) -> npt.NDArray[np.float64]:
    """Standard Gumbel noise of each token at a position: -log(-log u), float64, one value per token.

    u is `philox_uniform((vocabulary,), seed, draw=position)[token]`, for any vocabulary: token t is word t mod 4 of the
    block with counter (t div 4, 0, position, 0) under the key `seed`.
    """
    return _noise(_words(np.asarray(tokens, np.int64), seed, position))


def uniforms(count: int, seed: int, position: int) -> npt.NDArray[np.float64]:
    """Random numbers in [0, 1) for the decisions of an acceptance rule at a position: float64 (count,).

    Number k has the upper 27 and 26 bits of words 2k and 2k + 1 of Philox stream 1 (`philox_u32` with `draw=position`,
    `stream=1`). Gumbel noise is stream 0, so drafts drawn with it are independent of these.
    """
    words = philox_u32((count, 2), seed, position, stream=1).astype(np.float64) // (32.0, 64.0)
    return np.asarray((words[:, 0] * 2.0**26 + words[:, 1]) * 2.0**-53)


def _words(tokens: Ids, seed: int, position: int) -> U32:
    """The random word of each token."""
    key = (seed & 0xFFFFFFFF, seed >> 32)
    first, last = int(tokens.min()) // _LANES, int(tokens.max()) // _LANES
    many = len(tokens) > last - first  # then drawing every block once is less work
    blocks = np.arange(first, last + 1) if many else tokens // _LANES
    words = np.stack(philox4x32((blocks.astype(np.uint64), 0, position, 0), key), axis=-1)
    picked: U32 = words.reshape(-1)[tokens - first * _LANES] if many else words[np.arange(len(tokens)), tokens % _LANES]
    return picked


def _noise(words: U32) -> npt.NDArray[np.float64]:
    """-log(-log u) of u = (word + 1/2) / 2^32."""
    return -np.log(-np.log((words.astype(np.float64) + 0.5) * 2.0**-32))


def _bound(words: U32) -> Row:
    """The noise or more, up to `_SLACK`, for one quick logarithm: -log(-log u) <= -log(1 - u)."""
    rest = (~words).astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    return np.asarray(-np.log(rest))
