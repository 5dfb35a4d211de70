"""The loop: drafts change how fast text comes, never which text."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.runtime.llm.accept import Accepted, own_draw
from edgekit.runtime.llm.drafters import Ask, Drafter, NoDraft
from edgekit.runtime.llm.generate import generate
from edgekit.runtime.llm.probs import Sampling
from edgekit.runtime.llm.tree import TokenTree
from edgekit.runtime.llm.verifier import Scores
from tests.runtime.llm.fake_lm import VOCAB, FakeLM, greedy_text, logits_after

PROMPT = (3, 1, 4, 1, 5)


class Guesser:
    """Random trees, some of whose branches follow the right text for a while."""

    def __init__(self, seed: int, window: int | None = None) -> None:
        self.random, self.window = np.random.default_rng(seed), window
        self.seen: list[Accepted] = []

    def propose(self, tokens: tuple[int, ...], ask: Ask) -> TokenTree:
        nodes, parents, paths = [tokens[-1]], [-1], [list(tokens)]
        for _ in range(self.random.integers(0, 8)):
            parent = int(self.random.integers(0, len(nodes)))
            right = int(logits_after(paths[parent], self.window).argmax())
            token = right if self.random.random() < 0.7 else int(self.random.integers(0, VOCAB))
            if not any(p == parent and n == token for p, n in zip(parents, nodes, strict=True)):
                nodes.append(token)
                parents.append(parent)
                paths.append([*paths[parent], token])
        return TokenTree(tuple(nodes), tuple(parents))

    def observe(self, tree: TokenTree, step: Accepted, scores: Scores) -> None:
        assert scores.logits.shape[1] == VOCAB
        self.seen.append(step)


def run(drafter: Drafter, sampling: Sampling, lm: FakeLM, count: int = 30, ends=(), live=True) -> list[Accepted]:
    return list(
        generate(
            PROMPT,
            drafter=drafter,
            verifier=lm.verifier(live=live),
            accept=partial(own_draw, draw=sampling),
            ends=ends,
            max_new_tokens=count,
        )
    )


def text(steps: list[Accepted]) -> list[int]:
    return [token for step in steps for token in step.tokens]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dialect", ["ort", "std", "concat"])
def test_greedy_text_is_the_models_own(dialect, window):
    """Without drafts the loop gives the text that the model's definition gives without any of edgekit."""
    steps = run(NoDraft(), Sampling(), FakeLM(dialect, window))
    assert text(steps) == greedy_text(PROMPT, 30, window)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.7, 1.5]),
    st.sampled_from([1.0, 1.2]),
    st.booleans(),
    st.sampled_from([None, 3]),
)
def test_any_drafter_gives_the_text_of_none(seed, temperature, penalty, live, window):
    """Random trees, at any temperature, with a penalty that looks at each node's own path: the same tokens."""
    sampling = Sampling(temperature=temperature, top_p=0.95, repetition_penalty=penalty, seed=seed)
    lm = FakeLM("ort", window)
    plain = text(run(NoDraft(), sampling, lm, ends=(0,)))
    guesser = Guesser(seed, window)
    steps = run(guesser, sampling, lm, ends=(0,), live=live)
    assert text(steps) == plain
    assert guesser.seen == steps


def test_good_guesses_save_steps():
    """A drafter that is mostly right needs fewer verifier calls than there are tokens."""
    steps = run(Guesser(1), Sampling(), FakeLM())
    assert text(steps) == greedy_text(PROMPT, 30)
    assert len(steps) < 20


def test_nothing_is_drawn_after_an_end():
    """A draft that runs past the end-of-sequence token is cut there."""

    class Oracle(Guesser):
        def propose(self, tokens, ask):
            return TokenTree.chain(tokens[-1], greedy_text(tokens, 6))

    end = greedy_text(PROMPT, 30)[8]
    right = greedy_text(PROMPT, 30, ends=(end,))
    assert right[-1] == end
    assert text(run(Oracle(0), Sampling(), FakeLM(), ends=(end,))) == right


@pytest.mark.parametrize("count", [1, 2, 7])
def test_no_step_goes_past_the_limit(count):
    """max_new_tokens is exact, drafts or not."""
    assert text(run(Guesser(3), Sampling(), FakeLM(), count)) == greedy_text(PROMPT, count)


def test_the_context_is_the_other_limit():
    """The text ends when every position of the context is used, also when a bushy tree would not fit."""

    class Bush(Guesser):
        def propose(self, tokens, ask):
            return TokenTree((tokens[-1], *range(VOCAB)), (-1,) + (0,) * VOCAB)

    for drafter in (Guesser(3), Bush(0)):
        steps = run(drafter, Sampling(), FakeLM(context=16), 100)
        assert text(steps) == greedy_text(PROMPT, 16 - len(PROMPT))
