"""Prompt lookup: propose what followed the last time the text went like this.

After Saxena 2023 (prompt lookup decoding) and SAM decoding (arXiv:2411.10666). No second model, nothing to load.
"""

from __future__ import annotations

from edgekit.runtime.llm.accept import Accepted
from edgekit.runtime.llm.drafters import Ask
from edgekit.runtime.llm.drafters.suffix import Copy, SuffixIndex, agreement, fill
from edgekit.runtime.llm.tree import Source, TokenTree
from edgekit.runtime.llm.verifier import Scores

CROWD = 8  # earlier places looked at: enough to tell agreement from chance


class NgramDraft:
    """Copies from the prompt and the text so far: longest match first, of equals the most recent.

    A copy that reaches the end of the text goes on with what it copied, so a period is continued to any depth.

    Args:
        longest: suffix looked up, in tokens; vLLM's `prompt_lookup_max`.
        shortest: a match below this many tokens proposes nothing; vLLM's `prompt_lookup_min`.

    Raises:
        BadRequest: not 1 <= shortest <= longest.
    """

    name = "ngram"
    outputs: tuple[str, ...] = ()

    def __init__(self, longest: int = 8, shortest: int = 2) -> None:
        self._index = SuffixIndex(longest, shortest)
        self.longest, self.shortest = longest, shortest

    def propose(self, tokens: tuple[int, ...], ask: Ask) -> TokenTree:
        """What followed; the root alone where nothing matches."""
        self._index.follow(tokens)
        depth = min(len(ask.shape.parents) - 1, ask.room)
        bushy = any(ask.shape.ranks)
        found = self._index.matches(CROWD, shorter=bushy) if depth > 0 else ()
        if not found:
            return TokenTree(tokens[-1:], (-1,))
        copies = [Copy(length, end, _run(tokens, end, depth)) for length, end in found]
        size = len(tokens)

        def origin(copy: Copy, depth: int) -> Source:
            return Source(self.name, "", copy.place + depth % (size - copy.place))

        if bushy:
            return fill(tokens[-1], ask, copies, origin, Source(self.name))
        drafts, log_q = copies[0].run, agreement(copies)
        sources = [origin(copies[0], place) for place in range(depth)]
        return TokenTree(
            (tokens[-1], *drafts), ask.shape.parents[: depth + 1], (0.0, *log_q), (Source(self.name), *sources)
        )

    def observe(self, tree: TokenTree, step: Accepted, scores: Scores) -> None:
        """Nothing to learn but the text itself, which `propose` is given."""


def _run(tokens: tuple[int, ...], place: int, depth: int) -> tuple[int, ...]:
    """`depth` tokens from `place` on, begun again from there where the text ends."""
    run = tokens[place : place + depth]
    return run if len(run) == depth else (run * (depth // len(run) + 1))[:depth]
