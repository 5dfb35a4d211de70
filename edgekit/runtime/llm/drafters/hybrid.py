"""Two drafters in one: the cheap one where it is sure, the other where it is not."""

from __future__ import annotations

from math import inf, log

from edgekit.errors import BadRequest
from edgekit.runtime.llm.accept import Accepted
from edgekit.runtime.llm.drafters import Ask, Drafter
from edgekit.runtime.llm.tree import TokenTree
from edgekit.runtime.llm.verifier import Scores


class HybridDraft:
    """Copies where the text repeats itself, and asks a model where it does not.

    While `first` is sure, `second` is not asked: a draft model's cache catches up in one run when its turn comes.
    `TokenTree.sources` says which of the two a draft is from.

    Args:
        first: asked every time, so it ought to be quick; it gives probabilities (`TokenTree.log_q`).
        second: asked where `first` is not sure.
        sure: `first` is, if its best first draft has at least this probability. An n-gram that stands once before has
            m / (m + 1) after a match of m tokens: 0.75 asks for three.

    Raises:
        BadRequest: `sure` is no probability.
    """

    name = "hybrid"

    def __init__(self, first: Drafter, second: Drafter, *, sure: float = 0.75) -> None:
        if not 0 <= sure <= 1:
            raise BadRequest(f"sure is {sure}; it is a probability, between 0 and 1")
        self.first, self.second = first, second
        self.outputs = (*first.outputs, *second.outputs)
        self.members = (first.name, second.name)
        self._least = (log(sure) if sure > 0 else -inf) - 1e-9  # 3 / 4 is sure enough for 0.75, however it is rounded

    def propose(self, tokens: tuple[int, ...], ask: Ask) -> TokenTree:
        """The tree of one of the two; that of `first` also where `second` has none."""
        quick = self.first.propose(tokens, ask.to(self.first.name))
        if quick.log_q and any(quick.log_q[node] >= self._least for node in quick.children(0)):
            return quick
        slow = self.second.propose(tokens, ask.to(self.second.name))
        return slow if len(slow) > 1 else quick

    def observe(self, tree: TokenTree, step: Accepted, scores: Scores) -> None:
        """Both hear of it."""
        self.first.observe(tree, step, scores)
        self.second.observe(tree, step, scores)
