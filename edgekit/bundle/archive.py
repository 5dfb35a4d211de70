"""The same bundle in one uncompressed `.zip`: packed reproducibly, unpacked once into a cache keyed by content."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from edgekit.bundle.files import BLOCK, cache_folder, open_regular, sha256_stream, staging, sync
from edgekit.bundle.manifest import MANIFEST_FILE, MAX_MANIFEST, Manifest, check_path
from edgekit.bundle.reader import Bundle, read_folder
from edgekit.bundle.validate import decode_manifest
from edgekit.errors import BadArchive, BadRequest, BundleError, ExtraFile, MissingFile, UnsafePath, WrongSize

EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can hold: equal bundles give equal archives
MAX_ENTRIES = 100_000
ENCRYPTED = 0x1  # general purpose flag (APPNOTE 4.4.4)


def pack_zip(bundle: Bundle, file: Path, *, overwrite: bool = False) -> None:
    """Write a bundle as one stored zip, atomically; equal bundles give equal bytes.

    Raises:
        BadRequest: `file` exists and `overwrite` was not asked.
        BundleError: the archive does not read back (a file changed while it was packed).
    """
    if file.exists() and not overwrite:
        raise BadRequest(f"{file} exists already; choose another name, or ask to overwrite it")
    names = [MANIFEST_FILE, *sorted(entry.path for entry in bundle.manifest.files)]
    with staging(file) as folder:
        draft = folder / "archive.zip"
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive:
            for name in names:
                info = zipfile.ZipInfo(name, EPOCH)
                info.external_attr = (stat.S_IFREG | 0o644) << 16
                source = bundle.root / name
                info.file_size = source.stat().st_size  # decides whether the entry needs 64-bit sizes
                with source.open("rb") as data, archive.open(info, "w") as entry:
                    shutil.copyfileobj(data, entry, BLOCK)
        _check_content(draft, bundle)
        sync(draft)
        os.replace(draft, file)
        sync(file.parent)


def open_zip(file: Path) -> Bundle:
    """Open a zipped bundle: unpacked and verified into the cache the first time, found there by content ever after.

    The folder is `<cache>/bundles/<digest>`. A cached copy is checked without hashing (it was always hashed when it
    was made) and made anew if that check fails.

    Raises:
        BadArchive: not a zip, compressed, encrypted, with an entry twice, or larger inside than outside.
        UnsafePath: an entry that is a link or would leave the folder.
        BundleError: what is inside is no bundle, as for a folder.
    """
    with open_regular(file) as stream:
        _, _, digest = _read_index(file, stream)
    target = cache_folder() / "bundles" / digest
    if (cached := _cached(target, digest)) is not None:
        return cached
    with staging(target) as folder:
        if _unpack(file, folder / "bundle").digest != digest:
            raise BadArchive(f"{file} changed while it was read; open it again")
        if (cached := _cached(target, digest)) is not None:  # another process was faster, and may be reading its copy
            return cached
        with suppress(OSError):
            target.rename(folder / "broken")
        with suppress(OSError):  # faster by a moment; what it made passed the same check
            (folder / "bundle").rename(target)
    return read_folder(target, verify=False)


def _cached(target: Path, digest: str) -> Bundle | None:
    """The unpacked copy, if it is there and whole."""
    with suppress(BundleError, FileNotFoundError):
        cached = read_folder(target, verify=False)
        return cached if cached.digest == digest else None
    return None


def _check_content(file: Path, bundle: Bundle) -> None:
    """Read a packed archive back: every entry must be the file the manifest means."""
    with open_regular(file) as stream:
        archive, entries, digest = _read_index(file, stream)
        same = digest == bundle.digest
        for listed in bundle.manifest.files:
            with archive.open(entries[listed.path]) as entry:
                same &= sha256_stream(entry) == listed.sha256
    if not same:
        raise BadArchive(f"{bundle.root} changed while it was packed; read it again and pack once more")


def _unpack(file: Path, folder: Path) -> Bundle:
    """Copy every entry into a new folder and check the result in full."""
    with open_regular(file) as stream:
        archive, entries, _ = _read_index(file, stream)
        for name, info in entries.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with archive.open(info) as entry, path.open("xb") as copy:
                    shutil.copyfileobj(entry, copy, BLOCK)
            except (zipfile.BadZipFile, NotImplementedError, EOFError) as why:
                raise BadArchive(f"{file}: {name}: {why}. Fetch the archive anew.") from why
    return read_folder(folder)


def _read_index(file: Path, stream: BinaryIO) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo], str]:
    """The archive, its entries by name, and the digest of its manifest, all checked; nothing is unpacked."""
    try:
        archive = zipfile.ZipFile(stream)
        entries = _check_entries(file, archive.infolist(), os.fstat(stream.fileno()).st_size)
        if MANIFEST_FILE not in entries:
            raise MissingFile(f"{file} holds no {MANIFEST_FILE} at its top, so it is not a bundle")
        if entries[MANIFEST_FILE].file_size > MAX_MANIFEST:
            raise WrongSize(f"{file}: {MANIFEST_FILE} has more than {MAX_MANIFEST:,} bytes. Is this a bundle?")
        raw = archive.read(MANIFEST_FILE)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, UnicodeDecodeError) as why:
        raise BadArchive(f"{file} is not a readable zip: {why}. Fetch it anew.") from why
    _compare(file, decode_manifest(raw), entries)
    return archive, entries, hashlib.sha256(raw).hexdigest()


def _check_entries(file: Path, infos: list[zipfile.ZipInfo], size: int) -> dict[str, zipfile.ZipInfo]:
    """Entries by name: plain stored files, whose bytes together fit in the archive (so none of them overlap)."""
    if len(infos) > MAX_ENTRIES:
        raise BadArchive(f"{file} has {len(infos):,} entries; no bundle has more than {MAX_ENTRIES:,}")
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name, kind = info.filename, stat.S_IFMT(info.external_attr >> 16)
        check_path(name.removesuffix("/"))
        if info.orig_filename != name:
            raise UnsafePath(f"{file}: the entry name {info.orig_filename!r} holds characters no file name may")
        if info.is_dir() and not info.file_size and kind in (0, stat.S_IFDIR):
            continue  # `zip -r` writes one for each folder
        if info.is_dir() or kind not in (0, stat.S_IFREG):
            raise UnsafePath(f"{file}: {name} is a link or a special file; a bundle holds plain files only")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise BadArchive(f"{file}: {name} is compressed; a bundle's zip is stored (zip -0r), so that it opens fast")
        if info.flag_bits & ENCRYPTED:
            raise BadArchive(f"{file}: {name} is encrypted")
        if name in entries:
            raise BadArchive(f"{file} holds {name} twice")
        entries[name] = info
    total = sum(info.file_size for info in entries.values())
    if total > size:
        raise BadArchive(f"{file} declares {total:,} bytes of files in {size:,} bytes of archive; its entries overlap")
    return entries


def _compare(file: Path, manifest: Manifest, entries: dict[str, zipfile.ZipInfo]) -> None:
    """Names and sizes of the entries against the manifest, before a byte is unpacked."""
    listed = {entry.path: entry.bytes for entry in manifest.files}
    for name in entries:
        if name not in listed and name != MANIFEST_FILE:
            raise ExtraFile(f"{file}: {name} is not in the manifest. A bundle holds what it lists and nothing more.")
    for name, size in listed.items():
        if name not in entries:
            raise MissingFile(f"{file}: {name} is missing from the archive. Fetch it anew, or pack it again.")
        if entries[name].file_size != size:
            raise WrongSize(f"{file}: {name} has {entries[name].file_size:,} bytes; the manifest says {size:,}")
