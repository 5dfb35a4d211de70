"""The zip is the same bundle: same bytes each time, opened once, then found by content."""

from __future__ import annotations

import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from edgekit.bundle import archive
from edgekit.bundle.store import pack_zip, read_bundle
from edgekit.errors import BadArchive, BadRequest
from tests.bundle import tiny


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def packed(image_bundle: Path, tmp_path: Path) -> Path:
    """The good bundle as a zip."""
    pack_zip(read_bundle(image_bundle), tmp_path / "tiny.zip")
    return tmp_path / "tiny.zip"


def test_a_zip_reads_like_its_folder(image_bundle: Path, packed: Path, cache: Path) -> None:
    """Manifest and digest are the folder's; the files lie in the cache under the digest."""
    folder, opened = read_bundle(image_bundle), read_bundle(packed)
    assert (opened.manifest, opened.digest) == (folder.manifest, folder.digest)
    assert opened.root == (cache / "bundles" / folder.digest).resolve()


def test_packing_is_reproducible_and_stored(image_bundle: Path, packed: Path, tmp_path: Path) -> None:
    """Two packings are equal byte for byte, and no entry is compressed."""
    pack_zip(read_bundle(image_bundle), tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == packed.read_bytes()
    with zipfile.ZipFile(packed) as stored:
        assert {info.compress_type for info in stored.infolist()} == {zipfile.ZIP_STORED}
        assert stored.namelist()[0] == "edgekit.json"


def test_the_second_opening_unpacks_nothing(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once verified, a zip is opened from the cache without hashing or copying."""
    first = read_bundle(packed)
    monkeypatch.setattr(archive, "_unpack", lambda *_: pytest.fail("unpacked again"))
    monkeypatch.setattr("edgekit.bundle.reader.sha256_file", lambda _: pytest.fail("hashed again"))
    assert read_bundle(packed) == first


def test_a_broken_cache_entry_is_made_anew(packed: Path) -> None:
    """A cached copy that lost a file is replaced, not reported."""
    root = read_bundle(packed).root
    (root / "graphs/unet.onnx").unlink()
    assert read_bundle(packed).graph("unet").is_file()


def test_a_copy_made_by_another_process_is_used(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the same bundle appears in the cache while we unpack, ours gives way: theirs may be in use already."""
    unpack, theirs = archive._unpack, []

    def slow(file: Path, folder: Path) -> object:
        made = unpack(file, folder)
        monkeypatch.setattr(archive, "_unpack", unpack)
        theirs.append(read_bundle(packed).graph("unet").stat().st_ino)
        return made

    monkeypatch.setattr(archive, "_unpack", slow)
    opened = read_bundle(packed)
    assert [opened.graph("unet").stat().st_ino] == theirs
    assert list(opened.root.parent.iterdir()) == [opened.root]


def test_an_existing_file_is_overwritten_only_on_request(image_bundle: Path, packed: Path) -> None:
    """Packing over a file needs `overwrite`, and then replaces it whole."""
    bundle = read_bundle(image_bundle)
    with pytest.raises(BadRequest, match="exists"):
        pack_zip(bundle, packed)
    packed.write_bytes(b"old")
    pack_zip(bundle, packed, overwrite=True)
    assert read_bundle(packed).digest == bundle.digest


def test_a_bundle_that_changes_while_it_is_packed_gives_no_zip(tmp_path: Path) -> None:
    """The archive is read back against the hashes; a file changed after opening is found."""
    tiny.write(tmp_path / "b", tiny.image_draft)
    bundle = read_bundle(tmp_path / "b")
    data = tmp_path / "b/graphs/unet.onnx.data"
    data.write_bytes(b"\xff" + data.read_bytes()[1:])
    with pytest.raises(BadArchive, match="changed"):
        pack_zip(bundle, tmp_path / "b.zip")
    assert sorted(os.listdir(tmp_path)) == ["b"]


def test_a_zip_that_changes_while_it_is_read_is_refused(
    packed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache entry is named after the index that was read; other content never gets that name."""
    unpack = archive._unpack
    monkeypatch.setattr(archive, "_unpack", lambda *given: replace(unpack(*given), digest="0" * 64))
    with pytest.raises(BadArchive, match="changed"):
        read_bundle(packed)
    assert list((cache / "bundles").iterdir()) == []


def test_the_number_of_entries_is_bounded(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive of a million empty files is refused by its index."""
    monkeypatch.setattr(archive, "MAX_ENTRIES", 3)
    with pytest.raises(BadArchive, match="entries"):
        read_bundle(packed)
