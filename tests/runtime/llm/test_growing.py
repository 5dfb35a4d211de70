"""Caches that grow by concatenation: what `KVCache` promises, by two buffers that take turns; chains and no trees."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.bundle.manifest import KVCacheLayout, TensorSpec
from edgekit.errors import BadRequest, SessionFailed
from edgekit.runtime.backends.fake import FakeSession
from edgekit.runtime.llm.drafters import Ask
from edgekit.runtime.llm.drafters.model import ModelDraft
from edgekit.runtime.llm.feeds import Mask
from edgekit.runtime.llm.growing import GrowingCache, open_cache
from edgekit.runtime.llm.kv import FIRST_CAPACITY, KVCache
from edgekit.runtime.llm.tree import Shape, TokenTree
from edgekit.runtime.llm.verifier import LocalVerifier
from tests.runtime.llm.fake_lm import VOCAB, FakeLM, logits_after

LAYOUT = KVCacheLayout(layers=2, heads=3, head_dim=4, dtype="float16")
LIMIT = 2 * FIRST_CAPACITY + 100
NAMES = ("0.key", "0.value", "1.key", "1.value")
LIVE = pytest.mark.parametrize("live", [True, False], ids=["live", "far"])
BUSH = TokenTree((5, 1, 2, 3), (-1, 0, 0, 1))


def behind(feeds):
    """New slots hold the id they were fed, times the tensor's number."""
    ids = feeds["input_ids"][0]
    out = {}
    for number, name in enumerate(NAMES, start=1):
        new = np.broadcast_to((ids * number)[None, None, :, None], (1, 3, len(ids), 4))
        out[f"present.{name}"] = np.concatenate([feeds[f"past.{name}"], new.astype("float16")], axis=2)
    return out | {"logits": np.array([float(out["present.0.key"].shape[2])], np.float32)}


def cache(live: bool = True) -> GrowingCache:
    """An empty cache of two layers on a session that puts ids behind what it is given."""
    specs = {
        when: [TensorSpec(f"{when}.{name}", "float16", (1, 3, axis, 4)) for name in NAMES]
        for when, axis in (("past", "past"), ("present", "total"))
    }
    ids, logits = TensorSpec("input_ids", "int64", (1, "seq")), TensorSpec("logits", "float32", (1,))
    session = FakeSession(behind, [ids, *specs["past"]], [logits, *specs["present"]], live=live)
    return GrowingCache(session, LAYOUT, LIMIT)


def run(kv: GrowingCache, used: int, *ids: int) -> float:
    """One run; the number of slots that the graph says there are."""
    out = kv.run(used, {"input_ids": np.array([ids])}, {"logits": np.zeros(1, np.float32)})
    assert set(out) == {"logits"}
    return float(out["logits"][0])


def slots(*ids: int) -> np.ndarray:
    """The snapshot of a cache that was fed these."""
    rows = np.array([[number * token for token in ids] for number in (1, 2, 3, 4)], "float16")
    return np.broadcast_to(rows[:, None, :, None], (4, 3, len(ids), 4))


@LIVE
def test_runs_put_new_slots_behind_those_that_are_kept(live):
    """From nothing, from all there is and from less of it; what comes back are the outputs that are no slots."""
    kv = cache(live)
    assert run(kv, 0, 1, 2, 3) == 3
    assert run(kv, 3, 4) == 4
    np.testing.assert_array_equal(kv.snapshot(0, 4), slots(1, 2, 3, 4))
    assert run(kv, 2, 7, 8) == 4
    np.testing.assert_array_equal(kv.snapshot(0, 4), slots(1, 2, 7, 8))
    assert run(kv, 0, 9) == 1
    np.testing.assert_array_equal(kv.snapshot(0, 1), slots(9))


def test_snapshots_are_copies_of_cache_type():
    """Later runs do not reach them; a piece from the middle is that piece."""
    kv = cache()
    run(kv, 0, 1, 2, 3)
    piece = kv.snapshot(1, 3)
    run(kv, 1, 9, 9)
    np.testing.assert_array_equal(piece, slots(2, 3))
    assert piece.dtype == np.float16
    assert kv.snapshot(2, 2).shape == (4, 3, 0, 4)


def test_restoring_writes_slots_and_forgets_those_after():
    """In the middle, at the end and into an empty cache; the next run goes on behind them."""
    kv = cache()
    run(kv, 0, 1, 2, 3, 4)
    kv.restore(2, slots(8))
    np.testing.assert_array_equal(kv.snapshot(0, 3), slots(1, 2, 8))
    kv.restore(3, slots(5, 6))
    assert run(kv, 5, 7) == 6
    np.testing.assert_array_equal(kv.snapshot(0, 6), slots(1, 2, 8, 5, 6, 7))
    other = cache()
    other.restore(0, kv.snapshot(0, 6))
    np.testing.assert_array_equal(other.snapshot(0, 6), slots(1, 2, 8, 5, 6, 7))


def test_growth_keeps_what_was_used_up_to_the_limit():
    """By half as often as needed, never past the context; the old slots are there, and then room for the new."""
    kv = cache()
    run(kv, 0, *range(1, 10))
    kv.reserve(FIRST_CAPACITY + 1, 9)
    assert kv.capacity == 2 * FIRST_CAPACITY
    np.testing.assert_array_equal(kv.snapshot(0, 9), slots(*range(1, 10)))
    kv.reserve(LIMIT, 4)
    assert kv.capacity == LIMIT
    assert run(kv, 4, *[1] * (LIMIT - 4)) == LIMIT
    kv.reserve(5, 5)
    assert kv.capacity == LIMIT
    with pytest.raises(BadRequest, match=f"context of {LIMIT}"):
        kv.reserve(LIMIT + 1, 0)


