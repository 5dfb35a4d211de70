"""The prefix store: what it gives back was computed for exactly these tokens, whatever was stored, split or dropped."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import BadRequest
from edgekit.runtime.llm.prefix import PrefixStats, PrefixStore, _below

SLOT = 2 * 2 * 3 * 4  # bytes of one token here: two sides of one layer, two heads, three numbers
PLENTY = 1 << 30
TEXTS = st.lists(st.integers(0, 2), max_size=9).map(tuple)  # three tokens: most texts share a beginning


def kv_of(tokens: Sequence[int], dtype: str = "float32") -> np.ndarray:
    """A snapshot in which every slot is a fixed random function of the whole text up to it, as in a decoder."""
    seeds = [zlib.crc32(bytes(tokens[: end + 1])) for end in range(len(tokens))]
    slots = [np.random.default_rng(seed).normal(size=(2, 2, 3)) for seed in seeds]
    return np.stack(slots, axis=2).astype(dtype) if slots else np.zeros((2, 2, 0, 3), dtype)


def store_of(*texts: Sequence[int], max_bytes: int = PLENTY) -> PrefixStore:
    """A store in which these texts were put one after the other."""
    store = PrefixStore(max_bytes)
    for text in texts:
        store.insert(text, kv_of(text))
    return store


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """The slow twin of a lookup."""
    return max(n for n in range(min(len(a), len(b)) + 1) if tuple(a[:n]) == tuple(b[:n]))


@given(texts=st.lists(TEXTS, max_size=8), wanted=TEXTS)
def test_it_finds_the_longest_beginning_any_text_shares(texts, wanted):
    """Lookups, content and size equal those of a list of all texts; every distinct beginning is stored once."""
    store = store_of(*texts)
    found = store.longest(wanted)
    assert found == max((shared(wanted, text) for text in texts), default=0)
    if found:
        np.testing.assert_array_equal(store.fetch(wanted, 0, found), kv_of(wanted)[:, :, :found])
    beginnings = {text[: end + 1] for text in texts for end in range(len(text))}
    assert len(store) == len(beginnings)
    assert store.bytes == len(beginnings) * SLOT


@settings(max_examples=150)
@given(data=st.data(), room=st.integers(0, 14))
def test_any_sequence_of_uses_keeps_the_bound_and_the_truth(data, room):
    """Over inserts, lookups, pins and evictions: never over the bound, never a wrong slot, pins stay, counts add up."""
    store = PrefixStore(room * SLOT)
    pinned: set[tuple[int, ...]] = set()
    put = 0
    for _ in range(data.draw(st.integers(1, 12))):
        text = data.draw(TEXTS)
        before, gone = len(store), store.stats.evicted
        stored = store.insert(text, kv_of(text))
        put += len(store) - before + store.stats.evicted - gone
        assert store.longest(text) == stored
        if stored and data.draw(st.booleans()):
            start = data.draw(st.integers(0, stored - 1))
            stop = data.draw(st.integers(start + 1, stored))
            np.testing.assert_array_equal(store.fetch(text, start, stop), kv_of(text)[:, :, start:stop])
        if stored and data.draw(st.integers(0, 3)) == 0:
            store.pin(text[:stored])
            pinned.add(text[:stored])
        if pinned and data.draw(st.integers(0, 3)) == 0:
            store.unpin(pinned.pop())
        assert store.bytes == len(store) * SLOT <= room * SLOT
        assert all(store.longest(held) == len(held) for held in pinned)
        assert len(store) == put - store.stats.evicted
        assert all(edge.kv.base is None and edge.kv.nbytes == len(edge.tokens) * SLOT for edge in _below(store._root))


def test_only_what_is_missing_is_asked_for():
    """A function is called once, with the slots that are not there; for a known text not at all."""
    asked = []

    def kv(start: int, stop: int) -> np.ndarray:
        asked.append((start, stop))
        return kv_of((1, 2, 3, 4, 5))[:, :, start:stop]

    store = PrefixStore(PLENTY)
    assert store.insert((1, 2, 3), kv) == 3
    assert store.insert((1, 2, 3, 4, 5), kv) == 5
    assert store.insert((1, 2, 3, 4), kv) == 4
    assert store.insert((), kv) == 0
    assert asked == [(0, 3), (3, 5)]
    np.testing.assert_array_equal(store.fetch((1, 2, 3, 4, 5), 1, 4), kv_of((1, 2, 3, 4, 5))[:, :, 1:4])


def test_the_text_used_longest_ago_goes_first():
    """A lookup is a use; the shared beginning outlives every text that hangs from it."""
    a, b, c = (7, 7, 1, 1), (7, 7, 2, 2), (7, 7, 3, 3)
    store = store_of(a, b, max_bytes=6 * SLOT)
    assert store.longest(a) == 4
    store.insert(c, kv_of(c))
    assert [store.longest(text) for text in (a, b, c)] == [4, 2, 4]
    assert store.stats.evicted == 2
    store.insert((9,) * 6, kv_of((9,) * 6))
    assert [store.longest(text) for text in (a, b, c)] == [0, 0, 0]


def test_a_text_that_does_not_fit_is_stored_from_its_beginning():
    """The beginning of a long text is useful; it does not push itself out, however often it comes."""
    long = tuple(range(20))
    store = PrefixStore(8 * SLOT + SLOT // 2)
    assert store.insert(long, kv_of(long)) == 8
    assert store.insert((*long, 20), kv_of((*long, 20))) == 8
    assert store.longest(long) == 8
    assert store.stats.evicted == 0
    assert store.insert((5, 6), kv_of((5, 6))) == 2
    assert store.longest(long) == 0
    assert PrefixStore(0).insert(long, kv_of(long)) == 0


def test_room_is_made_from_the_tail_a_new_text_leaves():
    """Of a stored text that a new one branches from, the common part stays and the rest may go."""
    old, new = (1, 2, 3, 4, 5, 6), (1, 2, 7, 8)
    store = store_of(old, max_bytes=6 * SLOT)
    assert store.insert(new, kv_of(new)) == 4
    assert store.longest(new) == 4
    assert store.longest(old) == 2


def test_pins_hold_exactly_what_was_asked():
    """A pin in the middle of a text keeps its tokens and lets the rest go; without it they go too."""
    text, other = (1, 2, 3, 4), (8, 8, 8)
    store = store_of(text, max_bytes=4 * SLOT)
    store.pin(text[:2])
    assert store.insert(other, kv_of(other)) == 2
    assert store.longest(text) == 2
    store.unpin(text[:2])
    assert store.insert((9,) * 4, kv_of((9,) * 4)) == 4
    assert store.longest(text) == 0


def test_the_counts_say_what_happened():
    """Lookups are hits or misses; fetched and dropped tokens are counted."""
    store = store_of((1, 2, 3), max_bytes=3 * SLOT)
    assert store.stats == PrefixStats()
    store.longest((1, 2, 9))
    store.longest((4,))
    store.fetch((1, 2, 3), 1, 3)
    store.insert((4,), kv_of((4,)))
    assert store.stats == PrefixStats(hits=1, misses=1, reused=2, evicted=3)


def test_what_is_given_out_never_changes():
    """Fetched slots are read-only, stay as they are when the store moves on, and share nothing with the caller's."""
    mine = kv_of((1, 2, 3, 4))
    store = PrefixStore(4 * SLOT)
    store.insert((1, 2, 3, 4), mine)
    mine[...] = 0
    given_out = [store.fetch((1, 2, 3, 4), 0, 4), store.fetch((1, 2, 3, 4), 1, 3)]
    store.insert((1, 2, 5), kv_of((1, 2, 5)))
    given_out.append(store.fetch((1, 2, 5), 0, 3))
    store.insert((6, 6, 6, 6), kv_of((6, 6, 6, 6)))
    for slots, right in zip(
        given_out, (kv_of((1, 2, 3, 4)), kv_of((1, 2, 3))[:, :, 1:], kv_of((1, 2, 5))), strict=True
    ):
        np.testing.assert_array_equal(slots, right)
        with pytest.raises(ValueError, match="read-only"):
            slots[...] = 0


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (1, 1), (2, 1), (-1, 1), (3, 4)])
def test_slots_that_are_not_stored_are_not_given(start, stop):
    """A text whose end is unknown gives its beginning and nothing else."""
    store = store_of((1, 2, 3))
    with pytest.raises(BadRequest, match="of which 2 are stored"):
        store.fetch((1, 2, 9, 9), start, stop)


