"""Own-draw acceptance: the verifier draws its own token at every node and walks to the child that equals it.

The text is what plain decoding would have drawn with the same noise, so a draft changes how fast text comes and never
which text, at any temperature and for every drafter. Drafters need give no probabilities. (Coupled speculative
sampling, after Daliri, Musco and Suresh 2024, arXiv:2408.07978; greedy decoding is the case without noise.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple, Protocol

from edgekit.runtime.backends import Array
from edgekit.runtime.llm.tree import Source, TokenTree


class Accepted(NamedTuple):
    """One step: the nodes walked, root first, and the tokens they add to the text.

    `tokens` holds one token per node of `path`: the tokens of `path[1:]`, then the one drawn at its end. `sources` says
    where each of them came from, None for the model itself; it is empty where the drafter did not say.
    """

    path: tuple[int, ...]
    tokens: tuple[int, ...]
    sources: tuple[Source | None, ...] = ()


def accepted(tree: TokenTree, path: list[int], last: int) -> Accepted:
    """The step that walks `path` and then draws `last`."""
    tokens = (*(tree.tokens[node] for node in path[1:]), last)
    return Accepted(tuple(path), tokens, (*(tree.sources[node] for node in path[1:]), None) if tree.sources else ())


class Accept(Protocol):
    """An acceptance rule."""

    def __call__(
        self, tree: TokenTree, logits: Array, context: tuple[int, ...], ends: Collection[int] = ()
    ) -> Accepted:
        """Which nodes stand, and the token after them.

        Args:
            tree: what was scored; its root is the last token of `context`.
            logits: one row per node, float32 (nodes, vocabulary).
            context: all tokens so far.
            ends: tokens after which nothing is drawn.
        """


class Draw(Protocol):
    """What chooses a token: a pure function of the row and of the text before it."""

    def __call__(self, logits: Array, context: tuple[int, ...]) -> int:
        """The token that follows `context`; `logits` is its row, float32 (vocabulary,)."""


def own_draw(
    tree: TokenTree, logits: Array, context: tuple[int, ...], ends: Collection[int] = (), *, draw: Draw
) -> Accepted:
    """Walk the tree along the verifier's own draws; see `Accept`. `draw` chooses the token at a node."""
    return walk(tree, context, ends, lambda node, text: draw(logits[node], text))


def walk(
    tree: TokenTree,
    context: tuple[int, ...],
    ends: Collection[int],
    choose: Callable[[int, tuple[int, ...]], int],
) -> Accepted:
    """From the root to the child that carries the token chosen, until no child does or the text ends.

    Args:
        tree: its root is the last token of `context`.
        context: all tokens so far.
        ends: tokens after which nothing is chosen.
        choose: the token that follows a node, given the node and all tokens before the choice.
    """
    path, chosen = [0], [choose(0, context)]
    while chosen[-1] not in ends:
        child = tree.child(path[-1], chosen[-1])
        if child is None:
            break
        path.append(child)
        chosen.append(choose(child, (*context, *chosen)))
    return accepted(tree, path, chosen[-1])
