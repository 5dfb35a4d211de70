"""Opening a bundle's folder: everything is checked before anything is handed out."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgekit.bundle.files import open_regular, sha256_file
from edgekit.bundle.graphfile import read_graph
from edgekit.bundle.manifest import MANIFEST_FILE, MAX_MANIFEST, Manifest
from edgekit.bundle.validate import check_graph, decode_manifest
from edgekit.errors import BadManifest, ExtraFile, MissingFile, UnsafePath, WrongHash, WrongSize


@dataclass(frozen=True)
class Bundle:
    """A bundle that passed its check. Made by `read_bundle` alone.

    `digest` is the sha256 of `edgekit.json`, which holds the hashes of all the rest: one name for the whole content.
    """

    root: Path
    manifest: Manifest
    digest: str

    def path(self, relative: str) -> Path:
        """Where a file of the manifest lies.

        Raises:
            MissingFile: the manifest lists no such file.
        """
        if relative not in {file.path for file in self.manifest.files}:
            raise MissingFile(f"{self.root}: the manifest lists no file {relative!r}")
        return self.root / relative

    def graph(self, part: str) -> Path:
        """The ONNX file of a part.

        Raises:
            BadManifest: no such part.
        """
        if part not in self.manifest.parts:
            raise BadManifest(f"{self.root} has no part {part!r}; it has {', '.join(self.manifest.parts)}")
        return self.root / self.manifest.parts[part].graph

    def tokenizer(self, name: str = "default") -> Path:
        """The `tokenizer.json` of a named tokenizer.

        Raises:
            BadManifest: no such tokenizer.
        """
        if name not in self.manifest.tokenizers:
            known = ", ".join(self.manifest.tokenizers) or "none"
            raise BadManifest(f"{self.root} has no tokenizer {name!r}; it has {known}")
        return self.root / self.manifest.tokenizers[name].file


def read_folder(folder: Path, *, verify: bool = True) -> Bundle:
    """Check and open a bundle's folder; the folder itself may be a link, nothing inside it may.

    The order is from cheap to dear: the manifest by itself, names and kinds of files, sizes, hashes, graphs.

    Args:
        folder: the bundle.
        verify: hash every file. Without it all else is still checked.

    Raises:
        BundleError: of the class that fits; nothing is opened for use.
    """
    try:
        root = folder.resolve(strict=True)
        raw = _read_manifest(root)
        manifest = decode_manifest(raw)
        sizes = {file.path: file.bytes for file in manifest.files}
        _check_sizes(root, sizes, _scan(root, sizes))
        if verify:
            _check_hashes(root, manifest)
        for name, part in manifest.parts.items():
            check_graph(name, part, read_graph(root / part.graph), sizes)
    except OSError as why:
        raise MissingFile(f"{why.filename or folder} cannot be read: {why.strerror or why}") from why
    return Bundle(root, manifest, hashlib.sha256(raw).hexdigest())


def _read_manifest(root: Path) -> bytes:
    path = root / MANIFEST_FILE
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_MANIFEST:
                raise WrongSize(f"{path} has {size:,} bytes; the limit is {MAX_MANIFEST:,}. Is this a bundle?")
            return file.read(MAX_MANIFEST + 1)
    except (FileNotFoundError, NotADirectoryError) as why:
        raise MissingFile(
            f"no {MANIFEST_FILE} in {root}, so it is not a bundle (or its export did not finish)"
        ) from why


def _scan(root: Path, listed: dict[str, int]) -> dict[str, int]:
    """Bytes of every file really there, by relative path; only folders that a listed file lies in are entered."""
    folders = {str(parent) for path in listed for parent in PurePosixPath(path).parents} | {"."}
    found: dict[str, int] = {}
    pending = ["."]
    while pending:
        folder = pending.pop()
        with os.scandir(root / folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):  # the same fault is named on every system
                path = str(PurePosixPath(folder, entry.name))
                mode = entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISLNK(mode):
                    raise UnsafePath(f"{root / path} is a link; a bundle holds plain files and folders only")
                if stat.S_ISDIR(mode) and path in folders:
                    pending.append(path)
                elif path == MANIFEST_FILE or (stat.S_ISREG(mode) and path in listed):
                    found[path] = entry.stat(follow_symlinks=False).st_size
                else:
                    _refuse(root, path, mode, listed)
    found.pop(MANIFEST_FILE, None)
    return found


def _refuse(root: Path, path: str, mode: int, listed: dict[str, int]) -> None:
    if stat.S_ISDIR(mode) and path in listed:
        raise MissingFile(f"{root / path} is a folder where the manifest lists a file. Fetch the bundle anew.")
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise UnsafePath(f"{root / path} is neither file nor folder; a bundle holds nothing else")
    raise ExtraFile(
        f"{root / path} is not in the manifest. A bundle holds what it lists and nothing more; move it away."
    )


def _check_sizes(root: Path, declared: dict[str, int], found: dict[str, int]) -> None:
    for path, size in declared.items():
        if path not in found:
            raise MissingFile(f"{root / path} is missing. Fetch the bundle anew, or export the model again.")
        if found[path] != size:
            raise WrongSize(f"{root / path} has {found[path]:,} bytes; the manifest says {size:,}. Fetch it anew.")


def _check_hashes(root: Path, manifest: Manifest) -> None:
    for file in manifest.files:
        found = sha256_file(root / file.path)
        if found != file.sha256:
            raise WrongHash(
                f"{root / file.path} has sha256 {found[:12]}…; the manifest says {file.sha256[:12]}…. "
                f"It was changed or damaged: fetch it anew."
            )
