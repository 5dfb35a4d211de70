"""Hashes anybody can repeat with coreutils, and caches where people told us to put them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.bundle.files import BLOCK, cache_folder, open_regular, sha256_file, sha256_tree, staging, write_atomically
from edgekit.errors import BadRequest, UnsafePath

LISTING = "find -L . -type f -not -path '*/.*' -printf '%P\\n' | LC_ALL=C sort | xargs -d '\\n' sha256sum | sha256sum"


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_a_file_is_hashed_whole(tmp_path: Path, size: int) -> None:
    """Block edges do not matter."""
    raw = os.urandom(size)
    (tmp_path / "f").write_bytes(raw)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(raw).hexdigest()


@given(names=st.lists(st.text("abZ-_.é0 ", min_size=1, max_size=6), unique=True, max_size=8))
def test_a_tree_has_the_hash_the_docstring_says(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    """Names and bytes decide, order on disk and hidden files do not; the shell line gives the same figure."""
    folder = tmp_path_factory.mktemp("tree")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    for number, name in enumerate(name for name in names if name.strip(".")):
        (folder / f"d{number % 2}").mkdir(exist_ok=True)
        (folder / f"d{number % 2}" / name).write_text(name)
    rows = [
        f"{sha256_file(path)}  {path.relative_to(folder).as_posix()}\n".encode()
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    rows.sort(key=lambda row: row[66:])
    assert sha256_tree(folder) == hashlib.sha256(b"".join(rows)).hexdigest()


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs coreutils")
def test_a_shell_gives_the_same_hash(tmp_path: Path) -> None:
    """The command in the docstring, run as written, on a folder with a link to a file."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/weights").write_bytes(os.urandom(1000))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "linked").symlink_to(tmp_path / "sub/weights")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/x").write_text("not ours")
    shell = subprocess.run(["sh", "-c", LISTING], cwd=tmp_path, capture_output=True, check=True, text=True)
    assert shell.stdout.split()[0] == sha256_tree(tmp_path)


def test_a_renamed_file_changes_the_hash(tmp_path: Path) -> None:
    """Names count, not only bytes."""
    (tmp_path / "a").write_text("x")
    before = sha256_tree(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert sha256_tree(tmp_path) != before


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"EDGEKIT_CACHE": "/e", "XDG_CACHE_HOME": "/x"}, "/e"),
        ({"EDGEKIT_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/edgekit"),
        ({"EDGEKIT_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/edgekit"),
    ],
)
def test_the_cache_is_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    """Our own variable first, then the desktop's, then the home folder."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    """A link, a folder and a FIFO are refused without waiting on any of them."""
    place = tmp_path / "f"
    {"link": lambda: place.symlink_to(os.devnull), "folder": place.mkdir, "fifo": lambda: os.mkfifo(place)}[kind]()
    with pytest.raises(UnsafePath):
        open_regular(place)


def test_a_file_that_changes_kind_while_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is the kind of what was opened, not of what stood there a moment before."""
    (tmp_path / "regular").touch()
    before = os.lstat(tmp_path / "regular")
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr("edgekit.bundle.files.os.lstat", lambda _: before)
    with pytest.raises(UnsafePath, match="stopped being"):
        open_regular(tmp_path / "fifo")


@pytest.mark.parametrize("name", ["*", "b", "[b]", "b.edgekit-draft"])
def test_a_writer_sweeps_only_its_own_leftovers(tmp_path: Path, name: str) -> None:
    """Names that look like patterns, or like a draft of something longer, leave their neighbours alone."""
    neighbours = [
        f".{name}.c.1-0123abcd.edgekit-draft",
        f".x{name}.1-0123abcd.edgekit-draft",
        f".{name}.1-0123abcd.bak",
    ]
    for folder in (*neighbours, f".{name}.1-0123abcd.edgekit-draft"):
        (tmp_path / folder).mkdir()
    with staging(tmp_path / name) as draft:
        assert sorted(os.listdir(tmp_path)) == sorted([*neighbours, draft.name])
    assert sorted(os.listdir(tmp_path)) == sorted(neighbours)


def test_a_retired_bundle_comes_back_to_its_own_name_only(tmp_path: Path) -> None:
    """What a killed swap moved aside returns when its target is gone, and is removed when the new one stands."""
    retired = tmp_path / ".b.1-0123abcd.edgekit-old"
    retired.mkdir()
    (retired / "old").touch()
    with staging(tmp_path / "b"):
        assert (tmp_path / "b" / "old").is_file()
    retired.mkdir()
    with staging(tmp_path / "b"):
        assert not retired.exists()
        assert (tmp_path / "b" / "old").is_file()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second write replaces the first; one that fails half-way leaves the first, and no draft."""
    file = tmp_path / "f"
    write_atomically(file, b"first")
    write_atomically(file, b"second")
    assert file.read_bytes() == b"second"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="full"):
            write_atomically(file, b"third")
    assert file.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["f"]
    with pytest.raises(BadRequest, match="not a folder"):
        write_atomically(tmp_path / "nowhere" / "f", b"x")
