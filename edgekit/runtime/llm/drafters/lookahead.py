"""Lookahead decoding: the model guesses ahead of itself, in the run that verifies (Fu et al. 2024, arXiv:2402.02057).

Two branches share a run. The verify branch proposes n-grams that begin with the last token, from a pool. The lookahead
branch feeds the pool: a window of guesses that Jacobi iteration improves, one step per run, with the model's argmax.

The window of the paper has W columns and N - 1 rows, and the guess in row r and column c stands c + r places after the
last token. It sees row 0 up to its column and then its own column, so the window is a tree as it stands: row 0 is a
chain from the root, and each column hangs from its guess in it. The last token itself is row 0 of column 0.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from math import nan

from edgekit.errors import BadRequest
from edgekit.runtime.llm.accept import Accepted
from edgekit.runtime.llm.drafters import Ask
from edgekit.runtime.llm.drafters.suffix import Copy, Gram, fill, shared
from edgekit.runtime.llm.tree import Source, TokenTree
from edgekit.runtime.llm.verifier import Scores
from edgekit.runtime.random import philox_u32

WINDOW = "lookahead-window"  # the source of guesses that are there to be improved rather than to stand


class LookaheadDraft:
    """N-grams from the model's own guesses.

    Where the shape asked for is a chain, only the verify branch is proposed. The pool is then fed by the text and by
    what the model says after drafts that fall. Where the shape has siblings, its nodes that no n-gram fills carry as
    many columns of the window as fit them, none deeper than the shape.

    Args:
        window: columns W of the window.
        ngram: tokens N of an n-gram, the one it begins with included.
        guesses: n-grams kept of those that begin with the same token, the latest seen; G of the paper.
        pool: tokens with n-grams, the latest seen.

    Raises:
        BadRequest: an argument below its least value, which is 2 for `ngram` and 1 for the others.
    """

    name = "lookahead"
    outputs: tuple[str, ...] = ()

    def __init__(self, window: int = 7, ngram: int = 5, guesses: int = 7, pool: int = 4096) -> None:
        if window < 1 or ngram < 2 or guesses < 1 or pool < 1:
            raise BadRequest(
                f"lookahead has window {window}, ngram {ngram}, guesses {guesses}, pool {pool}; "
                "ngram is at least 2 and the others at least 1"
            )
        self.window, self.ngram = window, ngram
        self._pool = Pool(guesses, pool)
        self._tokens: Gram = ()
        self._columns: list[Gram] = []  # N - 1 guesses each, row 0 first; none before the window is first asked for

    def propose(self, tokens: tuple[int, ...], ask: Ask) -> TokenTree:
        """The latest n-grams that begin with the last token, and the window where there is room for it."""
        self._read(tokens)
        copies = [Copy(1, -1, gram) for gram in self._pool.after(tokens[-1])]
        tree = fill(tokens[-1], ask, copies, lambda copy, depth: Source(self.name), Source(self.name))  # noqa: ARG005
        if any(ask.shape.ranks) and len(tree) < len(ask.shape.parents):
            return self._with_window(tree, ask)
        return tree

    def observe(self, tree: TokenTree, step: Accepted, scores: Scores) -> None:
        """Take the next guesses, and what the model says after drafts that fell, from the rows."""
        if len(tree) == 1 or tree.tokens[:1] != self._tokens[-1:]:
            return
        if self._columns:
            self._improve(tree, scores)
        ends = [self._tokens[1 - self.ngram :]]  # of the text that each node makes
        for node, source in enumerate(tree.sources[1:], start=1):
            ends.append((*ends[tree.parents[node]], tree.tokens[node])[1 - self.ngram :])
            if source.drafter == self.name and node not in step.path and len(ends[node]) == self.ngram - 1:
                self._pool.add((*ends[node], int(scores.logits[node].argmax())))

    def _read(self, tokens: Gram) -> None:
        """Feed the pool with what is new in the text."""
        kept = shared(self._tokens, tokens)
        if kept < len(self._tokens):
            self._columns = []
        for end in range(max(kept + 1, self.ngram), len(tokens) + 1):
            self._pool.add(tokens[end - self.ngram : end])
        self._tokens = tokens

    def _with_window(self, tree: TokenTree, ask: Ask) -> TokenTree:
        """Add columns, the first ones first, while they fit; where a draft says the same they share its node."""
        if not self._columns:
            words = philox_u32((self.window, self.ngram - 1), seed=0, draw=len(self._tokens)) % len(self._tokens)
            self._columns = [tuple(self._tokens[place] for place in column) for column in words.tolist()]
        depth, most = min(ask.shape.depth, ask.room), len(ask.shape.parents)
        tokens, parents, children = list(tree.tokens), list(tree.parents), _children(tree)
        for path in self._paths():
            known = _walk(children, path)
            if len(path) > depth or len(tokens) + len(path) - len(known) + 1 > most:
                break
            node = known[-1]
            for token in path[len(known) - 1 :]:
                parents.append(node)
                children[node, token] = node = len(tokens)
                tokens.append(token)
        more = len(tokens) - len(tree)
        return TokenTree(
            tuple(tokens), tuple(parents), (*tree.log_q, *[nan] * more), (*tree.sources, *[Source(WINDOW)] * more)
        )

    def _paths(self) -> Iterator[Gram]:
        """Of each column the tokens from the root, itself left out, to the last row."""
        spine: Gram = ()
        for number, column in enumerate(self._columns):
            spine = (*spine, column[0]) if number else ()
            yield (*spine, *column[1:])

    def _improve(self, tree: TokenTree, scores: Scores) -> None:
        """One Jacobi step: a column moves up a row, and the model's argmax after its last guess is the new last."""
        children = _children(tree)
        for number, path in enumerate(list(self._paths())):
            known = _walk(children, path)
            if len(known) <= len(path):  # not in the tree that was scored: it keeps its guesses
                continue
            column = self._columns[number] if number else (tree.tokens[0], *self._columns[0][1:])
            gram = (*column, int(scores.logits[known[-1]].argmax()))
            self._pool.add(gram)
            self._columns[number] = gram[1:]


class Pool:
    """The n-grams seen last, by the token they begin with.

    Args:
        guesses: n-grams kept of a token.
        tokens: tokens kept.
    """

    def __init__(self, guesses: int, tokens: int) -> None:
        self._guesses, self._most = guesses, tokens
        self._grams: OrderedDict[int, OrderedDict[Gram, None]] = OrderedDict()

    def add(self, gram: Gram) -> None:
        """Remember an n-gram as the latest."""
        grams = self._grams.setdefault(gram[0], OrderedDict())
        grams[gram[1:]] = None
        grams.move_to_end(gram[1:])
        self._grams.move_to_end(gram[0])
        if len(grams) > self._guesses:
            grams.popitem(last=False)
        if len(self._grams) > self._most:
            self._grams.popitem(last=False)

    def after(self, token: int) -> list[Gram]:
        """What followed `token`, the latest first."""
        return list(reversed(self._grams.get(token, ())))


def _children(tree: TokenTree) -> dict[tuple[int, int], int]:
    """The child of each node by its token."""
    return {link: node for node, link in enumerate(zip(tree.parents, tree.tokens, strict=True)) if node}


def _walk(children: dict[tuple[int, int], int], path: Gram) -> list[int]:
    """The nodes from the root along `path`, as far as it goes."""
    nodes = [0]
    for token in path:
        if (nodes[-1], token) not in children:
            break
        nodes.append(children[nodes[-1], token])
    return nodes
