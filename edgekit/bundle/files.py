"""Files of a bundle: opened without following links, hashed in blocks, staged beside their target, cached."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from edgekit.errors import BadRequest, UnsafePath

BLOCK = 4 * 2**20  # bytes read at a time
DRAFT, RETIRED = ".edgekit-draft", ".edgekit-old"  # suffixes of hidden folders beside a bundle that is being written


class Readable(Protocol):
    """Anything that gives its bytes a block at a time."""

    def read(self, size: int, /) -> bytes | None:
        """At most `size` bytes; none at the end."""


def open_regular(path: Path) -> BinaryIO:
    """Open for reading what is a regular file, without following a link and without waiting on a FIFO.

    Raises:
        UnsafePath: a link, folder, FIFO, socket or device.
        OSError: missing or unreadable.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise UnsafePath(f"{path} is not a regular file; a bundle holds plain files only")
    file = os.fdopen(os.open(path, flags), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UnsafePath(f"{path} stopped being a regular file while it was opened")
    return file


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read a block at a time."""
    with path.open("rb", buffering=0) as file:
        return sha256_stream(file)


def sha256_stream(stream: Readable) -> str:
    """Hex sha256 of what is left of a stream."""
    digest = hashlib.sha256()
    while block := stream.read(BLOCK):
        digest.update(block)
    return digest.hexdigest()


def sha256_tree(folder: Path) -> str:
    """One hash of a source folder: the sha256 of its `sha256sum` listing, sorted by path, hidden names left out.

    Links to files count as the files they lead to (hub snapshots are made of them); links to folders are not followed.
    The same from a shell, inside the folder:
    `find -L . -type f -not -path '*/.*' -printf '%P\\n' | LC_ALL=C sort | xargs -d '\\n' sha256sum | sha256sum`.

    Raises:
        OSError: a file that cannot be read, or a link that leads nowhere.
    """
    listing = hashlib.sha256()
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    relative = {path.relative_to(folder).as_posix().encode(): path for path in found}
    for name in sorted(relative):
        listing.update(sha256_file(relative[name]).encode() + b"  " + name + b"\n")
    return listing.hexdigest()


def cache_folder() -> Path:
    """Where derived files live: $EDGEKIT_CACHE, else $XDG_CACHE_HOME/edgekit, else ~/.cache/edgekit."""
    own = os.environ.get("EDGEKIT_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "edgekit"


def sync(path: Path) -> None:
    """Push a file's bytes, or a folder's entries, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle for a folder's entries
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all: a hidden draft beside it, then a rename.

    Raises:
        BadRequest: its folder does not exist.
    """
    if not path.parent.is_dir():
        raise BadRequest(f"{path.parent} is not a folder, so {path.name} cannot be written there; make it first")
    draft = _beside(path, ".part")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A new empty folder beside `target`, on its file system; whatever is left of it at the end is removed.

    Its hidden name carries our process id for people. For programs a lock on the folder itself says that its writer
    lives: a lock dies with its process, while process ids are reused. What dead writers left is put right first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _put_right(target)
    unlocked = _beside(target, ".new")
    unlocked.mkdir()
    lock = _lock(unlocked)
    folder = unlocked.rename(unlocked.with_suffix(DRAFT))  # only a locked folder ever has the name that is swept
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def move_into_place(folder: Path, target: Path) -> None:
    """Rename a finished folder to `target`; a bundle already there is kept until the new one stands.

    A writer killed between the two renames leaves no `target`; the next write puts the old bundle back.
    """
    sync(folder)
    if not target.exists():
        folder.rename(target)
        sync(target.parent)
        return
    lock = _lock(target)
    old = target.rename(_beside(target, RETIRED))
    try:
        folder.rename(target)
    except BaseException:
        old.rename(target)
        raise
    finally:
        _unlock(lock)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _put_right(target: Path) -> None:
    """Remove what killed writers of `target` left, and bring back a bundle that one had just moved aside."""
    ours = re.compile(re.escape(f".{target.name}.") + r"\d+-[0-9a-f]{8}\.edgekit-\w+")  # as `_beside` makes them
    for leftover in sorted(target.parent.iterdir()):
        if not ours.fullmatch(leftover.name) or (lock := _lock(leftover)) is None:
            continue
        if leftover.suffix == RETIRED and not target.exists():
            leftover.rename(target)
        else:
            shutil.rmtree(leftover, ignore_errors=True)
        _unlock(lock)


def _beside(target: Path, suffix: str) -> Path:
    return target.parent / f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}{suffix}"


def _lock(folder: Path) -> int | None:
    """Lock a folder; None where another process holds it, it is gone, or the system has no such locks.

    Windows has none: what a killed writer leaves there stays until a person removes it.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    handle = None
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    _unlock(handle)
    return None


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)
