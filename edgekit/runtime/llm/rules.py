"""Acceptance rules: which drafts stand. Two keep the model's distribution, the others say by name that they do not.

    own-draw        the model's own draw, whatever was drafted: the text is that of plain decoding, token for token
    rejection       speculative sampling: the distribution is that of plain decoding, the text is another draw from it
    lossy-typical   own draw, and drafts probable enough for the entropy of the model's distribution (Medusa)
    lossy-ratio     own draw, and drafts at least `gamma` times as probable as the best token (as in NEST)

At temperature 0 all of them accept the greedy token and nothing else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from edgekit.errors import BadRequest
from edgekit.runtime.backends import Array
from edgekit.runtime.llm.accept import Accept, Accepted, own_draw, walk
from edgekit.runtime.llm.probs import Law, Sampling, uniforms
from edgekit.runtime.llm.tree import TokenTree


class Rule(Accept, Protocol):
    """An acceptance rule that says what it promises; one serves one request.

    Attributes:
        lossless: whether the text has the distribution of plain decoding.
        disagreements: tokens so far that were not the model's own draw though a lossy rule let them pass; 0 for a
            lossless rule. By the coupling inequality its expectation bounds the total variation distance between the
            distributions of this text and of plain text.
    """

    @property
    def lossless(self) -> bool:
        """The promise."""

    @property
    def disagreements(self) -> int:
        """The count."""


class Chance(Protocol):
    """The random decisions at one position; independent of how the drafts were drawn."""

    def accepts(self, probability: float, test: int) -> bool:
        """Whether an event of this probability happens; `test` counts the events from 1."""

    def draws(self, law: Law) -> int:
        """A token from `law`."""


class PhiloxChance:
    """Chance with an address: decision `test` takes number `test` of `probs.uniforms`, the draw of a token number 0.

    Args:
        seed: of the request.
        position: number of tokens before the one decided on.
        tests: most events that will be asked for.
    """

    def __init__(self, seed: int, position: int, tests: int) -> None:
        self._numbers = uniforms(1 + tests, seed, position)

    def accepts(self, probability: float, test: int) -> bool:
        """Whether number `test` is below `probability`."""
        return bool(self._numbers[test] < probability)

    def draws(self, law: Law) -> int:
        """The token at which the running sum of `law` passes number 0 of the whole."""
        tokens = np.flatnonzero(law)
        sums = np.cumsum(law[tokens])
        place = int(np.searchsorted(sums, self._numbers[0] * sums[-1], side="right"))
        return int(tokens[min(place, len(tokens) - 1)])


def speculative_sample(law: Law, drafts: Sequence[int], q: Law | None, chance: Chance) -> int:
    """One token from `law`, one of `drafts` if possible.

    The first draft x passes with probability min(1, p(x) / q(x)); otherwise p becomes norm(max(p - q, 0)), q becomes
    norm(q without x), and the next draft is tried (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023,
    arXiv:2302.01318; siblings: Miao et al. 2023, arXiv:2305.09781; without replacement: Chen et al. 2024,
    arXiv:2402.12374). A draft that q gives no mass was not drawn but chosen, and its q is the point mass: it passes
    with probability p(x).

    Args:
        law: p, float64 (vocabulary,), of sum 1.
        drafts: distinct tokens, in the order in which they were drawn.
        q: what they were drawn from, without replacement, float64 (vocabulary,); None if all were chosen.
        chance: decides.
    """
    for test, token in enumerate(drafts, start=1):
        drawn_from = q if q is not None and q[token] > 0 else None
        ratio = float(law[token]) / (1.0 if drawn_from is None else float(drawn_from[token]))
        if chance.accepts(min(1.0, ratio), test):
            return token
        if drawn_from is None:
            law = _normalised(_without(law, token), law)
        else:
            law = _normalised(np.maximum(law - drawn_from, 0), law)
            q = _normalised(_without(drawn_from, token), drawn_from)
    return chance.draws(law)


@dataclass(frozen=True)
class OwnDraw:
    """The model's own draw, the default; see `accept.own_draw`."""

    sampling: Sampling
    lossless: ClassVar[bool] = True
    disagreements: ClassVar[int] = 0

    def __call__(
        self, tree: TokenTree, logits: Array, context: tuple[int, ...], ends: Collection[int] = ()
    ) -> Accepted:
        """See `Accept`."""
        return own_draw(tree, logits, context, ends, draw=self.sampling)


