"""A saved prefix store: what was written is what is read, and nothing else is read at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import (
    BadManifest,
    BadRequest,
    BundleError,
    EdgekitError,
    UnknownFormat,
    UnsafePath,
    WrongHash,
    WrongSize,
)
from edgekit.runtime.llm import prefixfile
from edgekit.runtime.llm.prefix import PrefixStore
from edgekit.runtime.llm.prefixfile import HEAD, MAGIC
from tests.runtime.llm.test_prefix import PLENTY, SLOT, TEXTS, kv_of, store_of

MADE_BY = {"graph": "a" * 64, "precision": "fp32", "device": "cpu"}
ONE, TWO = (1, 2, 3, 4), (1, 2, 7)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A file of two texts that share a beginning."""
    path = tmp_path / "texts.prefixes"
    store_of(ONE, TWO).save(path, MADE_BY)
    return path


def rewritten(path: Path, change: Callable[[dict], object], data: bytes | None = None) -> Path:
    """The file with another header, its hashes right: what somebody would forge."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[8:16], "little")
    header, body = json.loads(raw[HEAD : HEAD + length]), raw[HEAD + length :]
    changed = change(header)
    header = header if changed is None else changed
    new = json.dumps(header).encode()
    head = MAGIC + len(new).to_bytes(8, "little") + hashlib.sha256(new).digest()
    path.write_bytes(head + new + (body if data is None else data))
    return path


@settings(max_examples=30)
@given(texts=st.lists(TEXTS, max_size=6))
def test_what_is_saved_is_what_is_loaded(tmp_path_factory, texts):
    """Tokens, slots and sizes; and the second file equals the first, byte for byte."""
    folder = tmp_path_factory.mktemp("round")
    store = store_of(*texts)
    store.save(folder / "a", MADE_BY)
    again = PrefixStore.load(folder / "a", MADE_BY, PLENTY)
    assert (len(again), again.bytes) == (len(store), store.bytes)
    for text in filter(None, texts):
        np.testing.assert_array_equal(again.fetch(text, 0, len(text)), kv_of(text))
    again = PrefixStore.load(folder / "a", MADE_BY, PLENTY)
    again.save(folder / "b", MADE_BY)
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()


def test_half_precision_is_saved_as_it_is(tmp_path):
    """The type of the cache is the type of the file."""
    store = PrefixStore(PLENTY)
    store.insert(ONE, kv_of(ONE, "float16"))
    store.save(tmp_path / "half", MADE_BY)
    slots = PrefixStore.load(tmp_path / "half", MADE_BY, PLENTY).fetch(ONE, 0, 4)
    assert slots.dtype == np.float16
    np.testing.assert_array_equal(slots, kv_of(ONE, "float16"))
    assert not slots.flags.writeable


def test_age_and_pins_outlive_the_file(tmp_path):
    """A loaded store drops what the saved one would have dropped, and keeps what was pinned."""
    store = store_of((1, 1), (2, 2), (3, 3), max_bytes=6 * SLOT)
    store.pin((2,))
    store.longest((1, 1))
    store.save(tmp_path / "aged", MADE_BY)
    again = PrefixStore.load(tmp_path / "aged", MADE_BY, 6 * SLOT)
    again.insert((4, 4, 4), kv_of((4, 4, 4)))
    assert [again.longest(text) for text in ((1, 1), (2, 2), (3, 3), (4, 4, 4))] == [2, 1, 0, 3]
    again.unpin((2,))


def test_the_layout_is_the_documented_one(saved):
    """Magic, length, hash, JSON, then the slots of each row in order, with nothing between and nothing after."""
    raw = saved.read_bytes()
    length = int.from_bytes(raw[8:16], "little")
    assert raw[:8] == b"EKPREFIX"
    assert raw[16:48] == hashlib.sha256(raw[48 : 48 + length]).digest()
    header = json.loads(raw[48 : 48 + length])
    assert header == {
        "format": 1,
        "fingerprint": MADE_BY,
        "dtype": "float32",
        "shape": [2, 2, 3],
        "rows": [[-1, [1, 2], False], [0, [7], False], [0, [3, 4], False]],
        "sha256": hashlib.sha256(raw[48 + length :]).hexdigest(),
    }
    pieces = [kv_of(ONE)[:, :, :2], kv_of(TWO)[:, :, 2:], kv_of(ONE)[:, :, 2:]]
    assert raw[48 + length :] == b"".join(piece.tobytes() for piece in pieces)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({**MADE_BY, "precision": "int4"}, "'precision' is 'fp32', not 'int4'"),
        ({**MADE_BY, "graph": "b" * 64}, "'graph' is 'a"),
        ({**MADE_BY, "device": "cuda"}, "'device' is 'cpu', not 'cuda'"),
        ({**MADE_BY, "adapter": "x"}, "'adapter' is None, not 'x'"),
        ({"graph": "a" * 64, "precision": "fp32"}, "'device' is 'cpu', not None"),
    ],
)
def test_another_fingerprint_is_refused_by_name(saved, other, words):
    """Keys of another graph, precision or device are not keys; the message says which it is."""
    with pytest.raises(BadRequest, match=words):
        PrefixStore.load(saved, other, PLENTY)


def test_a_file_larger_than_the_bound_is_refused(saved):
    """Nothing is dropped unasked, and nothing is read into memory first."""
    with pytest.raises(BadRequest, match="allow more"):
        PrefixStore.load(saved, MADE_BY, 5 * SLOT - 1)
    assert PrefixStore.load(saved, MADE_BY, 5 * SLOT).bytes == 5 * SLOT


def test_every_truncation_is_refused(saved):
    """Cut anywhere, and with one byte too many."""
    raw = saved.read_bytes()
    for size in {0, 1, 7, 8, 15, 16, 47, 48, 60, len(raw) // 2, len(raw) - 5 * SLOT, len(raw) - SLOT, len(raw) - 1}:
        saved.write_bytes(raw[:size])
        with pytest.raises((UnknownFormat, WrongSize)):
            PrefixStore.load(saved, MADE_BY, PLENTY)
    saved.write_bytes(raw + b"\0")
    with pytest.raises(WrongSize):
        PrefixStore.load(saved, MADE_BY, PLENTY)


@settings(max_examples=200)
@given(data=st.data())
def test_every_changed_bit_is_refused(tmp_path_factory, data):
    """Anywhere in the file, as an error of the bundle's kind: exit code 5."""
    path = tmp_path_factory.mktemp("bits") / "p"
    store_of(ONE, TWO).save(path, MADE_BY)
    raw = bytearray(path.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    with pytest.raises(BundleError) as caught:
        PrefixStore.load(path, MADE_BY, PLENTY)
    assert caught.value.exit_code == 5


@given(raw=st.binary(max_size=200))
def test_bytes_of_any_kind_are_refused_in_words(tmp_path_factory, raw):
    """Whatever the file holds, with our magic or without, the error is one of ours."""
    path = tmp_path_factory.mktemp("junk") / "p"
    for content in (raw, MAGIC + raw, MAGIC + len(raw).to_bytes(8, "little") + hashlib.sha256(raw).digest() + raw):
        path.write_bytes(content)
        with pytest.raises(EdgekitError):
            PrefixStore.load(path, MADE_BY, PLENTY)


HOSTILE = {
    "a parent after its child": (lambda h: h["rows"][0].__setitem__(0, 1), BadManifest, "parent comes first"),
    "a row that is its own parent": (lambda h: h["rows"][0].__setitem__(0, 0), BadManifest, "parent comes first"),
    "a parent before the beginning": (lambda h: h["rows"][0].__setitem__(0, -2), BadManifest, "rows"),
    "siblings alike": (lambda h: h["rows"][1].__setitem__(1, [3]), BadManifest, "like a sibling"),
    "an edge without tokens": (lambda h: h["rows"][1].__setitem__(1, []), BadManifest, "rows"),
    "a negative token": (lambda h: h["rows"][1].__setitem__(1, [-7]), BadManifest, "rows"),
    "a huge token": (lambda h: h["rows"][1].__setitem__(1, [2**80]), BadManifest, "rows"),
    "a token too many": (lambda h: h["rows"][1].__setitem__(1, [7, 7]), WrongSize, "header says"),
    "huge slots": (lambda h: h.__setitem__("shape", [2**16, 2**16, 2**16]), WrongSize, "header says"),
    "slots beyond any": (lambda h: h.__setitem__("shape", [2**60, 2, 3]), BadManifest, "shape"),
    "empty slots": (lambda h: h.__setitem__("shape", [2, 0, 3]), BadManifest, "shape"),
    "another type": (lambda h: h.__setitem__("dtype", "float16"), WrongSize, "header says"),
    "an object type": (lambda h: h.__setitem__("dtype", "object"), BadManifest, "dtype"),
    "another hash": (lambda h: h.__setitem__("sha256", "0" * 64), WrongHash, "keys and values"),
    "no hash": (lambda h: h.__delitem__("sha256"), BadManifest, "sha256"),
    "an unknown key": (lambda h: h.__setitem__("pickle", "yes"), BadManifest, "pickle"),
    "another format": (lambda h: h.__setitem__("format", 2), UnknownFormat, "format 2"),
    "no object": (lambda h: [h], BadManifest, "malformed"),
    "a deep nest": (lambda h: json.loads("[" * 900 + "]" * 900), BadManifest, "malformed"),
    "a number for a name": (lambda h: h["fingerprint"].__setitem__("graph", 7), BadManifest, "fingerprint"),
    "a name without end": (lambda h: h["fingerprint"].__setitem__("graph", "x" * 5000), BadManifest, "length"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_forged_headers_are_refused(saved, case):
    """Right hashes prove nothing about meaning: the tree is checked in full before a slot is read."""
    change, error, words = HOSTILE[case]
    with pytest.raises(error, match=words):
        PrefixStore.load(rewritten(saved, change), MADE_BY, PLENTY)


def test_a_header_is_bounded_on_both_sides(saved, monkeypatch, tmp_path):
    """What could not be read again is not written, and an over-long header is refused before it is read."""
    monkeypatch.setattr(prefixfile, "MAX_HEADER", 64)
    with pytest.raises(WrongSize, match="over 64 bytes"):
        PrefixStore.load(saved, MADE_BY, PLENTY)
    with pytest.raises(BadRequest, match="save a smaller store"):
        store_of(ONE).save(tmp_path / "new", MADE_BY)
    assert not (tmp_path / "new").exists()


def test_what_is_no_plain_file_is_refused(saved, tmp_path):
    """Links, folders, FIFOs and files that are not there, without waiting on any of them."""
    with pytest.raises(BadRequest, match="cannot be read"):
        PrefixStore.load(tmp_path / "nowhere", MADE_BY, PLENTY)
    (tmp_path / "link").symlink_to(saved)
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo", ""):
        with pytest.raises(UnsafePath):
            PrefixStore.load(tmp_path / name, MADE_BY, PLENTY)


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    """The file appears whole or not at all, and nothing else is left beside it."""
    before = saved.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prefixfile, "sync", full)
    with pytest.raises(OSError, match="No space"):
        store_of((9, 9, 9)).save(saved, MADE_BY)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
