"""Prompt lookup: the same text, copies found, and each guess the one that looking would find."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgekit.errors import BadRequest
from edgekit.runtime.llm.accept import Accepted
from edgekit.runtime.llm.drafters import Ask, NoDraft
from edgekit.runtime.llm.drafters.ngram import NgramDraft
from edgekit.runtime.llm.probs import Sampling
from edgekit.runtime.llm.tree import Shape, Source, TokenTree
from tests.runtime.llm.drafters.copying import ASKS, BUSH, Rule, assert_fits, steps, text
from tests.runtime.llm.fake_lm import VOCAB, FakeLM, greedy_text

TEXT = st.lists(st.integers(0, 2), min_size=1, max_size=30).map(tuple)
CHAIN = Ask(Shape.chain(5))


def by_looking(tokens, longest, shortest, depth):
    """Copy `depth` tokens from the latest place that the longest suffix stands before, the copies included."""
    for length in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                going = list(tokens)
                for place in range(end, end + depth):
                    going.append(going[place])
                return end, going[len(tokens) :]
    return None, []


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_the_text_is_that_without_drafts(temperature, ask):
    """Greedy and sampled, for chains and trees, from a prompt with repetitions."""
    sampling = Sampling(temperature=temperature, top_p=0.95, seed=7)
    prompt = (3, 1, 4, 3, 1, 4, 3, 1)
    plain = text(steps(NoDraft(), FakeLM().verifier(), prompt, 60, Ask(), sampling))
    drafted = steps(NgramDraft(shortest=1), FakeLM().verifier(), prompt, 60, ask, sampling)
    assert text(drafted) == plain
    if temperature == 0:
        assert plain == greedy_text(prompt, 60)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=20), st.sampled_from(ASKS))
def test_the_text_is_the_same_for_any_prompt(seed, prompt, ask):
    """Random prompts and seeds at a high temperature; the model's window makes copies wrong now and then."""
    sampling, lm = Sampling(temperature=1.2, seed=seed), FakeLM(window=2)
    plain = text(steps(NoDraft(), lm.verifier(), prompt, 25, Ask(), sampling))
    assert text(steps(NgramDraft(longest=4, shortest=1), lm.verifier(), prompt, 25, ask, sampling)) == plain


@pytest.mark.parametrize("period", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("depth", [1, 4, 12])
def test_every_draft_stands_in_a_periodic_text(period, depth):
    """One period and the start of the next are enough: from then on each step gives all it can."""
    prompt = (*range(period), *(place % period for place in range(2)))
    verifier = Rule(lambda context: context[-period], period)
    done = steps(NgramDraft(), verifier, prompt, 10 * (depth + 1), Ask(Shape.chain(depth)))
    assert {len(step.tokens) for step in done} == {depth + 1}


@settings(max_examples=300)
@given(TEXT, st.integers(1, 3), st.integers(0, 5), st.integers(1, 9))
@example((0,) * 30, 2, 6, 9)
def test_a_chain_is_the_copy_found_by_looking(tokens, shortest, more, depth):
    """Longest suffix, latest place, going on with the copy where the text ends; and it says where it copied from."""
    tree = NgramDraft(shortest + more, shortest).propose(tokens, Ask(Shape.chain(depth)))
    end, drafts = by_looking(tokens, shortest + more, shortest, depth)
    assert (tree.tokens[0], list(tree.tokens[1:])) == (tokens[-1], drafts)
    assert_fits(tree, Ask(Shape.chain(depth)))
    for draft, source in zip(tree.tokens[1:], tree.sources[1:], strict=True):
        assert (source.drafter, source.document) == ("ngram", "")
        assert tokens[source.offset] == draft
    if drafts:
        assert tree.sources[1] == Source("ngram", "", end)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 30), TEXT), min_size=1, max_size=5), st.integers(0, 6))
def test_a_drafter_has_no_memory_of_other_texts(edits, room):
    """Texts that grow, are cut back or change: the tree that a new drafter proposes, within shape and room."""
    drafter, tokens = NgramDraft(4, 1), (1,)
    for kept, more in edits:
        tokens = (tokens[:kept] + more)[:31]
        for shape in (Shape.chain(4), BUSH):
            ask = Ask(shape, room=room)
            tree = drafter.propose(tokens, ask)
            fresh = NgramDraft(4, 1).propose(tokens, ask)
            assert (tree, tree.tokens[0]) == (fresh, tokens[-1])
            assert_fits(tree, ask)


def test_siblings_are_the_other_continuations():
    """Where one context went two ways, a tree has both, the latest first, and then those of shorter matches."""
    tokens = (5, 1, 2, 3, 9, 1, 2, 4, 8, 2, 6, 1, 2)
    shape = Shape((-1, 0, 0, 0, 1, 2), (0, 0, 1, 2, 0, 0))
    tree = NgramDraft(longest=4, shortest=1).propose(tokens, Ask(shape))
    assert tree.tokens == (2, 4, 3, 6, 8, 9)
    assert tree.parents == (-1, 0, 0, 0, 1, 2)
    assert [source.offset for source in tree.sources[1:]] == [7, 3, 10, 8, 4]
    assert tree.log_q[1] == tree.log_q[2] > tree.log_q[3]


def test_longer_matches_and_agreement_are_surer():
    """The same continuation after one, two and three tokens in common; then twice instead of once."""
    drafter = NgramDraft(longest=8, shortest=1)
    once = [drafter.propose((*ends, 7, 5, *ends), CHAIN).log_q[1] for ends in ((1,), (1, 2), (1, 2, 3))]
    assert once == sorted(once)
    assert len(set(once)) == 3
    twice = drafter.propose((1, 7, 5, 1, 7, 6, 1), CHAIN).log_q[1]
    assert twice > once[0]
    divided = drafter.propose((1, 8, 5, 1, 7, 6, 1), CHAIN).log_q[1]
    assert divided < once[0]


@pytest.mark.parametrize("ask", [Ask(), Ask(Shape.chain(5), room=0), CHAIN, Ask(BUSH)])
def test_nothing_to_copy_is_the_root_alone(ask):
    """One token, tokens that were never there, or no room: ordinary decoding."""
    drafter = NgramDraft()
    for tokens in ((4,), (1, 2, 3, 4), (10**9, 2**31, 10**9)):
        assert drafter.propose(tokens, ask) == TokenTree(tokens[-1:], (-1,))


def test_equal_tokens_are_continued():
    """A text of one token over and over: as deep as asked, and no siblings, for there are none."""
    drafter = NgramDraft()
    assert drafter.propose((6,) * 500, CHAIN).tokens == (6,) * 6
    assert drafter.propose((6,) * 501, Ask(BUSH)).is_chain
    assert drafter.propose((6,) * 3, Ask(Shape.chain(20), room=7)).tokens == (6,) * 8


def test_what_happened_does_not_matter():
    """`observe` changes nothing: the text says all."""
    drafter, rule = NgramDraft(), Rule(lambda context: 0, 9)
    tokens = (1, 2, 3, 1, 2)
    tree = drafter.propose(tokens, CHAIN)
    drafter.observe(tree, Accepted((0, 1), (3, 8)), rule.score(tokens, tree))
    assert drafter.propose(tokens, CHAIN) == tree


def test_the_lengths_are_checked():
    """The defaults are two to eight tokens; zero is refused."""
    drafter = NgramDraft()
    assert (drafter.shortest, drafter.longest, drafter.name, drafter.outputs) == (2, 8, "ngram", ())
    with pytest.raises(BadRequest, match="shortest"):
        NgramDraft(longest=3, shortest=4)
