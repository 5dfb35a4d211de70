"""The index and the tree that copying drafters share, beside slow and obvious twins."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgekit.errors import BadRequest
from edgekit.runtime.llm.drafters import Ask
from edgekit.runtime.llm.drafters.suffix import GUARD, Copy, SuffixIndex, agreement, branches, fill, shared
from edgekit.runtime.llm.tree import Shape, Source
from tests.runtime.llm.drafters.copying import BUSH, assert_fits

ALL = 10_000
TEXT = st.lists(st.integers(0, 2), min_size=1, max_size=GUARD - 2).map(tuple)
RUNS = st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=1, max_size=8)


def by_looking(tokens, longest, shortest):
    """(length, end) of all earlier ends like the text's, longest first, then the latest."""
    found = []
    for end in range(1, len(tokens)):
        length = 0
        while length < min(longest, end) and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        if length >= shortest:
            found.append((length, end))
    return sorted(found, reverse=True)


@settings(max_examples=200)
@given(TEXT, st.integers(1, 3), st.integers(0, 5))
@example((1,), 1, 0)
@example((1,) * 20, 2, 6)
def test_matches_are_those_found_by_looking(tokens, shortest, more):
    """All earlier ends of every suffix, longest first and then the latest, with their lengths."""
    index = SuffixIndex(shortest + more, shortest)
    index.follow(tokens)
    right = by_looking(tokens, shortest + more, shortest)
    assert index.matches(ALL, shorter=True) == right
    assert index.matches(ALL, shorter=False) == [match for match in right if match[0] == right[0][0]]
    assert index.matches(2, shorter=True) == right[:2]


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 40), TEXT), min_size=1, max_size=6))
def test_an_index_that_was_led_about_is_as_good_as_new(edits):
    """Texts that grow, are cut back, change at the end or altogether: the same matches as from a fresh index."""
    index, tokens = SuffixIndex(4, 1), ()
    for kept, more in edits:
        tokens = (tokens[:kept] + more)[: GUARD - 1]
        index.follow(tokens)
        assert index.matches(ALL, shorter=True) == by_looking(tokens, 4, 1)


def test_a_long_text_may_change_anywhere_near_its_end():
    """A text longer than the guard, cut back and grown another way, is told from the old one grown."""
    index = SuffixIndex(6, 2)
    base = tuple(index * index % 11 for index in range(300))
    for tokens in (base, base[:250] + base[:60], base[:290], (9, 9, 9, *base), base):
        index.follow(tokens)
        assert index.matches(ALL, shorter=True) == by_looking(tokens, 6, 2)


def test_a_step_costs_its_new_tokens():
    """What stood there before is neither entered again nor looked at."""

    class Counted(SuffixIndex):
        entered = 0

        def _add(self, end):
            Counted.entered += 1
            super()._add(end)

    index = Counted(8, 2)
    tokens = tuple(index * index % 101 for index in range(2000))
    index.follow(tokens)
    Counted.entered = 0
    index.follow((*tokens, 1, 2, 3))
    assert Counted.entered == 3


def test_a_text_that_differs_far_back_costs_guesses_only():
    """With the same end in the same place it passes as the old text; every match still is an end of the new text."""
    tokens = (*tuple(range(100)), 5, 6)
    index = SuffixIndex(4, 2)
    index.follow(tokens)
    other = (77,) * 50 + tokens[50:]
    assert shared(tokens, other) == len(tokens)
    index.follow((*other, 5, 6))
    assert all(0 < end < 104 for _, end in index.matches(ALL, shorter=True))


def test_shared_counts_what_two_texts_begin_with():
    """Growth, a cut, another end, another text, and none before."""
    tokens = tuple(range(200))
    assert shared((), tokens) == 0
    assert shared(tokens, (*tokens, 7)) == 200
    assert shared(tokens, tokens[:50]) == 50
    assert shared(tokens, (*tokens[:199], 0)) == 199
    assert shared(tokens, (*tokens[:180], *tokens)) == 180
    assert shared(tokens, (5, *tokens)) == 0


@pytest.mark.parametrize(("longest", "shortest"), [(2, 3), (0, 0), (4, 0), (-1, -1)])
def test_lengths_that_make_no_sense_are_refused(longest, shortest):
    """At least one token, and the longest no shorter than the shortest."""
    with pytest.raises(BadRequest, match="1 <= min <= max"):
        SuffixIndex(longest, shortest)


