"""Lookahead decoding: the same text, a pool that remembers, and a window that improves its guesses."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import BadRequest
from edgekit.runtime.llm.accept import Accepted
from edgekit.runtime.llm.drafters import Ask, NoDraft
from edgekit.runtime.llm.drafters.lookahead import WINDOW, LookaheadDraft, Pool
from edgekit.runtime.llm.probs import Sampling
from edgekit.runtime.llm.tree import Shape, Source, TokenTree
from edgekit.runtime.llm.verifier import Scores
from tests.runtime.llm.drafters.copying import ASKS, BUSH, WIDE, Rule, assert_fits, steps, text
from tests.runtime.llm.fake_lm import VOCAB, FakeLM, greedy_text

PROMPT = (3, 1, 4, 1, 5)
CHAIN = Ask(Shape.chain(4))


def orbit(token: int) -> int:
    """One step of a walk through all of 0 to 96."""
    return (token + 36) % 97


def window_paths(tree: TokenTree) -> list[tuple[int, ...]]:
    """From the root, itself left out, to each leaf of the window."""
    inner = set(tree.parents)
    found = []
    for leaf in (node for node in range(1, len(tree)) if node not in inner and tree.sources[node].drafter == WINDOW):
        path, node = [], leaf
        while node:
            path.insert(0, tree.tokens[node])
            node = tree.parents[node]
        found.append(tuple(path))
    return found


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_the_text_is_that_without_drafts(temperature, ask):
    """Greedy and sampled; in a chain, in a tree with a few columns of the window, and with all of it."""
    sampling = Sampling(temperature=temperature, top_p=0.95, seed=7)
    plain = text(steps(NoDraft(), FakeLM().verifier(), PROMPT, 60, Ask(), sampling))
    assert text(steps(LookaheadDraft(ngram=3), FakeLM().verifier(), PROMPT, 60, ask, sampling)) == plain
    assert temperature or plain == greedy_text(PROMPT, 60)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(2, 5), st.integers(1, 3), st.sampled_from(ASKS))
def test_the_text_is_the_same_with_any_window(seed, window, ngram, guesses, ask):
    """One drafter over two requests, with a sliding model at a high temperature."""
    drafter, lm = LookaheadDraft(window, ngram, guesses, pool=5), FakeLM(window=2)
    sampling = Sampling(temperature=1.2, seed=seed)
    for prompt in (PROMPT, (seed % VOCAB,)):
        plain = text(steps(NoDraft(), lm.verifier(), prompt, 25, Ask(), sampling))
        assert text(steps(drafter, lm.verifier(), prompt, 25, ask, sampling)) == plain


@pytest.mark.parametrize("period", [4, 5, 9, 30])
def test_every_draft_stands_in_a_periodic_text(period):
    """After one period and a token each step gives N tokens, as many as an n-gram has."""
    verifier = Rule(lambda context: context[-period], period)
    done = steps(LookaheadDraft(ngram=5), verifier, (*range(period), 0), 100, CHAIN)
    assert {len(step.tokens) for step in done} == {5}


def test_equal_tokens_are_continued():
    """A text of one token over and over."""
    tree = LookaheadDraft(ngram=4).propose((6,) * 9, CHAIN)
    assert tree.tokens == (6, 6, 6, 6)


@pytest.mark.parametrize("ask", [Ask(), CHAIN, Ask(BUSH, room=0)])
@pytest.mark.parametrize("tokens", [(4,), (1, 2, 3, 4, 5, 6), (10**9, 2**31)])
def test_nothing_known_is_the_root_alone(tokens, ask):
    """One token, or one that came for the first time, where the window has no place."""
    assert LookaheadDraft().propose(tokens, ask).tokens == tokens[-1:]


@settings(max_examples=100)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=20).map(tuple), min_size=1, max_size=4), st.integers(0, 9)
)
def test_chains_are_the_latest_n_gram(texts, room):
    """Texts that change altogether: the draft is how the last token went on the last time in any of them."""
    drafter = LookaheadDraft(ngram=3)
    seen: list[tuple[int, ...]] = []
    for tokens in texts:
        new = LookaheadDraft(ngram=3)
        seen += [tokens[place : place + 3] for place in range(len(tokens) - 2)]
        tree = drafter.propose(tokens, Ask(Shape.chain(5), room=room))
        assert_fits(tree, Ask(Shape.chain(5), room=room))
        if tokens == texts[0]:
            follow = [gram[1:] for gram in seen if gram[0] == tokens[-1]]
            assert tree.tokens[1:] == (follow[-1][:room] if follow else ())
        new.propose(tokens, CHAIN)
        drafter.propose(tokens[: len(tokens) // 2] or (0,), CHAIN)


# ---------------------------------------------------------------------------------------------- the window


def test_the_window_is_the_papers():
    """W - 1 guesses in a row, and from the root and from each of them a column of N - 2: W(N - 1) rows in all."""
    drafter = LookaheadDraft(window=4, ngram=5)
    tree = drafter.propose(tuple(range(50, 90)), Ask(WIDE))
    assert len(tree) == 4 * 4
    paths = window_paths(tree)
    assert [len(path) for path in paths] == [3, 4, 5, 6]
    spine = paths[-1][:3]
    assert [path[:place] for place, path in enumerate(paths)] == [spine[:place] for place in range(4)]
    assert all(math.isnan(confidence) for confidence in tree.log_q[1:])


def test_the_window_takes_what_is_left():
    """No more nodes than the shape has and none deeper, whole columns only."""
    tokens = tuple(range(50, 90))
    for nodes in range(2, 20):
        shape = Shape((*range(-1, nodes - 2), 0), (*[0] * (nodes - 1), 1))
        for room in (0, 2, 5, 99):
            tree = LookaheadDraft(window=4, ngram=4).propose(tokens, Ask(shape, room=room))
            assert len(tree) <= nodes
            assert max(tree.depths) <= min(room, shape.depth)
            assert [len(path) for path in window_paths(tree)] == list(range(2, 2 + len(window_paths(tree))))


def test_first_guesses_are_the_prompts_and_always_the_same():
    """Tokens of the text at addressed places: two drafters begin alike, another text begins otherwise."""
    tokens = tuple(range(40, 80))
    one, other = (LookaheadDraft().propose(tokens, Ask(WIDE)) for _ in range(2))
    assert one.tokens == other.tokens
    assert set(one.tokens) <= set(tokens)
    assert LookaheadDraft().propose(tokens[:-1], Ask(WIDE)).tokens[1:] != one.tokens[1:]


def test_guesses_become_the_models_own():
    """After N - 1 steps each column is a chain of the model's own words, and so are the n-grams it leaves."""
    drafter, rule = LookaheadDraft(window=5, ngram=4), Rule(lambda context: orbit(context[-1]), 97)
    tokens = (11, 12, 13, 14)
    for _ in range(4):
        tree = drafter.propose(tokens, Ask(WIDE))
        scores = rule.score(tokens, tree)
        drafter.observe(tree, Accepted((0,), (orbit(tokens[-1]),)), scores)
        tokens += (orbit(tokens[-1]),)
    for column in drafter._columns:
        assert list(column[1:]) == [orbit(token) for token in column[:-1]]
    for column in drafter._columns[1:]:
        assert drafter._pool.after((column[0] - 36) % 97)[0] == tuple(column)


