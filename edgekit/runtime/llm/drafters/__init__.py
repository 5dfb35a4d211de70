"""Drafters: guesses of what the model will say. One class each, one row in DRAFTERS.

A drafter may be wrong at no cost but time: acceptance draws from the verifier's own rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from edgekit.runtime.llm.accept import Accepted
from edgekit.runtime.llm.tree import TokenTree
from edgekit.runtime.llm.verifier import Scores


class Drafter(Protocol):
    """Proposes a tree, and is told what became of it."""

    def propose(self, tokens: tuple[int, ...]) -> TokenTree:
        """A tree whose root is `tokens[-1]`."""

    def observe(self, step: Accepted, scores: Scores) -> None:
        """The outcome of the last proposal; `scores` is valid during the call only."""


class NoDraft:
    """Ordinary decoding: a tree with only its root."""

    def propose(self, tokens: tuple[int, ...]) -> TokenTree:
        """The root alone."""
        return TokenTree(tokens[-1:], (-1,))

    def observe(self, step: Accepted, scores: Scores) -> None:
        """Nothing to learn."""


DRAFTERS: dict[str, Callable[[], Drafter]] = {"none": NoDraft}