# ------------------------------------------------------------------------------------------------- the tree


@given(st.integers(1, 20), st.integers(1, 20), RUNS)
def test_confidence_rises_with_the_match(length, more, runs):
    """With the same continuations a longer match makes every next token likelier; the sum stays below one."""
    short = branches([Copy(length, 0, run) for run in runs], 0)
    long = branches([Copy(length + more, 0, run) for run in runs], 0)
    assert [token for token, _, _ in short] == [token for token, _, _ in long]
    assert all(one[1] < other[1] for one, other in zip(short, long, strict=True))
    assert sum(math.exp(confidence) for _, confidence, _ in long) < 1


def test_confidence_is_that_of_the_formula():
    """c / (n + 1/m) at the longest match of m, what is left times the same at the next; three cases by hand."""
    alone = branches([Copy(3, 0, [7])], 0)
    assert alone[0][1] == pytest.approx(math.log(3 / 4))
    both = branches([Copy(2, 0, [7]), Copy(2, 0, [8]), Copy(2, 0, [7])], 0)
    assert [(token, round(math.exp(q), 6)) for token, q, _ in both] == [(7, round(2 / 3.5, 6)), (8, round(1 / 3.5, 6))]
    mixed = branches([Copy(4, 0, [7]), Copy(1, 0, [7]), Copy(1, 0, [9])], 0)
    assert math.exp(mixed[0][1]) == pytest.approx(4 / 5)
    assert math.exp(mixed[1][1]) == pytest.approx(1 / 5 * 1 / 3)
    assert [copy.length for copy in mixed[0][2]] == [4, 1]


@given(RUNS, st.lists(st.integers(1, 3), min_size=8, max_size=8))
def test_probabilities_of_any_copies_sum_to_less_than_one(runs, lengths):
    """Matches of several lengths: the tokens are distinct, and something is left for what was never seen."""
    copies = sorted((Copy(m, 0, run) for m, run in zip(lengths, runs, strict=False)), key=lambda copy: -copy.length)
    for depth in range(3):
        found = branches(copies, depth)
        assert len({token for token, _, _ in found}) == len(found)
        assert sum(math.exp(confidence) for _, confidence, _ in found) < 1


@given(st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=1, max_size=6), st.integers(1, 9))
def test_the_short_way_along_a_chain_agrees_with_the_tree(runs, length):
    """`agreement` is the confidence that `fill` gives the first copy's tokens."""
    copies = [Copy(length, 0, run) for run in runs]
    tree = fill(9, Ask(Shape.chain(5)), copies, lambda copy, depth: Source("x"), Source("x"))
    assert list(tree.tokens[1:]) == runs[0]
    assert list(tree.log_q[1:]) == pytest.approx(agreement(copies))


@settings(max_examples=200)
@given(RUNS, st.integers(0, 6), st.booleans())
def test_a_filled_tree_fits_its_shape(runs, room, frequent_first):
    """No node the shape has not, none below the room, siblings by rank; every path is the start of a run."""
    copies = [Copy(2, place, run) for place, run in enumerate(runs)]
    ask = Ask(BUSH, room=room)
    tree = fill(
        9, ask, copies, lambda copy, depth: Source("x", "", copy.place), Source("x"), frequent_first=frequent_first
    )
    assert_fits(tree, ask)
    paths = {0: []}
    for node in range(1, len(tree)):
        paths[node] = [*paths[tree.parents[node]], tree.tokens[node]]
        assert runs[tree.sources[node].offset][: tree.depths[node]] == paths[node]
        if frequent_first:
            first = tree.children(tree.parents[node])[0]
            assert tree.log_q[first] >= tree.log_q[node]


def test_no_sibling_is_left_out():
    """A shape as wide as there are continuations gets all of them, in the order of the copies or of their counts."""
    copies = [Copy(3, 0, [1, 5]), Copy(3, 0, [2, 6]), Copy(3, 0, [2, 7]), Copy(2, 0, [3, 8])]
    shape = Shape((-1, 0, 0, 0, 0, 2, 2), (0, 0, 1, 2, 3, 0, 1))
    one = fill(0, Ask(shape), copies, lambda copy, depth: Source("x"), Source("x"))
    other = fill(0, Ask(shape), copies, lambda copy, depth: Source("x"), Source("x"), frequent_first=True)
    assert one.tokens == (0, 1, 2, 3, 6, 7)
    assert other.tokens == (0, 2, 1, 3, 5)