@pytest.mark.parametrize(
    "kv",
    [
        kv_of((1, 2, 4))[:, :, :2],
        kv_of((1, 2, 4), "float16"),
        kv_of((1, 2, 4))[:1],
        kv_of((1, 2, 4))[:, :, :, :2],
        kv_of((1, 2, 4))[0],
        kv_of((1, 2, 4)).astype("float64"),
        lambda start, stop: kv_of((1, 2, 4)),
    ],
    ids=["short", "type", "layers", "width", "rank", "double", "all slots"],
)
def test_snapshots_of_something_else_are_refused(kv):
    """Another length, another type or another graph; and the store is as it was."""
    store = store_of((1, 2, 3))
    with pytest.raises(BadRequest, match="snapshot"):
        store.insert((1, 2, 4), kv)
    assert len(store) == 3
    np.testing.assert_array_equal(store.fetch((1, 2, 3), 0, 3), kv_of((1, 2, 3)))


def test_a_failing_snapshot_leaves_the_store_as_it_was():
    """Nothing is dropped or split for slots that never came."""
    store = store_of((1, 2, 3), max_bytes=3 * SLOT)

    def fails(start: int, stop: int) -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.insert((4, 5), fails)
    assert store.longest((1, 2, 3)) == len(store) == 3


def test_requests_that_cannot_be_meant_are_refused():
    """A negative bound, a pin on what is not there, an unpin of what is not pinned."""
    with pytest.raises(BadRequest, match="0 or more"):
        PrefixStore(-1)
    store = store_of((1, 2, 3))
    for wrong in ((), (1, 2, 4), (1, 2, 3, 4)):
        with pytest.raises(BadRequest, match="cannot be pinned"):
            store.pin(wrong)
    store.pin((1, 2))
    for wrong in ((), (1,), (1, 2, 3), (1, 3), (1, 2, 4)):
        with pytest.raises(BadRequest, match="not pinned"):
            store.unpin(wrong)
    store.unpin((1, 2))


def test_a_long_text_costs_no_recursion():
    """A thousand texts, each one token longer than the last, are a chain of a thousand edges."""
    store = PrefixStore(PLENTY)
    text = tuple(token % 7 for token in range(3000))
    slots = np.arange(3000 * 2, dtype=np.float32).reshape(2, 1, 3000, 1)
    for end in range(1, 3001):
        store.insert(text[:end], lambda start, stop: slots[:, :, start:stop])
    assert len(list(_below(store._root))) == 3000
    np.testing.assert_array_equal(store.fetch(text, 0, 3000), slots)
    store.insert((9,), slots[:, :, :1])
    store.max_bytes = 8
    store.insert((9, 9), slots[:, :, :2])
    assert len(store) == 1
