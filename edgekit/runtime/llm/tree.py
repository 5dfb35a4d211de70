"""The token tree: what a drafter proposes and a verifier scores in one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgekit.errors import BadRequest


class Source(NamedTuple):
    """Where a draft came from; `document` and `offset` (in tokens) where it was copied from a text."""

    drafter: str
    document: str = ""
    offset: int = -1


class Shape(NamedTuple):
    """A topology to fill: node 0 is the root, and node i the `ranks[i]`-th best child (from 0) of `parents[i]`."""

    parents: tuple[int, ...] = (-1,)
    ranks: tuple[int, ...] = (0,)

    @staticmethod
    @lru_cache(maxsize=64)
    def chain(depth: int) -> Shape:
        """`depth` drafts, one after the other; depth 0 is the root alone."""
        return Shape(tuple(range(-1, depth)), (0,) * (depth + 1))

    @property
    def depth(self) -> int:
        """Longest path, in drafts."""
        return max(_depths(self.parents))


@dataclass(frozen=True)
class TokenTree:
    """Tokens hanging from one root, parents before children; the root is the last token of the text so far.

    `parents[0]` is -1. Siblings are distinct tokens, so that a drawn token names at most one child. Ordinary decoding
    is the tree that has only its root.

    Attributes:
        tokens: one per node.
        parents: index of each node's parent.
        log_q: the drafter's log-probability of each node given its parent, nan where unknown; or empty.
        sources: where each node came from; or empty.
        q: float64 (nodes, vocabulary), row i the law that the children of node i were drawn from; rejection sampling
            needs it of drafters that draw.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    log_q: tuple[float, ...] = ()
    sources: tuple[Source, ...] = ()
    q: npt.NDArray[np.float64] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.parents[:1] != (-1,) or len(self.parents) != len(self.tokens):
            raise BadRequest(
                f"a token tree of {len(self.tokens)} tokens has parents {self.parents[:8]}; it needs one parent per "
                "token, the first of them -1"
            )
        if len(self.tokens) == 1:
            return  # every token of ordinary decoding comes by here
        if any(extra and len(extra) != len(self.tokens) for extra in (self.log_q, self.sources)):
            raise BadRequest("log_q and sources of a token tree have one entry per node, or none at all")
        children = set()
        for node, (token, parent) in enumerate(zip(self.tokens[1:], self.parents[1:], strict=True), start=1):
            if not 0 <= parent < node:
                raise BadRequest(f"node {node} of a token tree has parent {parent}; a parent comes before its children")
            if (parent, token) in children:
                raise BadRequest(f"node {node} of a token tree repeats token {token} of a sibling; merge the two")
            children.add((parent, token))

    @classmethod
    def chain(
        cls, root: int, drafts: Sequence[int] = (), log_q: Sequence[float] = (), source: Source | None = None
    ) -> TokenTree:
        """A tree without branches: `drafts` follow `root` one after the other, each with its `log_q`, if given."""
        size = 1 + len(drafts)
        return cls(
            (root, *drafts),
            tuple(range(-1, len(drafts))),
            (0.0, *log_q) if log_q else (),
            (source,) * size if source else (),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether every node hangs from the one before it."""
        return self.parents == tuple(range(-1, len(self.tokens) - 1))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """How far each node is from the root."""
        return _depths(self.parents)

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that carries `token`, if there is one."""
        for index in range(node + 1, len(self.tokens)):
            if self.parents[index] == node and self.tokens[index] == token:
                return index
        return None

    def children(self, node: int) -> tuple[int, ...]:
        """The children of `node`, in their order."""
        return tuple(index for index in range(node + 1, len(self.tokens)) if self.parents[index] == node)

    def sees(self) -> npt.NDArray[np.bool_]:
        """Who may attend to whom: oneself and one's ancestors; (nodes, nodes)."""
        if self.is_chain:
            return _triangle(len(self.tokens))
        sees = np.eye(len(self.tokens), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                sees[node] |= sees[parent]
        return sees

    def keep(self, nodes: Sequence[int]) -> TokenTree:
        """The tree of these nodes, ascending and each with its parent; the root is the first of them."""
        index = {node: place for place, node in enumerate(nodes)} | {-1: -1}
        return TokenTree(
            tuple(self.tokens[n] for n in nodes),
            tuple(index[self.parents[n]] for n in nodes),
            tuple(self.log_q[n] for n in nodes) if self.log_q else (),
            tuple(self.sources[n] for n in nodes) if self.sources else (),
            None if self.q is None else self.q[list(nodes)],
        )

    def pruned(self, depth: int, nodes: int) -> TokenTree:
        """The first `nodes` nodes that are at most `depth` below the root."""
        if len(self) <= min(nodes, depth + 1):  # n nodes are never deeper than n - 1
            return self
        return self.keep([node for node, below in enumerate(self.depths) if below <= depth][:nodes])

    def spine(self) -> TokenTree:
        """The chain of first children."""
        if self.is_chain:
            return self
        path = [0]
        while below := self.children(path[-1]):
            path.append(below[0])
        return self.keep(path)

    def after(self, lead: Sequence[int]) -> TokenTree:
        """The same topology hanging from a chain of earlier tokens, whose first is the new root; for scoring."""
        if not lead:
            return self
        shift = len(lead)
        return TokenTree((*lead, *self.tokens), (*range(-1, shift - 1), *(parent + shift for parent in self.parents)))

    def from_drafter(self, source: Source) -> TokenTree:
        """The same tree, every node of it from `source`."""
        return replace(self, sources=(source,) * len(self))


def _depths(parents: Sequence[int]) -> tuple[int, ...]:
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return tuple(depths)


@lru_cache(maxsize=8)
def _triangle(size: int) -> npt.NDArray[np.bool_]:
    """The mask of a chain; made once for the few sizes in use, so read-only."""
    triangle = np.tri(size, dtype=bool)
    triangle.flags.writeable = False
    return triangle
