"""The key-value buffers: what is taken out is what is put back, here or in another cache, and nothing else moves."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.bundle.manifest import KVCacheLayout, TensorSpec
from edgekit.errors import BadRequest
from edgekit.runtime.backends.fake import FakeSession
from edgekit.runtime.llm.kv import FIRST_CAPACITY, KVCache
from edgekit.runtime.llm.prefix import PrefixStore
from edgekit.runtime.llm.tree import TokenTree
from edgekit.runtime.llm.verifier import LocalVerifier
from tests.runtime.llm.fake_lm import VOCAB, FakeLM, logits_after

LAYOUT = KVCacheLayout(layers=2, heads=3, head_dim=4, dtype="float16")
LIMIT = 2 * FIRST_CAPACITY + 100
LIVE = pytest.mark.parametrize("live", [True, False], ids=["live", "far"])


def cache(live: bool) -> KVCache:
    """A cache of 2 layers whose slots hold random numbers."""
    specs = [
        TensorSpec(f"{when}.{layer}.{side}", "float16", (1, 3, "capacity", 4))
        for when in ("past", "present")
        for layer in range(2)
        for side in ("key", "value")
    ]
    filled = KVCache(FakeSession(lambda feeds: {}, specs[:4], specs[4:], live=live), LAYOUT, LIMIT)
    filled.restore(0, numbers(FIRST_CAPACITY))
    return filled


def numbers(slots: int, seed: int = 0) -> np.ndarray:
    """A snapshot of random numbers."""
    return np.random.default_rng(seed).normal(size=(4, 3, slots, 4)).astype("float16")


@LIVE
def test_a_snapshot_is_layers_sides_heads_slots_width(live):
    """Keys and values of each layer in turn, a copy that later writes do not reach."""
    kv = cache(live)
    slots = kv.snapshot(5, 9)
    assert slots.dtype == np.float16
    for row, name in enumerate(["0.key", "0.value", "1.key", "1.value"]):
        np.testing.assert_array_equal(slots[row], kv.binding.read(f"past.{name}")[0, :, 5:9])
    kv.restore(5, numbers(4, seed=1))
    np.testing.assert_array_equal(slots, numbers(FIRST_CAPACITY)[:, :, 5:9])
    assert kv.snapshot(7, 7).shape == (4, 3, 0, 4)


@LIVE
def test_restoring_writes_those_slots_and_no_others(live):
    """At the beginning, in the middle, at the very end, and nothing at all."""
    for start, count in [(0, 3), (10, 50), (FIRST_CAPACITY - 2, 2), (4, 0)]:
        kv, right = cache(live), numbers(FIRST_CAPACITY)
        kv.restore(start, numbers(count, seed=2))
        right[:, :, start : start + count] = numbers(count, seed=2)
        np.testing.assert_array_equal(kv.snapshot(0, FIRST_CAPACITY), right)


@LIVE
def test_growth_and_forks_begin_with_what_was_used(live):
    """The slots in use are copied and the others are zero; the fork is as large as its origin."""
    kv = cache(live)
    kv.reserve(FIRST_CAPACITY + 1, 6)
    assert kv.capacity == 2 * FIRST_CAPACITY
    twin = kv.fork(4)
    assert twin.capacity == kv.capacity
    for one, used in ((kv, 6), (twin, 4)):
        slots = one.snapshot(0, one.capacity)
        np.testing.assert_array_equal(slots[:, :, :used], numbers(FIRST_CAPACITY)[:, :, :used])
        assert not slots[:, :, used:].any()


@LIVE
def test_forks_go_separate_ways(live):
    """Writing to one, or letting one grow to the limit, leaves the other as it was."""
    kv = cache(live)
    twin = kv.fork(8)
    kv.restore(0, numbers(8, seed=3))
    np.testing.assert_array_equal(twin.snapshot(0, 8), numbers(FIRST_CAPACITY)[:, :, :8])
    twin.restore(2, numbers(3, seed=4))
    np.testing.assert_array_equal(kv.snapshot(0, 8), numbers(8, seed=3))
    twin.reserve(LIMIT, 8)
    assert (twin.capacity, kv.capacity) == (LIMIT, FIRST_CAPACITY)
    np.testing.assert_array_equal(twin.snapshot(2, 5), numbers(3, seed=4))


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, FIRST_CAPACITY + 1)])
def test_slots_that_are_not_there_are_refused(start, stop):
    """In words, and before anything is copied."""
    kv = cache(live=True)
    with pytest.raises(BadRequest, match="reserve"):
        kv.snapshot(start, stop)
    with pytest.raises(BadRequest, match="reserve"):
        kv.fork(-1 if stop < 3 else stop)
    with pytest.raises(BadRequest, match="reserve"):
        kv.restore(FIRST_CAPACITY - 1, numbers(2))
    np.testing.assert_array_equal(kv.snapshot(0, FIRST_CAPACITY), numbers(FIRST_CAPACITY))


@pytest.mark.parametrize(
    "slots",
    [numbers(2)[:3], numbers(2)[:, :1], numbers(2)[..., :1], numbers(2)[0], numbers(2).astype("float32")],
    ids=["layers", "heads", "width", "rank", "type"],
)
def test_snapshots_of_another_graph_are_refused(slots):
    """A wrong shape or type never reaches the buffers, not even where numpy would broadcast it."""
    kv = cache(live=True)
    with pytest.raises(BadRequest, match="no snapshot of this graph"):
        kv.restore(0, slots)
    np.testing.assert_array_equal(kv.snapshot(0, FIRST_CAPACITY), numbers(FIRST_CAPACITY))


@LIVE
@pytest.mark.parametrize("dialect", ["ort", "std", "concat"])
def test_a_stored_prefix_saves_its_tokens(dialect, live):
    """What one verifier computed another reads back: only the rest is run, and the answer is right."""
    lm = FakeLM(dialect, window=3)
    store = PrefixStore(1 << 20)
    text = tuple(np.random.default_rng(0).integers(0, VOCAB, FIRST_CAPACITY + 9).tolist())
    first = LocalVerifier(lm.session(live=live), lm.decoding, prefixes=store)
    first.score(text, TokenTree.chain(text[-1]))
    store.insert(first.cached, first._kv.snapshot)
    assert len(store) == len(text) - 1
    fed: list[int] = []
    session = lm.session(live=live)
    answer = session._answer
    session._answer = lambda feeds: fed.append(feeds["input_ids"].shape[1]) or answer(feeds)
    second = LocalVerifier(session, lm.decoding, prefixes=store)
    other = (*text[:-5], 1, 2, 3)
    np.testing.assert_array_equal(second.score(other, TokenTree.chain(3)).logits[0], logits_after(other, 3))
    same = next((n for n in range(5) if other[len(text) - 5 + n] != text[len(text) - 5 + n]), 3)
    assert fed == [3 - same]
    assert store.stats.reused == len(text) - 5 + same
