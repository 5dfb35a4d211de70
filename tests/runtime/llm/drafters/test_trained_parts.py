"""What trained drafters need of the loop: hidden states of the tokens that stand, and trees with a law of their own.

The drafter here is Medusa (Cai et al. 2024, arXiv:2401.10774) in small: linear heads on `hidden.k`, fitted in the test.
"""

from __future__ import annotations

from functools import partial
from math import exp
from typing import Any

import numpy as np
import pytest

from edgekit.bundle.store import new_bundle, read_bundle
from edgekit.runtime.backends import open_session
from edgekit.runtime.llm.accept import own_draw
from edgekit.runtime.llm.drafters import Ask, NoDraft
from edgekit.runtime.llm.drafters.hybrid import HybridDraft
from edgekit.runtime.llm.drafters.model import likeliest
from edgekit.runtime.llm.drafters.ngram import NgramDraft
from edgekit.runtime.llm.generate import generate
from edgekit.runtime.llm.probs import Sampling
from edgekit.runtime.llm.tree import Shape, Source, TokenTree
from edgekit.runtime.llm.verifier import LocalVerifier
from tests.runtime.llm.drafters.copying import assert_fits, text
from tests.runtime.llm.drafters.drafting import paths

tiny = pytest.importorskip("tests.export.language.tiny")

pytestmark = pytest.mark.torch

K = 2  # layers below the hidden state that the heads read
PROMPT = (5, 17, 3, 42, 8, 77, 30)
LENGTH = 60
SHAPE = Shape((-1, 0, 0, 1, 1, 2, 3), (0, 0, 1, 0, 1, 0, 0))
SAMPLINGS = [Sampling(), Sampling(temperature=0.8, seed=6)]


class Heads:
    """Head d says what stands d + 2 places after a token whose hidden state it is given; the tree is their product.

    Args:
        weights: (heads, width, vocabulary).
    """

    name = "heads"
    outputs = (f"hidden.{K}",)

    def __init__(self, weights: np.ndarray) -> None:
        self.weights = weights
        self._tokens: tuple[int, ...] = ()
        self._known: tuple[int, ...] = ()  # the text up to the token that `_hidden` is of
        self._hidden = np.zeros(weights.shape[1], np.float32)
        self.read: list[tuple[tuple[int, ...], np.ndarray]] = []  # (text, hidden state of its last token)

    def propose(self, tokens, ask):
        self._tokens = tokens
        if tokens[:-1] != self._known:  # nothing is known of a text that is not the one observed
            return TokenTree.chain(tokens[-1], source=Source(self.name))
        nodes, parents, log_q, at, seen = [tokens[-1]], [-1], [0.0], {0: 0}, [()]
        places = list(zip(ask.shape.parents, ask.shape.ranks, strict=True))
        depths = TokenTree(tuple(range(len(places))), ask.shape.parents).depths
        for place, (parent, rank) in enumerate(places):
            if place == 0 or depths[place] > min(ask.room, len(self.weights)):
                continue
            row = (self._hidden @ self.weights[depths[place] - 1]).astype(np.float32)
            path = seen[at[parent]]
            token, chance = likeliest(row, (*tokens, *path), rank + 1, ask.sampling)[rank]
            at[place] = len(nodes)
            nodes.append(token)
            parents.append(at[parent])
            log_q.append(chance)
            seen.append((*path, token))
        sources = (Source(self.name),) * len(nodes)
        return TokenTree(tuple(nodes), tuple(parents), tuple(log_q), sources)

    def observe(self, tree, step, scores):
        rows = scores.extra[self.outputs[0]]
        assert rows.shape == (len(tree), self.weights.shape[1])
        for place, node in enumerate(step.path):
            self.read.append(((*self._tokens, *step.tokens[:place]), rows[node].copy()))
        self._known, self._hidden = self.read[-1]


@pytest.fixture(scope="module", params=["ort", "std"])
def bundle(request, tmp_path_factory):
    """A tiny decoder of random weights that also gives the residual stream after K layers."""
    from edgekit.export.language.export import export_language

    folder = tiny.save_model(tiny.make_model("llama"), tmp_path_factory.mktemp("models") / "llama")
    target = tmp_path_factory.mktemp("bundles") / "tiny.bundle"
    with new_bundle(target) as draft:
        draft.seal(export_language(folder, draft.root, dialect=request.param, hidden=(1, K)))
    return read_bundle(target)


def verifier_of(bundle: Any) -> LocalVerifier:
    decoding = bundle.manifest.decoding
    session = open_session(bundle.root / bundle.manifest.parts[decoding.part].graph, threads=1)
    return LocalVerifier(session, decoding, granule=2)


def run(bundle, drafter, sampling, prompt=PROMPT, shape=SHAPE, verifier=None):
    """The steps of the loop."""
    accept, ask = partial(own_draw, draw=sampling), Ask(shape, sampling)
    verifier = verifier or verifier_of(bundle)
    return list(generate(prompt, drafter=drafter, verifier=verifier, accept=accept, ask=ask, max_new_tokens=LENGTH))


def hidden_of(bundle, tokens) -> np.ndarray:
    """The hidden state of every token, from scratch in one run."""
    scores = verifier_of(bundle).score(tokens[:1], TokenTree.chain(tokens[0], tokens[1:]))
    return scores.extra[f"hidden.{K}"].copy()


