"""Text to ids and back: `tokenizers` behind a small face, a fingerprint, and text that streams without breaking.

A bundle carries the `tokenizer.json` of its model; nothing here knows a family.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Engine

from edgekit.errors import BadManifest, BadRequest

REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no character, or not yet one


def fingerprint(raw: bytes) -> str:
    """sha256 of a `tokenizer.json` in canonical form: layout and key order do not count, everything else does.

    Raises:
        BadManifest: the bytes are no JSON.
    """
    try:
        canonical = json.dumps(json.loads(raw), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    except (ValueError, RecursionError) as why:
        raise BadManifest(f"tokenizer.json is no JSON: {why}") from why
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


class Tokenizer:
    """A `tokenizer.json`. Lengths are the caller's business: truncation and padding that the file asks for are off."""

    def __init__(self, raw: bytes) -> None:
        """Read the bytes of a `tokenizer.json`.

        Raises:
            BadManifest: `tokenizers` does not read them.
        """
        self._raw = raw
        try:
            self._engine = Engine.from_str(raw.decode())
        except Exception as why:
            # The extension module raises Exception itself, for every kind of mistake.
            raise BadManifest(f"tokenizer.json is not one that `tokenizers` reads: {why}") from why
        self._engine.no_truncation()
        self._engine.no_padding()

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """Read a `tokenizer.json`. Raises BadManifest."""
        return cls(path.read_bytes())

    @cached_property
    def fingerprint(self) -> str:
        """See `fingerprint`."""
        return fingerprint(self._raw)

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        size: int = self._engine.get_vocab_size(with_added_tokens=True)
        return size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; with `add_special_tokens` also what the model's own post-processor puts around them.

        Raises:
            BadRequest: the text holds half a surrogate pair, as bytes of another encoding do when read as UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as why:
            raise BadRequest(
                f"character {why.start} of the text is no Unicode: {text[why.start]!r}. Is it UTF-8?"
            ) from why
        ids: list[int] = self._engine.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_padded(self, text: str, length: int, pad: int) -> list[int]:
        """Exactly `length` ids: cut so that the closing special token stays, or filled with `pad` on the right."""
        self._engine.enable_truncation(length)
        try:
            ids = self.encode(text)
        finally:
            self._engine.no_truncation()
        return ids + [pad] * (length - len(ids))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids that are no token give nothing."""
        text: str = self._engine.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def id_of(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it."""
        found: int | None = self._engine.token_to_id(token)
        return found

    def is_silent(self, index: int) -> bool:
        """Whether decoding skips this id: a special token, or none at all (models pad their vocabulary)."""
        return index in self._special or self._engine.id_to_token(index) is None

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self._engine.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    @cached_property
    def byte_tokens(self) -> frozenset[int]:
        """Ids of `<0x00>` ... `<0xFF>`, if the decoder joins runs of them to characters (byte fallback)."""
        decoder = json.loads(self._raw).get("decoder")
        if "ByteFallback" not in _kinds(decoder):
            return frozenset()
        return frozenset(index for byte in range(256) if (index := self.id_of(f"<0x{byte:02X}>")) is not None)

    def stream(self) -> StreamingDetokenizer:
        """A detokenizer for one text."""
        return StreamingDetokenizer(self)


class StreamingDetokenizer:
    """Text of a growing list of ids: the pieces, and the last of `finish`, make up `decode` of all of them.

    A piece is given out once no later token can change it: a character whose bytes are not all there waits, and so does
    a run of byte-fallback tokens, which decodes as a whole. Decoders treat the first token of a text differently (they
    drop its leading space), so new tokens are decoded behind the ones given out last, and the difference is taken.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []  # given out; empty, or a piece that ends between characters
        self._waiting: list[int] = []

    def feed(self, ids: Iterable[int]) -> str:
        """Take the next ids; give the text that is now settled."""
        self._waiting += [index for index in ids if not self._tokenizer.is_silent(index)]
        if not self._waiting or self._waiting[-1] in self._tokenizer.byte_tokens:
            return ""
        before = self._tokenizer.decode(self._before)
        text = self._tokenizer.decode(self._before + self._waiting)
        if text.endswith(REPLACEMENT) or len(text) <= len(before) or not text.startswith(before):
            return ""
        self._before, self._waiting = self._waiting, []
        return text[len(before) :]

    def finish(self) -> str:
        """The ids are all there: what still waited, as it stands."""
        before = self._tokenizer.decode(self._before)
        text = self._tokenizer.decode(self._before + self._waiting)
        self._before, self._waiting = [], []
        return text[len(before) :]


def _kinds(decoder: Any) -> set[str]:
    """The `type` of a decoder and of those it is a sequence of."""
    if not isinstance(decoder, dict):
        return set()
    kinds = {str(decoder.get("type"))}
    for inner in decoder.get("decoders", ()):
        kinds |= _kinds(inner)
    return kinds
