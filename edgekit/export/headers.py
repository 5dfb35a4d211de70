"""The header of a safetensors file, read with suspicion: no weight is touched.

It is checked as the format page demands (https://github.com/huggingface/safetensors#format): known types, sizes that
fit, no holes, no overlaps, and a file that ends where its header says.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import BadSource

_MAX_HEADER = 100_000_000  # the format's own limit

# Bytes per element of every type the format knows.
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_ITEM_BYTES |= {"I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: file, absolute offset, element type (safetensors' name) and shape."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of one file, in the order they lie there, and what was written beside them."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """Every tensor of one safetensors file, and its metadata.

    Raises:
        BadSource: the file breaks the format, or is shorter than its header says.
    """
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise BadSource(f"{file} is not a safetensors file, or is cut short. Download it again.")
            raw = stream.read(length)
    except OSError as why:
        raise BadSource(f"{file} is not a safetensors file that can be read: {why}") from why
    try:
        header = json.loads(raw)
        metadata = dict(header.pop("__metadata__", None) or {})
        spans = sorted((*_span(value), name) for name, value in header.items())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as why:
        raise BadSource(f"{file}: malformed safetensors header ({why}). Download it again.") from why
    entries, expected = {}, 0
    for begin, end, name in spans:
        value = header[name]
        entry = Entry(file, 8 + length + begin, value["dtype"], tuple(value["shape"]))
        if begin != expected or end - begin != entry.nbytes:
            raise BadSource(f"{file}: tensor {name!r} does not fill the bytes its header gives it")
        entries[name], expected = entry, end
    if 8 + length + expected != size:
        raise BadSource(
            f"{file} has {size:,} bytes, its header describes {8 + length + expected:,}; is the download complete?"
        )
    return Header(entries, metadata)


def _span(value: dict[str, Any]) -> tuple[int, int]:
    begin, end = value["data_offsets"]
    if value["dtype"] not in _ITEM_BYTES:
        raise ValueError(f"unknown type {value['dtype']!r}")
    if not all(type(n) is int and n >= 0 for n in (begin, end, *value["shape"])):
        raise ValueError("sizes must be whole and not negative")
    return begin, end
