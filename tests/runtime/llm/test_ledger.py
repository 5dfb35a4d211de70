"""Counts of steps, and counts of counts."""

from __future__ import annotations

import pytest

from edgekit.runtime.llm.accept import accepted
from edgekit.runtime.llm.ledger import DepthStats, DrafterStats, ModeChange, SpeculationStats, Tally
from edgekit.runtime.llm.tree import Source, TokenTree

TREE = TokenTree((1, 2, 3, 4, 5), (-1, 0, 0, 1, 2), sources=tuple(map(Source, ("a", "a", "b", "a", "b"))))


def told(tally: Tally) -> SpeculationStats:
    return tally.stats("x", 0.01, {1: 1.0}, {"x": "speculating"})


def test_drafts_count_where_their_parents_stood():
    """By depth only drafts that could have been accepted; by drafter all that were scored."""
    tally = Tally()
    tally.add(TREE, accepted(TREE, [0, 2], 9), drafter="x")
    stats = told(tally)
    assert (stats.steps, stats.tokens, stats.drafted, stats.accepted) == (1, 2, 4, 1)
    assert stats.acceptance == (DepthStats(1, 1, 1, 1.0), DepthStats(2, 1, 0, 0.0))
    assert stats.drafters == (DrafterStats("a", 2, 0), DrafterStats("b", 2, 1))
    assert stats.rows_per_token == 5 / 2


def test_drafts_without_a_source_are_the_drafters():
    """What does not say where it comes from comes from the one drafter there is."""
    tally = Tally()
    tree = TokenTree.chain(1, [2, 3])
    tally.add(tree, accepted(tree, [0, 1, 2], 4), drafter="x")
    assert told(tally).drafters == (DrafterStats("x", 2, 2),)


def test_nothing_counted_is_ordinary_decoding():
    """The figures of no steps at all are those that mean nothing was gained or lost."""
    stats = told(Tally())
    assert (stats.tokens_per_verify, stats.rows_per_token, stats.speedup, stats.acceptance) == (1.0, 1.0, 1.0, ())


def test_the_estimated_speedup_leaves_drawing_on_both_sides():
    """Ten tokens in five steps of 12 ms, and 1 ms of drawing a token, which ordinary decoding needs too."""
    tally = Tally()
    for _ in range(5):
        tree = TokenTree.chain(1, [2])
        tally.add(tree, accepted(tree, [0, 1], 3), drafter="x")
        tally.time(0.001, 0.011, 0.002)
    assert told(tally).speedup == pytest.approx((10 * 0.01 + 5 * 0.002) / (5 * 0.014))


def test_ledgers_add_up():
    """Merged, all counts are sums, and changes of mode stand where they happened in the whole."""
    one, other, both = Tally(), Tally(), Tally()
    for tally in (one, other):
        tally.add(TREE, accepted(TREE, [0, 2, 4], 9), drafter="x")
        tally.plain(1)
        tally.time(1.0, 2.0, 3.0)
    other.changes.append(ModeChange(2, "a", "resting", "why not"))
    both.merge(one)
    both.merge(other)
    stats = told(both)
    assert (stats.steps, stats.tokens, stats.drafted, stats.accepted) == (4, 8, 8, 4)
    assert stats.acceptance == (DepthStats(1, 2, 2, 1.0), DepthStats(2, 2, 2, 1.0))
    assert (stats.draft_seconds, stats.verify_seconds, stats.accept_seconds) == (2.0, 4.0, 6.0)
    assert stats.changes == (ModeChange(6, "a", "resting", "why not"),)