def test_forks_go_separate_ways():
    """A fork begins with what it was given, and neither sees what the other is fed."""
    kv = cache()
    run(kv, 0, 1, 2, 3)
    twin = kv.fork(2)
    assert twin.capacity == kv.capacity
    run(twin, 2, 8)
    run(kv, 3, 4)
    np.testing.assert_array_equal(twin.snapshot(0, 3), slots(1, 2, 8))
    np.testing.assert_array_equal(kv.snapshot(0, 4), slots(1, 2, 3, 4))


def test_rows_move_together():
    """An accepted path that leaves slots out is copied to the front, overlaps included."""
    kv = cache()
    run(kv, 0, 1, 2, 3, 4, 5)
    kv.move([2, 4], 1)
    np.testing.assert_array_equal(kv.snapshot(0, 3), slots(1, 3, 5))


@pytest.mark.parametrize("act", [lambda kv: kv.snapshot(1, 4), lambda kv: kv.fork(4), lambda kv: kv.snapshot(-1, 2)])
def test_slots_that_are_not_there_are_refused(act):
    """In words, and the cache is as it was."""
    kv = cache()
    run(kv, 0, 1, 2, 3)
    with pytest.raises(BadRequest, match="not in a cache of 3"):
        act(kv)
    with pytest.raises(BadRequest, match="reserve"):
        kv.restore(3, slots(*[1] * FIRST_CAPACITY))
    with pytest.raises(BadRequest, match="reserve"):
        kv.restore(4, slots(1))
    np.testing.assert_array_equal(kv.snapshot(0, 3), slots(1, 2, 3))


@pytest.mark.parametrize(
    "piece",
    [slots(2)[:3], slots(2)[:, :1], slots(2)[..., :1], slots(2)[0], slots(2).astype("float32")],
    ids=["layers", "heads", "width", "rank", "type"],
)
def test_snapshots_of_another_graph_are_refused(piece):
    """A wrong shape or type never reaches the buffers, not even where numpy would broadcast it."""
    with pytest.raises(BadRequest, match="no snapshot of this graph"):
        cache().restore(0, piece)


def test_a_run_that_fails_changes_nothing():
    """The buffers change places after a run, not before it."""
    kv = cache()
    run(kv, 0, 1, 2, 3)
    with pytest.raises(SessionFailed):
        kv.run(3, {"input_ids": np.array([[4]]), "other": np.zeros(1)}, {})
    np.testing.assert_array_equal(kv.snapshot(0, 3), slots(1, 2, 3))


@pytest.mark.parametrize(("dialect", "kind"), [("ort", KVCache), ("std", KVCache), ("concat", GrowingCache)])
def test_every_dialect_has_its_cache(dialect, kind):
    """Graphs that write in place get one buffer, the others two."""
    lm = FakeLM(dialect)
    assert type(open_cache(dialect, lm.session(), lm.decoding.kv, 100)) is kind
    assert lm.verifier().chains_only == (dialect == "concat")


# ------------------------------------------------------------------------------------------------ in a verifier


@LIVE
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9)), max_size=6))
def test_texts_that_are_cut_and_grow_get_the_rows_of_a_fresh_start(live, edits):
    """Rollbacks of any length, then new tokens and a chain of drafts, kept in part: always the model's own rows."""
    verifier = FakeLM("concat", window=3).verifier(live=live, chunk=4)
    tokens: tuple[int, ...] = (1, 2, 3)
    for cut, more in edits:
        tokens = (*tokens[: max(1, len(tokens) - cut)], *more)
        tree = TokenTree.chain(tokens[-1], more[::-1])
        rows = verifier.score(tokens, tree).logits
        for node in range(len(tree)):
            np.testing.assert_array_equal(rows[node], logits_after([*tokens, *tree.tokens[1 : node + 1]], 3))
        verifier.keep(range(1 + cut % len(tree)))
        assert verifier.cached[: len(tokens)] == tokens


def test_trees_with_branches_are_refused_and_their_spine_is_not():
    """A mask with one entry per slot cannot keep branches apart; the message says what to do, and nothing has run."""
    lm = FakeLM("concat")
    session = lm.session()
    verifier = LocalVerifier(session, lm.decoding)
    with pytest.raises(BadRequest, match="branches") as caught:
        verifier.score((4, 5), BUSH)
    assert "spine" in str(caught.value)
    assert session.runs == 0
    rows = verifier.score((4, 5), BUSH.spine()).logits
    np.testing.assert_array_equal(rows[2], logits_after((4, 5, 1, 3)))


def test_a_draft_model_without_branches_drafts_the_spine_of_a_tree():
    """Asked for a tree it proposes a chain as deep, since its own graph could not score more."""
    shape = Shape((-1, 0, 0, 1, 2), (0, 0, 1, 0, 0))
    chain = ModelDraft(FakeLM("concat").verifier()).propose((1, 2, 3), Ask(shape))
    assert chain.is_chain
    assert chain == ModelDraft(FakeLM("ort").verifier()).propose((1, 2, 3), Ask(Shape.chain(2)))


def test_the_mask_is_made_once_and_cut():
    """Every slot counts; growing by one token allocates nothing."""
    mask = Mask()
    first = mask.fill(0, BUSH, 0, 3)
    np.testing.assert_array_equal(first, np.ones((1, 3), np.int64))
    assert np.shares_memory(mask.fill(0, BUSH, 0, 4), mask.fill(0, BUSH, 0, 5))
    assert mask.fill(0, BUSH, 0, 2).flags.c_contiguous
