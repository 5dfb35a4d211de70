"""What the tests of drafters with a model share: other models, trees of any shape, and a verifier without a cache."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from hypothesis import strategies as st

from edgekit.bundle.manifest import TensorSpec
from edgekit.runtime.backends import Array
from edgekit.runtime.backends.fake import FakeSession
from edgekit.runtime.llm.tree import Shape, TokenTree
from edgekit.runtime.llm.verifier import Scores
from tests.runtime.llm.fake_lm import VOCAB, FakeLM, logits_after

Path = tuple[int, ...]


class OtherLM(FakeLM):
    """A FakeLM of another vocabulary and another mind: its rows are a blend of the fake model's and of its own.

    Args:
        width: its vocabulary.
        likeness: 1 thinks as the fake model does, 0 has nothing in common with it.
        spread: makes its rows flatter or steeper.
    """

    def __init__(self, width: int = VOCAB, likeness: float = 0.7, spread: float = 1.0, **options) -> None:
        super().__init__(**options)
        self.width, self.likeness, self.spread = width, likeness, spread
        self.decoding = msgspec.structs.replace(self.decoding, vocab_size=width)

    def session(self, *, live: bool = True) -> FakeSession:
        session = super().session(live=live)
        logits = TensorSpec("logits", "float32", (1, "rows", self.width))
        session.outputs = (logits, *session.outputs[1:])
        return session

    def answer(self, feeds):
        out = super().answer(feeds)
        return {**out, "logits": np.stack([self.own(row) for row in out["logits"][0]])[None]}

    def own(self, row: Array) -> Array:
        """Its row where the fake model has `row`."""
        mind = np.random.default_rng(zlib.crc32(row.tobytes())).normal(size=self.width)
        common = np.zeros(self.width)
        shared = min(len(row), self.width)
        common[:shared] = row[:shared]
        return (self.spread * (self.likeness * common + (1 - self.likeness) * mind)).astype(np.float32)

    def after(self, text: Sequence[int]) -> Array:
        """Its row after a text, by definition."""
        return self.own(logits_after(text, self.window))


class Slow:
    """The slow, obvious verifier: every row from scratch, of any model given as a function of the text.

    Attributes:
        calls: runs so far.
    """

    def __init__(self, after: Callable[[Path], Array], context: int = 10_000) -> None:
        self.after, self.context_length = after, context
        self.calls = 0

    def score(self, tokens: Path, tree: TokenTree) -> Scores:
        assert tree.tokens[0] == tokens[-1]
        assert len(tokens) - 1 + len(tree) <= self.context_length
        self.calls += 1
        return Scores(np.stack([self.after((*tokens, *path)) for path in paths(tree)]).astype(np.float32))

    def keep(self, path: Sequence[int]) -> None:
        assert path[0] == 0


def paths(tree: TokenTree) -> list[Path]:
    """Of each node the tokens from the root, itself left out, down to it."""
    found: list[Path] = [()]
    for token, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True):
        found.append((*found[parent], token))
    return found


@st.composite
def shapes(draw: st.DrawFn, nodes: int = 9) -> Shape:
    """Any topology of up to `nodes` nodes in any order, siblings ranked as they come."""
    parents = [-1]
    for node in range(1, draw(st.integers(1, nodes))):
        parents.append(draw(st.integers(0, node - 1)))
    return Shape(tuple(parents), tuple(parents[:node].count(parent) for node, parent in enumerate(parents)))
