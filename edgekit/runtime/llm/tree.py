"""The token tree: what a drafter proposes and a verifier scores in one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from edgekit.errors import BadRequest


@dataclass(frozen=True)
class TokenTree:
    """Tokens hanging from one root, parents before children; the root is the last token of the text so far.

    `parents[0]` is -1. Siblings are distinct tokens, so that a drawn token names at most one child. Ordinary decoding
    is the tree that has only its root.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.parents[:1] != (-1,) or len(self.parents) != len(self.tokens):
            raise BadRequest(
                f"a token tree of {len(self.tokens)} tokens has parents {self.parents[:8]}; it needs one parent per "
                "token, the first of them -1"
            )
        if len(self.tokens) == 1:
            return  # every token of ordinary decoding comes by here
        children = set()
        for node, (token, parent) in enumerate(zip(self.tokens[1:], self.parents[1:], strict=True), start=1):
            if not 0 <= parent < node:
                raise BadRequest(f"node {node} of a token tree has parent {parent}; a parent comes before its children")
            if (parent, token) in children:
                raise BadRequest(f"node {node} of a token tree repeats token {token} of a sibling; merge the two")
            children.add((parent, token))

    @classmethod
    def chain(cls, root: int, drafts: Sequence[int] = ()) -> TokenTree:
        """A tree without branches: `drafts` follow `root` one after the other."""
        return cls((root, *drafts), tuple(range(-1, len(drafts))))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether every node hangs from the one before it."""
        return self.parents == tuple(range(-1, len(self.tokens) - 1))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """How far each node is from the root."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that carries `token`, if there is one."""
        for index in range(node + 1, len(self.tokens)):
            if self.parents[index] == node and self.tokens[index] == token:
                return index
        return None

    def sees(self) -> npt.NDArray[np.bool_]:
        """Who may attend to whom: oneself and one's ancestors; (nodes, nodes)."""
        if self.is_chain:
            return _triangle(len(self.tokens))
        sees = np.eye(len(self.tokens), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                sees[node] |= sees[parent]
        return sees

    def pruned(self, depth: int, nodes: int) -> TokenTree:
        """The first `nodes` nodes that are at most `depth` below the root."""
        if len(self) <= min(nodes, depth + 1):  # n nodes are never deeper than n - 1
            return self
        kept = [node for node, below in enumerate(self.depths) if below <= depth][:nodes]
        index = {node: place for place, node in enumerate(kept)} | {-1: -1}
        return TokenTree(tuple(self.tokens[n] for n in kept), tuple(index[self.parents[n]] for n in kept))

    def after(self, lead: Sequence[int]) -> TokenTree:
        """The same tree hanging from a chain of earlier tokens, whose first is the new root."""
        if not lead:
            return self
        shift = len(lead)
        return TokenTree((*lead, *self.tokens), (*range(-1, shift - 1), *(parent + shift for parent in self.parents)))


@lru_cache(maxsize=8)
def _triangle(size: int) -> npt.NDArray[np.bool_]:
    """The mask of a chain; made once for the few sizes in use, so read-only."""
    triangle = np.tri(size, dtype=bool)
    triangle.flags.writeable = False
    return triangle
