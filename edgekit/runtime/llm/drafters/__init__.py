"""Drafters: guesses of what the model will say. One file each, one row in `speculation.DRAFTERS`.

A drafter may be wrong at no cost but time: acceptance draws from the verifier's own rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

from edgekit.runtime.llm.accept import Accepted
from edgekit.runtime.llm.probs import Sampling
from edgekit.runtime.llm.tree import Shape, TokenTree
from edgekit.runtime.llm.verifier import Scores

ROOM = 1 << 30
ALIKE: Mapping[str, Shape] = MappingProxyType({})


class Ask(NamedTuple):
    """How much to draft.

    Attributes:
        shape: the topology wanted; a drafter fills what it can of it, and never more.
        sampling: how the model will draw. Its noise is addressed, so a drafter with a distribution of its own guesses
            best by drawing from that with the very same noise.
        room: drafts that can still be used, counted downwards from the root.
        shapes: the topologies wanted of the drafters that one of several is made of, by name, where they differ.
    """

    shape: Shape = Shape()
    sampling: Sampling = Sampling()
    room: int = ROOM
    shapes: Mapping[str, Shape] = ALIKE

    def to(self, drafter: str) -> Ask:
        """What to ask one of several drafters for."""
        return self._replace(shape=self.shapes.get(drafter, self.shape))


class Drafter(Protocol):
    """Proposes a tree, and is told what became of it.

    The text is the caller's: `tokens` may grow, be cut back or change altogether between calls. What a drafter keeps
    is a memory of it.

    Attributes:
        name: its row in DRAFTERS.
        outputs: graph outputs of the verifier it reads besides the logits, such as `hidden.3`.
    """

    name: str
    outputs: tuple[str, ...]

    def propose(self, tokens: tuple[int, ...], ask: Ask) -> TokenTree:
        """A tree whose root is `tokens[-1]`."""

    def observe(self, tree: TokenTree, step: Accepted, scores: Scores) -> None:
        """The outcome: `tree` as it was scored, what of it stands, and the rows; `scores` is valid in the call only.

        Steps while a controller lets every drafter rest are not told.
        """


class NoDraft:
    """Ordinary decoding: a tree with only its root."""

    name = "none"
    outputs: tuple[str, ...] = ()

    def propose(self, tokens: tuple[int, ...], ask: Ask) -> TokenTree:  # noqa: ARG002
        """The root alone."""
        return TokenTree(tokens[-1:], (-1,))

    def observe(self, tree: TokenTree, step: Accepted, scores: Scores) -> None:
        """Nothing to learn."""