def test_the_window_speeds_up_what_never_repeats():
    """A walk that never comes back: the pool of the text is no help, the guesses of the window are."""
    prompt = (1, 30, 55, 80, 12, 66, 7)  # the first guesses are tokens of the text
    chained = steps(LookaheadDraft(), Rule(lambda c: orbit(c[-1]), 97), prompt, 80, CHAIN)
    assert len(chained) == 80
    ahead = steps(LookaheadDraft(), Rule(lambda c: orbit(c[-1]), 97), prompt, 80, Ask(WIDE))
    assert text(ahead) == text(chained)
    assert len(ahead) < 60


def test_columns_that_were_not_scored_keep_their_guesses():
    """A tree cut before scoring loses rows and nothing else."""
    drafter, rule = LookaheadDraft(window=3, ngram=3), Rule(lambda context: orbit(context[-1]), 97)
    tokens = (11, 12, 13, 14)
    tree = drafter.propose(tokens, Ask(WIDE))
    before = list(drafter._columns)
    cut = tree.pruned(depth=1, nodes=50)
    drafter.observe(cut, Accepted((0,), (40,)), rule.score(tokens, cut))
    assert drafter._columns[1:] == before[1:]
    assert drafter._columns[0] == (before[0][1], orbit(before[0][1]))