@pytest.fixture(scope="module")
def weights(bundle) -> np.ndarray:
    """Three heads, fitted by least squares to what the model says greedily and sampled, from a few prompts."""
    states, later = [], []
    for seed in range(12):
        prompt = PROMPT if seed < 2 else tuple(np.random.default_rng(seed).integers(3, tiny.VOCAB, 5).tolist())
        sampling = SAMPLINGS[seed % 2]
        tokens = (*prompt, *text(run(bundle, NoDraft(), sampling, prompt)))
        states.append(hidden_of(bundle, tokens)[:-4])
        later.append([[tokens[place + 2 + head] for place in range(len(tokens) - 4)] for head in range(3)])
    hidden, wanted = np.concatenate(states), np.concatenate(later, axis=1)
    one_hot = np.eye(tiny.VOCAB)[wanted]
    gram = hidden.T @ hidden + 1e-2 * np.eye(hidden.shape[1])
    return 12 * np.stack([np.linalg.solve(gram, hidden.T @ target) for target in one_hot])


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_text_is_that_without_drafts(bundle, weights, sampling):
    """Greedy and at 0.8: heads fitted to the model save steps, and trees with siblings do not change a token."""
    plain = text(run(bundle, NoDraft(), sampling))
    drafter = Heads(weights)
    done = run(bundle, drafter, sampling)
    assert text(done) == plain
    assert len(done) < 0.8 * len(plain)
    assert any(path != tuple(range(len(path))) for path in (step.path for step in done))  # a sibling stood


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_any_heads_give_the_same_text(bundle, weights, sampling):
    """Heads that know nothing are wrong, and that is all."""
    plain = text(run(bundle, NoDraft(), sampling))
    wild = Heads(np.random.default_rng(0).normal(size=weights.shape))
    assert text(run(bundle, wild, sampling)) == plain
    assert text(run(bundle, HybridDraft(NgramDraft(shortest=1), Heads(weights), sure=0.6), sampling)) == plain


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_hidden_rows_are_those_of_the_tokens_that_stand(bundle, weights, sampling):
    """Every row read along an accepted path, beside fallen siblings, is the one that the whole text gives at once."""
    drafter = Heads(weights)
    done = run(bundle, drafter, sampling)
    tokens = (*PROMPT, *text(done))
    right = hidden_of(bundle, tokens)
    assert [len(known) for known, _ in drafter.read] == list(range(len(PROMPT), len(tokens)))
    for known, row in drafter.read:
        assert known == tokens[: len(known)]
        np.testing.assert_allclose(row, right[len(known) - 1], atol=2e-4 * np.abs(right).max())
    apart = np.abs(right[1:] - right[:-1]).max(axis=1).min()
    assert apart > 10 * 2e-4 * np.abs(right).max()  # so a row of the place beside it would be noticed


def test_rows_of_fallen_nodes_are_those_of_their_own_text(bundle):
    """All nodes of a tree have the hidden state that their path has as a text, after a prefill and after a step."""
    verifier = verifier_of(bundle)
    tree = TokenTree((30, 4, 9, 11, 4, 60), (-1, 0, 0, 1, 2, 4))
    for tokens in (PROMPT, (*PROMPT, 9, 4, 30)):
        scores = verifier.score(tokens, tree)
        rows = scores.extra[f"hidden.{K}"].copy()
        assert scores.extra.keys() == {"hidden.1", f"hidden.{K}"}
        for path, row in zip(paths(tree), rows, strict=True):
            right = hidden_of(bundle, (*tokens, *path))[-1]
            np.testing.assert_allclose(row, right, atol=2e-4 * np.abs(right).max())
        verifier.keep((0, 2, 4))


def test_the_tree_is_the_heads_own(bundle, weights):
    """Its law is that of the heads: siblings fill the shape and carry their probabilities at the temperature."""
    sampling = SAMPLINGS[1]
    drafter = Heads(weights)
    done = run(bundle, drafter, sampling)
    known, hidden = drafter.read[-1]
    tokens = (*known, done[-1].tokens[-1])
    tree = drafter.propose(tokens, Ask(SHAPE, sampling))
    assert_fits(tree, Ask(SHAPE, sampling))
    assert len(tree) == len(SHAPE.parents)
    for node in range(1, len(tree)):
        row = hidden @ weights[tree.depths[node] - 1] / sampling.temperature
        law = np.exp(row - row.max())
        assert exp(tree.log_q[node]) == pytest.approx(law[tree.tokens[node]] / law.sum(), rel=1e-3)
    assert len(drafter.propose((*tokens, 1), Ask(SHAPE, sampling))) == 1  # a text it has not seen
    assert len(drafter.propose(tokens, Ask(SHAPE, sampling, room=1))) == 3


def test_one_drafter_serves_many_texts(bundle, weights):
    """A second request, cut back into the first, on the same verifier: no state of the old text is used."""
    drafter, verifier = Heads(weights), verifier_of(bundle)
    first = text(run(bundle, drafter, Sampling(), verifier=verifier))
    prompt = (*PROMPT, *first[:9], 4)
    plain = text(run(bundle, NoDraft(), Sampling(), prompt))
    drafter.read.clear()
    assert text(run(bundle, drafter, Sampling(), prompt, verifier=verifier)) == plain
    right = hidden_of(bundle, (*prompt, *plain))
    for known, row in drafter.read:
        np.testing.assert_allclose(row, right[len(known) - 1], atol=2e-4 * np.abs(right).max())
