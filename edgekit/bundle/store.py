"""Reading and writing bundles: the face of this layer.

    bundle = read_bundle(Path("my.bundle"))             # a folder, or the same folder in one .zip

    with new_bundle(Path("my.bundle")) as draft:        # nothing of that name appears before `seal` returns
        export_graphs(draft.root / "graphs")
        manifest = draft.seal(manifest)

A bundle is whole or absent: it is written to a hidden folder beside its target, read back in full, then renamed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from edgekit.bundle.archive import open_zip, pack_zip
from edgekit.bundle.files import move_into_place, sha256_file, sha256_tree, staging, sync
from edgekit.bundle.manifest import MANIFEST_FILE, FileEntry, Manifest, encode_manifest
from edgekit.bundle.reader import Bundle, read_folder
from edgekit.errors import BadRequest, MissingFile, UnsafePath

__all__ = ["Bundle", "Draft", "new_bundle", "pack_zip", "read_bundle", "sha256_file", "sha256_tree"]


def read_bundle(path: Path, *, verify: bool = True) -> Bundle:
    """Check a bundle in full and open it.

    Args:
        path: its folder, a link to its folder, or a stored `.zip` of it.
        verify: hash every file; without it, all else is still checked. A zip is hashed when it is first opened, and
            from then on a checked copy in the cache answers for it.

    Raises:
        BundleError: of the class that fits; nothing is half-loaded.
    """
    if path.is_dir():
        return read_folder(path, verify=verify)
    if path.is_file():
        return open_zip(path.resolve())
    if path.exists():
        raise UnsafePath(f"{path} is neither a folder nor a file, so it cannot be a bundle")
    raise MissingFile(f"there is no bundle at {path}")


@dataclass
class Draft:
    """A bundle being written: fill `root`, then `seal`. Files below `root` are the bundle's files."""

    root: Path
    target: Path
    overwrite: bool = False
    sealed: bool = field(default=False, init=False)

    def seal(self, manifest: Manifest) -> Manifest:
        """Hash what lies in `root`, write `edgekit.json`, read everything back as a stranger would, and rename.

        Args:
            manifest: all but its `files`, which are taken from the folder.

        Returns:
            The manifest as written, with its `files`.

        Raises:
            BundleError: the folder does not hold what the manifest says; no bundle appears.
            BadRequest: something appeared at the target meanwhile.
        """
        paths = sorted(path for path in self.root.rglob("*") if path.is_symlink() or not path.is_dir())
        for path in paths:
            if path.is_symlink() or not path.is_file():
                raise UnsafePath(f"{path} is not a plain file; write a copy of what it leads to")
        entries = tuple(self._entry(path) for path in paths if path != self.root / MANIFEST_FILE)
        file = self.root / MANIFEST_FILE
        file.write_bytes(encode_manifest(msgspec.structs.replace(manifest, files=entries)))
        for written in (file, *paths, *(path for path in self.root.rglob("*") if path.is_dir())):
            sync(written)
        sealed = read_folder(self.root).manifest
        _check_target(self.target, overwrite=self.overwrite)
        move_into_place(self.root, self.target)
        self.sealed = True
        return sealed

    def _entry(self, path: Path) -> FileEntry:
        return FileEntry(path.relative_to(self.root).as_posix(), path.stat().st_size, sha256_file(path))


@contextmanager
def new_bundle(target: Path, *, overwrite: bool = False) -> Iterator[Draft]:
    """A draft beside `target`; leaving the block by `seal` makes the bundle, leaving it any other way makes nothing.

    Args:
        target: where the bundle is to stand; a link there is followed.
        overwrite: replace a bundle of that name. The old one stands until the new one is verified; anything that is
            not a bundle is never replaced.

    Raises:
        BadRequest: the target exists, and `overwrite` was not asked or it is not a bundle.
    """
    target = Path(os.path.realpath(target))
    _check_target(target, overwrite=overwrite)
    with staging(target) as folder:
        draft = Draft(folder, target, overwrite)
        yield draft
        assert draft.sealed, "a draft must be sealed before its block ends"


def _check_target(target: Path, *, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise BadRequest(f"{target} exists already; choose another name, or ask to overwrite it")
    if not (target / MANIFEST_FILE).is_file():
        raise BadRequest(f"{target} is not a bundle, so it is not overwritten; move it away or choose another name")
