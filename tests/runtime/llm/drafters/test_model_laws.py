"""What a draft model draws from: the law it gives is the one it drew from, and rejection sampling can rely on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations, product
from math import exp

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.runtime.llm.drafters import Ask, NoDraft
from edgekit.runtime.llm.drafters.model import ModelDraft, drawn, likeliest
from edgekit.runtime.llm.generate import generate
from edgekit.runtime.llm.probs import Sampling
from edgekit.runtime.llm.rules import Rejection
from edgekit.runtime.llm.tree import Shape, TokenTree
from tests.runtime.llm.drafters.copying import BUSH, assert_fits, steps, text
from tests.runtime.llm.drafters.drafting import OtherLM
from tests.runtime.llm.fake_lm import VOCAB, FakeLM

PROMPT = (3, 1, 4, 1, 5)
LOUD = Sampling(temperature=1.0)
SAMPLINGS = [
    Sampling(repetition_penalty=1.3),
    Sampling(temperature=0.8, seed=5),
    Sampling(temperature=1.2, top_p=0.9, min_p=0.02, repetition_penalty=1.2, seed=9),
]


def strangeness(seen: Counter, law: dict[tuple[int, ...], float]) -> float:
    """How many standard deviations chi-square is above its mean; cells below five expected are one cell."""
    total = seen.total()
    assert seen.keys() <= law.keys()
    cells = [(seen[cell], total * weight) for cell, weight in law.items()]
    small = [cell for cell in cells if cell[1] < 5]
    pooled = [cell for cell in cells if cell[1] >= 5] + ([tuple(map(sum, zip(*small, strict=True)))] if small else [])
    chi = sum((count - wanted) ** 2 / wanted for count, wanted in pooled)
    return (chi - (len(pooled) - 1)) / (2 * (len(pooled) - 1)) ** 0.5


@settings(max_examples=100)
@given(st.lists(st.floats(-4, 4), min_size=4, max_size=VOCAB), st.sampled_from(SAMPLINGS), st.integers(1, 4))
def test_each_pick_is_the_draw_that_is_left(logits, sampling, count):
    """The next best is what would be drawn if the ones before could not be, also where filters left only one."""
    row = np.array(logits, np.float32)
    before = row.copy()
    picks = likeliest(row, (1, 2, 3), count, replace(sampling, top_k=1))
    np.testing.assert_array_equal(row, before)
    for token, log_q in picks:
        heat = sampling.temperature or 1.0
        assert token == replace(sampling, top_k=1)(row, (1, 2, 3))
        assert exp(log_q) == pytest.approx(np.exp(before[token] / heat) / np.exp(before / heat).sum(), rel=1e-4)
        row[token] = -np.inf
    assert len({token for token, _ in picks}) == count


def test_siblings_are_drawn_without_replacement():
    """Over seeds the ordered pairs have the probabilities of drawing twice from an urn, and q is the urn."""
    lm = OtherLM(4, spread=0.8)
    draft = ModelDraft(lm.verifier(), rows=True)
    shape = Shape((-1, 0, 0, 1), (0, 0, 1, 0))
    law = LOUD.law(lm.after((1, 2)), (1, 2))
    seen, below = Counter(), {token: Counter() for token in range(4)}
    for seed in range(2500):
        tree = draft.propose((1, 2), Ask(shape, replace(LOUD, seed=seed)))
        np.testing.assert_allclose(tree.q[0], law)
        seen[tree.tokens[1:3]] += 1
        below[tree.tokens[1]][tree.tokens[3:]] += 1
    pairs = {(a, b): law[a] * law[b] / (1 - law[a]) for a, b in permutations(range(4), 2)}
    assert strangeness(seen, pairs) < 4
    assert strangeness(seen, dict.fromkeys(pairs, 1 / 12)) > 20
    for token, counts in below.items():
        after = LOUD.law(lm.after((1, 2, token)), (1, 2, token))
        assert strangeness(counts, {(b,): after[b] for b in range(4)}) < 4


def test_a_law_without_enough_tokens_gives_fewer_siblings():
    """Filters that leave two tokens leave two siblings, best noise first."""
    law = np.array([0.0, 0.7, 0.0, 0.3])
    assert {token for token, _ in drawn(law, 4, 1, 2)} == {1, 3}
    assert drawn(law, 1, 1, 2) == drawn(law, 4, 1, 2)[:1]
    tree = ModelDraft(OtherLM().verifier(), rows=True).propose(PROMPT, Ask(BUSH, replace(LOUD, top_k=2, seed=4)))
    assert len(tree.children(0)) == 2
    assert_fits(tree, Ask(BUSH))


def rejected(lm: OtherLM, draft: ModelDraft, shape: Shape, seeds: int, spoil: Callable[[TokenTree], TokenTree]):
    """Texts of three tokens by rejection sampling, over seeds."""

    class Spoilt:
        outputs = ()

        def propose(self, tokens, ask):
            return spoil(draft.propose(tokens, ask))

        def observe(self, tree, step, scores):
            draft.observe(tree, step, scores)

    seen, drafter, verifier = Counter(), Spoilt(), lm.verifier()
    for seed in range(seeds):
        sampling = replace(LOUD, seed=seed)
        ask = Ask(shape, sampling)
        rule = Rejection(sampling)
        done = generate((1, 2), drafter=drafter, verifier=verifier, accept=rule, ask=ask, max_new_tokens=3)
        seen[tuple(text(list(done)))] += 1
    return seen


@pytest.mark.parametrize(
    ("shape", "stop_below"), [(Shape.chain(2), 0.3), (Shape((-1, 0, 0, 1, 1, 2), (0, 0, 1, 0, 1, 0)), 0.0)]
)
def test_rejection_keeps_the_targets_law(shape, stop_below):
    """Texts of three tokens have the target's joint probabilities; with the laws of other drafts they would not."""
    lm, other = OtherLM(3, 1.0), OtherLM(3, 0.2, spread=1.5)
    joint = {}
    for tokens in product(range(3), repeat=3):
        joint[tokens] = 1.0
        for place, token in enumerate(tokens):
            context = (1, 2, *tokens[:place])
            joint[tokens] *= LOUD.law(lm.after(context), context)[token]
    draft = ModelDraft(other.verifier(), rows=True, stop_below=stop_below)
    assert strangeness(rejected(lm, draft, shape, 600, lambda tree: tree), joint) < 4

    def uniform(tree):
        return tree if tree.q is None else replace(tree, q=np.full_like(tree.q, 1 / 3))

    assert strangeness(rejected(lm, draft, shape, 600, uniform), joint) > 8


def test_own_draw_does_not_mind_drawn_siblings():
    """Trees with laws give the text of plain decoding too, whose drafts are then those of the same noise."""
    sampling = Sampling(temperature=0.9, top_p=0.95, seed=8)
    plain = text(steps(NoDraft(), FakeLM().verifier(), PROMPT, 30, Ask(), sampling))
    draft = ModelDraft(OtherLM().verifier(), rows=True)
    done = steps(draft, FakeLM().verifier(), PROMPT, 30, Ask(BUSH, sampling), sampling)
    assert text(done) == plain
    assert len(done) < 25