def test_a_new_text_gets_a_new_window():
    """Guesses about another text are dropped, n-grams are kept."""
    drafter = LookaheadDraft(ngram=3)
    drafter.propose((1, 2, 3, 4, 5, 6), Ask(WIDE))
    tree = drafter.propose((7, 8, 1), Ask(WIDE))
    assert tree.tokens[:3] == (1, 2, 3)
    assert tree.sources[1] == tree.sources[2] == Source("lookahead")
    assert set(tree.tokens[3:]) <= {7, 8, 1}


# ------------------------------------------------------------------------------------------------ the pool


def test_drafts_that_fall_teach_what_the_model_says_after_them():
    """The argmax after a fallen draft ends an n-gram, whose first tokens may lie before the root."""
    drafter = LookaheadDraft(ngram=3)
    tokens = (1, 2, 3, 1)
    tree = drafter.propose(tokens, CHAIN)
    assert tree.tokens == (1, 2, 3)
    logits = np.zeros((3, 20), np.float32)
    logits[1, 11] = logits[2, 12] = 1
    drafter.observe(tree, Accepted((0,), (9,)), Scores(logits))
    assert drafter._pool.after(1) == [(2, 11), (2, 3)]
    assert drafter._pool.after(2) == [(3, 12), (3, 1)]
    drafter.observe(tree, Accepted((0, 1, 2), (2, 3, 12)), Scores(logits))
    assert drafter._pool.after(2) == [(3, 12), (3, 1)]


def test_steps_of_others_are_passed_over():
    """A step without drafts, or of a tree that hangs from another text, teaches nothing."""
    drafter, logits = LookaheadDraft(ngram=2), np.zeros((2, 9), np.float32)
    drafter.observe(TokenTree.chain(3, [4], source=Source("lookahead")), Accepted((0,), (5,)), Scores(logits))
    drafter.propose((1, 2), CHAIN)
    drafter.observe(TokenTree.chain(3, [4], source=Source("lookahead")), Accepted((0,), (5,)), Scores(logits))
    drafter.observe(TokenTree.chain(2), Accepted((0,), (5,)), Scores(logits))
    drafter.observe(TokenTree.chain(2, [4], source=Source("ngram")), Accepted((0,), (5,)), Scores(logits))
    assert [drafter._pool.after(token) for token in range(6)] == [[], [(2,)], [], [], [], []]


def test_the_pool_keeps_the_latest():
    """So many n-grams of a token and so many tokens; what is seen again is the latest again."""
    pool = Pool(guesses=2, tokens=2)
    for gram in ((1, 5), (1, 6), (1, 5), (1, 7)):
        pool.add(gram)
    assert pool.after(1) == [(7,), (5,)]
    for gram in ((2, 5), (1, 5), (3, 5)):
        pool.add(gram)
    assert [pool.after(token) for token in (1, 2, 3)] == [[(5,), (7,)], [], [(5,)]]


def test_siblings_are_the_other_n_grams():
    """In a tree the n-grams that begin otherwise stand beside the latest one."""
    tokens = (1, 5, 6, 1, 7, 8, 1)
    tree = LookaheadDraft(ngram=3).propose(tokens, Ask(Shape((-1, 0, 0, 1, 2), (0, 0, 1, 0, 0))))
    assert tree.tokens == (1, 7, 5, 8, 6)
    assert_fits(tree, Ask(BUSH))
    assert all(source == Source("lookahead") for source in tree.sources)


@pytest.mark.parametrize("wrong", [{"window": 0}, {"ngram": 1}, {"guesses": 0}, {"pool": 0}])
def test_sizes_are_checked(wrong):
    """An n-gram has two tokens at least; the defaults are those of the paper's small setting."""
    with pytest.raises(BadRequest, match="at least"):
        LookaheadDraft(**wrong)
    assert (LookaheadDraft().window, LookaheadDraft().ngram) == (7, 5)
