"""A prefix store as one file: magic, header with its hash, raw keys and values; docs/prefix-cache.md has the layout.

A file is read with suspicion: sizes before memory, hashes before meaning, and the tree in full before it is used. The
hashes protect from accidents; whoever can write the file can write other keys, as whoever can write a bundle can.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import msgspec
import numpy as np

from edgekit.bundle.files import open_regular, staging, sync
from edgekit.bundle.manifest import Sha256
from edgekit.errors import BadManifest, BadRequest, UnknownFormat, WrongHash, WrongSize
from edgekit.runtime.backends import Array

MAGIC = b"EKPREFIX"
FORMAT = 1
HEAD = len(MAGIC) + 8 + 32  # magic, length of the header, its sha256
MAX_HEADER = 64 * 2**20  # bytes; some ten million tokens
AGAIN = "Make it anew."

Size = Annotated[int, msgspec.Meta(ge=1, le=2**16)]
Words = Annotated[str, msgspec.Meta(max_length=1024)]


class Row(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One edge of the tree; `parent` is the place of an earlier row, -1 where texts begin."""

    parent: Annotated[int, msgspec.Meta(ge=-1)]
    tokens: Annotated[tuple[Annotated[int, msgspec.Meta(ge=0, lt=2**31)], ...], msgspec.Meta(min_length=1)]
    pinned: bool


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What stands before the keys and values; `shape` is (2 * layers, heads, head_dim) of a slot."""

    format: int
    fingerprint: dict[Words, Words]
    dtype: Literal["float32", "float16"]
    shape: tuple[Size, Size, Size]
    rows: tuple[Row, ...]
    sha256: Sha256

    def __post_init__(self) -> None:
        taken: set[tuple[int, int]] = set()
        for place, row in enumerate(self.rows):
            first = row.parent, row.tokens[0]
            if row.parent >= place:
                raise ValueError(f"row {place} has parent {row.parent}; a parent comes first")
            if first in taken:
                raise ValueError(f"row {place} begins with token {row.tokens[0]} like a sibling")
            taken.add(first)


def write_prefixes(path: Path, fingerprint: Mapping[str, str], rows: Sequence[Row], slots: Sequence[Array]) -> None:
    """Write a tree of prefixes as one file, which appears whole or not at all.

    Args:
        path: replaced if it is there.
        fingerprint: what the keys and values hold for, by name.
        rows: parents before children.
        slots: of each row, (2 * layers, heads, tokens, head_dim), all of one type.

    Raises:
        BadRequest: more tokens than a header can list.
    """
    data = hashlib.sha256()
    for kv in slots:
        data.update(_raw(kv))
    like = slots[0] if slots else np.zeros((1, 1, 0, 1), np.float32)
    shape = (like.shape[0], like.shape[1], like.shape[3])
    header = msgspec.json.encode(
        Header(FORMAT, dict(fingerprint), like.dtype.name, shape, tuple(rows), data.hexdigest())
    )
    if len(header) > MAX_HEADER:
        raise BadRequest(f"{path}: the tokens alone would take over {MAX_HEADER:,} bytes; save a smaller store")
    with staging(path) as folder:
        draft = folder / "prefixes"
        with draft.open("xb") as file:
            file.write(MAGIC + len(header).to_bytes(8, "little") + hashlib.sha256(header).digest() + header)
            for kv in slots:
                file.write(_raw(kv))
        sync(draft)
        os.replace(draft, path)
        sync(path.parent)


def read_prefixes(path: Path, fingerprint: Mapping[str, str], max_bytes: int) -> tuple[tuple[Row, ...], list[Array]]:
    """Read such a file, checked in full: its rows, and read-only slots for each.

    Raises:
        BadRequest: a file that cannot be read, another fingerprint, or more than `max_bytes` of keys and values.
        UnsafePath: not a regular file.
        UnknownFormat: not a prefix file, or one of another format.
        WrongSize: truncated, or with bytes after its end.
        WrongHash: altered since it was written.
        BadManifest: a header that contradicts itself.
    """
    try:
        with open_regular(path) as file:
            header = _read_header(path, file)
            _check_fingerprint(path, header.fingerprint, fingerprint)
            return header.rows, _read_slots(path, file, header, max_bytes)
    except OSError as why:
        raise BadRequest(f"{path} cannot be read: {why.strerror or why}") from why


def _read_header(path: Path, file: BinaryIO) -> Header:
    head = file.read(HEAD)
    if head[: len(MAGIC)] != MAGIC:
        raise UnknownFormat(f"{path} is no prefix store. Choose a file that was saved as one.")
    length = int.from_bytes(head[len(MAGIC) : -32], "little")
    if len(head) < HEAD or length > min(MAX_HEADER, os.fstat(file.fileno()).st_size - HEAD):
        raise WrongSize(f"{path} ends inside its header, or that has over {MAX_HEADER:,} bytes. {AGAIN}")
    raw = file.read(length)
    if hashlib.sha256(raw).digest() != head[-32:]:
        raise WrongHash(f"{path}: its header is not the one that was written. {AGAIN}")
    try:
        version = msgspec.json.decode(raw, type=_Version).format
        if version != FORMAT:
            raise UnknownFormat(f"{path} has prefix format {version}; this edgekit reads {FORMAT}. {AGAIN}")
        return msgspec.json.decode(raw, type=Header)
    except (msgspec.DecodeError, ValueError, RecursionError) as why:
        raise BadManifest(f"{path}: its header is malformed: {why}. {AGAIN}") from why


class _Version(msgspec.Struct):
    """The one field every format has."""

    format: int


def _check_fingerprint(path: Path, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Name what differs."""
    told = [
        f"{name!r} is {theirs.get(name)!r}, not {ours.get(name)!r}"
        for name in sorted({*ours, *theirs})
        if theirs.get(name) != ours.get(name)
    ]
    if told:
        raise BadRequest(f"{path} holds keys and values of something else: {'; '.join(told)}. {AGAIN}")


def _read_slots(path: Path, file: BinaryIO, header: Header, max_bytes: int) -> list[Array]:
    sides, heads, dim = header.shape
    per_slot = sides * heads * dim * np.dtype(header.dtype).itemsize
    size = per_slot * sum(len(row.tokens) for row in header.rows)
    left = os.fstat(file.fileno()).st_size - file.tell()
    if left != size:
        raise WrongSize(f"{path} has {left:,} bytes of keys and values; its header says {size:,}. {AGAIN}")
    if size > max_bytes:
        raise BadRequest(f"{path} holds {size:,} bytes and the store may hold {max_bytes:,}; allow more")
    data, slots = hashlib.sha256(), []
    for row in header.rows:
        raw = file.read(per_slot * len(row.tokens))
        if len(raw) != per_slot * len(row.tokens):
            raise WrongSize(f"{path} became shorter while it was read; read it again")
        data.update(raw)
        little = np.frombuffer(raw, np.dtype(header.dtype).newbyteorder("<"))
        slots.append(little.astype(header.dtype, copy=False).reshape(sides, heads, len(row.tokens), dim))
    if data.hexdigest() != header.sha256:
        raise WrongHash(f"{path}: its keys and values are not those that were written. {AGAIN}")
    return slots


def _raw(kv: Array) -> memoryview:
    """The bytes of an array in C order, little-endian."""
    return kv.astype(kv.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data
