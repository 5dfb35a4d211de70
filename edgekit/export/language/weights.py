"""Lazy reading of safetensors checkpoints, one file or sharded.

Only headers are read when a checkpoint is opened. A tensor's bytes are mapped into memory when it is read, and unmapped
when the caller lets go of the array.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from edgekit.errors import BadSource, UnsupportedModel
from edgekit.export.headers import Entry, read_header

Array = npt.NDArray[Any]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# The stored types that can be model weights here.
FLOATS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class Checkpoint:
    """The tensors of a model folder, by name.

    Raises:
        BadSource: no safetensors, a missing shard, or a malformed or truncated file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _weight_files(folder)
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            for name, entry in read_header(file).entries.items():
                if name in self.entries:
                    raise BadSource(f"{file}: tensor {name!r} is also in {self.entries[name].file.name}")
                self.entries[name] = entry
        self._check_index()

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def entry(self, name: str) -> Entry:
        """Where `name` lies; raises BadSource when the checkpoint lacks it."""
        if name not in self.entries:
            raise BadSource(
                f"{self.folder}: the checkpoint has no tensor {name!r}, which config.json calls for. "
                "Download the model again, or check that config.json belongs to these weights."
            )
        return self.entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of `name`."""
        return self.entry(name).shape

    def read(self, name: str) -> Array:
        """The tensor as a read-only map of the file: float32, float16 or bfloat16.

        Raises:
            BadSource: no such tensor.
            UnsupportedModel: a stored type that is not a plain float (a quantized checkpoint).
        """
        entry = self.entry(name)
        if entry.dtype not in FLOATS:
            raise UnsupportedModel(
                f"{entry.file}: tensor {name!r} is stored as {entry.dtype}; weights must be F32, F16 or BF16. "
                "Export the unquantized model and let edgekit quantize it."
            )
        if entry.nbytes == 0:
            return np.empty(entry.shape, FLOATS[entry.dtype])
        mapped = np.memmap(entry.file, np.uint8, "r", entry.offset, (entry.nbytes,))
        return mapped.view(FLOATS[entry.dtype]).reshape(entry.shape)

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same bytes."""
        a, b = self.entry(first), self.entry(second)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        left, right = self.read(first).reshape(-1).view(np.uint8), self.read(second).reshape(-1).view(np.uint8)
        step = 1 << 24
        return all(np.array_equal(left[i : i + step], right[i : i + step]) for i in range(0, left.size, step))

    def _check_index(self) -> None:
        index = self.folder / INDEX
        if not index.exists():
            return
        for name, file in _weight_map(index).items():
            if name not in self.entries or self.entries[name].file.name != file:
                raise BadSource(f"{index}: tensor {name!r} is not in {file}, where the index puts it")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        files: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in files.values()):
            raise ValueError("a shard is a file name beside the index")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as why:
        raise BadSource(f"{index}: malformed index ({why}). Download it again.") from why
    return files


def _weight_files(folder: Path) -> tuple[Path, ...]:
    if (folder / INDEX).exists():
        files = tuple(folder / name for name in sorted(set(_weight_map(folder / INDEX).values())))
    elif (folder / SINGLE).exists():
        files = (folder / SINGLE,)
    else:
        pickled = any(folder.glob("*.bin"))
        advice = "Convert the .bin files with transformers' save_pretrained." if pickled else "Is it a model folder?"
        raise BadSource(f"{folder} has neither {SINGLE} nor {INDEX}. {advice}")
    for file in files:
        if not file.is_file():
            raise BadSource(f"{file} is missing: the checkpoint is incomplete. Download it again.")
    return files
