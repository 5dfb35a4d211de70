"""What a zip can do that a folder cannot: each is refused, and nothing lands outside or stays in the cache."""

from __future__ import annotations

import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekit.bundle.manifest import MANIFEST_FILE
from edgekit.bundle.store import pack_zip, read_bundle
from edgekit.errors import BadArchive, BundleError, ExtraFile, MissingFile, UnsafePath, WrongHash, WrongSize

Entries = dict[str, bytes]
GRAPH = "graphs/unet.onnx"
LINK, FIFO = 0o120777 << 16, 0o010644 << 16


def written(file: Path, entries: Entries, *more: tuple[zipfile.ZipInfo, bytes]) -> None:
    """A zip of these entries, by the standard library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # zipfile warns of the duplicate names we want
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
            for info, data in more:
                archive.writestr(info, data)


def entry(name: str, mode: int = 0, compress: int = zipfile.ZIP_STORED) -> zipfile.ZipInfo:
    """A directory row of a zip with these properties."""
    info = zipfile.ZipInfo(name)
    info.external_attr, info.compress_type = mode, compress
    return info


def adding(info: zipfile.ZipInfo, data: bytes = b"x") -> Callable[[Path, Entries], None]:
    """The good bundle and one entry more."""
    return lambda file, entries: written(file, entries, (info, data))


def without(name: str) -> Callable[[Path, Entries], None]:
    """The good bundle less one entry."""
    return lambda file, entries: written(file, {key: data for key, data in entries.items() if key != name})


def with_bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path, Entries], None]:
    """The good bundle with one entry's bytes changed and its checksum right."""
    return lambda file, entries: written(file, entries | {name: change(entries[name])})


def raw(change: Callable[[bytes], bytes]) -> Callable[[Path, Entries], None]:
    """The good archive with its own bytes changed."""

    def make(file: Path, entries: Entries) -> None:
        written(file, entries)
        file.write_bytes(change(file.read_bytes()))

    return make


def overlapping(file: Path, entries: Entries) -> None:
    """Two directory rows for the same stored bytes (a quine-free zip bomb, Fifield 2019)."""
    big = b"\0" * 40_000
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
        archive.writestr("bomb0", big)
        for copy in range(1, 4):
            twin = entry(f"bomb{copy}")
            source = archive.getinfo("bomb0")
            twin.header_offset, twin.CRC = source.header_offset, source.CRC
            twin.file_size = twin.compress_size = source.file_size
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
        archive._didModify = True  # type: ignore[attr-defined]


def encrypted(data: bytes) -> bytes:
    """Set the encryption flag of every row of the central directory."""
    out = bytearray(data)
    at = out.find(b"PK\x01\x02")
    while at >= 0:
        flags = struct.unpack_from("<H", out, at + 8)[0]
        struct.pack_into("<H", out, at + 8, flags | 1)
        at = out.find(b"PK\x01\x02", at + 4)
    return bytes(out)


CASES: dict[str, tuple[Callable[[Path, Entries], None], type[BundleError], str]] = {
    "compressed": (adding(entry("x", compress=zipfile.ZIP_DEFLATED), b"x" * 999), BadArchive, "zip -0r"),
    "a bomb": (adding(entry("x", compress=zipfile.ZIP_BZIP2), b"\0" * 10_000_000), BadArchive, "compressed"),
    "overlapping entries": (overlapping, BadArchive, "overlap"),
    "encrypted": (raw(encrypted), BadArchive, "encrypted"),
    "a link": (adding(entry("graphs/link", LINK), b"/etc/passwd"), UnsafePath, "link"),
    "a FIFO": (adding(entry("graphs/fifo", FIFO), b""), UnsafePath, "special"),
    "a duplicate": (adding(entry(GRAPH)), BadArchive, "twice"),
    "two manifests": (adding(entry(MANIFEST_FILE), b"{}"), BadArchive, "twice"),
    "traversal": (adding(entry("../escaped")), UnsafePath, "escaped"),
    "traversal below": (adding(entry("graphs/../../escaped")), UnsafePath, "escaped"),
    "absolute": (adding(entry("/escaped")), UnsafePath, "escaped"),
    "a drive": (adding(entry("C:/escaped")), UnsafePath, "escaped"),
    "a name cut by a NUL": (
        raw(lambda data: data.replace(b"tokenizer.json", b"tokenizer\0json")),
        UnsafePath,
        "characters",
    ),
    "a folder with bytes": (adding(entry("graphs/x/")), UnsafePath, "graphs/x/"),
    "an extra file": (adding(entry("payload.py")), ExtraFile, "payload.py"),
    "a missing file": (without(GRAPH), MissingFile, GRAPH),
    "no manifest": (without(MANIFEST_FILE), MissingFile, "edgekit.json"),
    "a shorter file": (with_bytes(GRAPH, lambda data: data[:-1]), WrongSize, GRAPH),
    "a changed file": (with_bytes(GRAPH, lambda data: data[:-1] + b"?"), WrongHash, GRAPH),
    "a manifest of 65 MiB": (
        with_bytes(MANIFEST_FILE, lambda data: data + b" " * (65 * 2**20)),
        WrongSize,
        "edgekit.json",
    ),
    "a bad checksum": (raw(lambda data: data.replace(b"out_sample", b"out_sampl?", 1)), BadArchive, "CRC"),
    "no directory": (raw(lambda data: data[:-30]), BadArchive, "not a readable zip"),
    "not a zip": (raw(lambda _: b"#!/bin/sh\n"), BadArchive, "not a readable zip"),
    "an empty file": (raw(lambda _: b""), BadArchive, "not a readable zip"),
    "another name inside": (
        raw(lambda data: data.replace(b"unet.onnx\x08", b"UNET.onnx\x08", 1)),
        BadArchive,
        "differ",
    ),
}


@pytest.fixture(scope="module")
def entries(image_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Entries:
    """The good bundle's entries, manifest first."""
    file = tmp_path_factory.mktemp("zip") / "good.zip"
    pack_zip(read_bundle(image_bundle), file)
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("name", CASES)
def test_a_spoilt_zip_is_refused(entries: Entries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Every row ends in its own error; nothing is left in the cache or beside it."""
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "deep" / "cache"))
    make, error, words = CASES[name]
    file = tmp_path / "spoilt.zip"
    make(file, entries)
    with pytest.raises(BundleError) as caught:
        read_bundle(file)
    assert type(caught.value) is error, repr(caught.value)
    assert caught.value.exit_code == 5
    assert words in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


def test_a_zip_written_by_other_tools_is_read(
    entries: Entries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folder entries and any order of files are as good as our own packing."""
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "other.zip"
    backwards = dict(sorted(entries.items(), reverse=True))
    written(file, backwards, (entry("graphs/", 0o040755 << 16), b""))
    assert read_bundle(file).manifest.task == "text-to-image"