@dataclass(frozen=True)
class Rejection:
    """Speculative sampling at every node of the walk, by `speculative_sample`.

    `tree.q` holds what the drafts were drawn from. Without it they count as chosen, which keeps the distribution for
    every drafter, also for one that drew them, but accepts fewer.

    Random numbers are Philox stream 1 at (seed, position). Drafts may be drawn with the Gumbel noise of `sampling`,
    which is stream 0, and with nothing of stream 1. Whether a draft is in the tree must not depend on its own token:
    one left out for its low probability changes the distribution.

    Attributes:
        sampling: gives p at a node, and the seed.
        chance: makes the decisions at a position from (seed, position, number of tests).
    """

    sampling: Sampling
    chance: Callable[[int, int, int], Chance] = PhiloxChance
    lossless: ClassVar[bool] = True
    disagreements: ClassVar[int] = 0

    def __call__(
        self, tree: TokenTree, logits: Array, context: tuple[int, ...], ends: Collection[int] = ()
    ) -> Accepted:
        """See `Accept`."""

        def choose(node: int, text: tuple[int, ...]) -> int:
            drafts = [tree.tokens[child] for child in tree.children(node)]
            chance = self.chance(self.sampling.seed, len(text), len(drafts))
            q = None if tree.q is None else tree.q[node]
            return speculative_sample(self.sampling.law(logits[node], text), drafts, q, chance)

        return walk(tree, context, ends, choose)


@dataclass
class LossyRule(ABC):
    """The model's own draw; where no child is that, the most probable child among the tokens `allowed`, if any.

    A text without disagreements is that of plain decoding.
    """

    sampling: Sampling
    disagreements: int = field(default=0, init=False)
    lossless: ClassVar[bool] = False

    def __call__(
        self, tree: TokenTree, logits: Array, context: tuple[int, ...], ends: Collection[int] = ()
    ) -> Accepted:
        """See `Accept`."""

        def choose(node: int, text: tuple[int, ...]) -> int:
            own = self.sampling(logits[node], text)
            drafts = [tree.tokens[child] for child in tree.children(node)]
            if not drafts or own in drafts:
                return own
            law = self.sampling.law(logits[node], text)
            allowed = self.allowed(law)
            likely = max(drafts, key=lambda token: (allowed[token], law[token]))
            self.disagreements += int(allowed[likely])
            return likely if allowed[likely] else own

        return walk(tree, context, ends, choose)

    @abstractmethod
    def allowed(self, law: Law) -> npt.NDArray[np.bool_]:
        """Which tokens may stand for the model's own draw; (vocabulary,)."""


@dataclass
class LossyTypical(LossyRule):
    """Typical acceptance (Cai et al. 2024, Medusa, arXiv:2401.10774): p(x) > min(eps, delta exp(-H(p))), H in nats.

    Attributes:
        eps: a draft more probable than this always stands; in (0, 1].
        delta: how much less is enough where the model is undecided; above 0.
    """

    eps: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.eps <= 1:
            raise BadRequest(f"eps of lossy-typical is {self.eps}; it must be above 0 and at most 1")
        if not 0 < self.delta < math.inf:
            raise BadRequest(f"delta of lossy-typical is {self.delta}; it must be above 0")

    def allowed(self, law: Law) -> npt.NDArray[np.bool_]:
        """See `LossyRule`."""
        some = law[law > 0]
        entropy = -float(some @ np.log(some))
        return np.asarray(law > min(self.eps, self.delta * math.exp(-entropy)))


@dataclass
class LossyRatio(LossyRule):
    """Relaxed verification (after Li et al. 2024, NEST, arXiv:2405.19325): p(x) >= gamma max p.

    Attributes:
        gamma: in (0, 1]; at 1 only the most probable token stands besides the model's own draw.
    """

    gamma: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise BadRequest(f"gamma of lossy-ratio is {self.gamma}; it must be above 0 and at most 1")

    def allowed(self, law: Law) -> npt.NDArray[np.bool_]:
        """See `LossyRule`."""
        return np.asarray(law >= self.gamma * law.max())


RULES: dict[str, Callable[..., Rule]] = {
    "own-draw": OwnDraw,
    "rejection": Rejection,
    "lossy-typical": LossyTypical,
    "lossy-ratio": LossyRatio,
}


def _without(law: Law, token: int) -> Law:
    """A copy in which `token` has no mass."""
    rest: Law = law.copy()
    rest[token] = 0
    return rest


def _normalised(mass: Law, otherwise: Law) -> Law:
    """`mass` with sum 1; where rounding left nothing of it, `otherwise`."""
    total = float(mass.sum())
    normal: Law = mass / total if total > 0 else otherwise
    return normal
