"""Prompts to ids for text encoders: every tokenizer of a bundle is read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekit.bundle.manifest import Tokenizer as Entry
from edgekit.errors import BadManifest
from edgekit.runtime.tokenizer import Tokenizer

PADDING = -1  # no token's id


class Prompts:
    """The named tokenizers of a bundle, with the lengths its text encoders were exported for."""

    def __init__(self, root: Path, entries: Mapping[str, Entry]) -> None:
        self._root, self._entries = root, entries
        self._read: dict[str, Tokenizer] = {}

    def ids(self, name: str, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Ids of every text, (texts, length): cut so that the closing token stays, or padded.

        Raises:
            BadManifest: the tokenizer has no fixed length, or cannot be read.
        """
        entry, ids = self._encode(name, texts)
        filled: npt.NDArray[np.int64] = np.where(ids == PADDING, np.int64(entry.pad or 0), ids)
        return filled

    def masks(self, name: str, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """1 where `ids` are the text's and 0 where they pad, (texts, length). Raises BadManifest."""
        kept: npt.NDArray[np.int64] = (self._encode(name, texts)[1] != PADDING).astype(np.int64)
        return kept

    def _encode(self, name: str, texts: Sequence[str]) -> tuple[Entry, npt.NDArray[np.int64]]:
        entry = self._entries[name]
        if entry.length is None or entry.pad is None:
            raise BadManifest(f"tokenizer {name!r} has no fixed length and pad id; a text encoder here needs both")
        if name not in self._read:
            self._read[name] = Tokenizer.from_file(self._root / entry.file)
        tokenizer = self._read[name]
        said = [in_template(entry, text) for text in texts]
        return entry, np.array([tokenizer.encode_padded(text, entry.length, PADDING) for text in said], np.int64)


def in_template(entry: Entry, text: str) -> str:
    """The text as its text encoder was trained to see it: in lower case, inside an instruction or a chat's turns."""
    if entry.lower:
        text = text.lower().strip()
    if entry.template is None:
        return text
    before, _, after = entry.template.partition("{}")
    return f"{before}{text}{after}"
