"""safetensors are read as written, lazily, and refused when they are not what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import save, save_file

from edgekit.errors import BadSource, UnsupportedModel
from edgekit.export.language.weights import INDEX, SINGLE, Checkpoint

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16), "c": np.float32(2)[None]}


def single(folder: Path, tensors: dict[str, np.ndarray] | None = None) -> Path:
    save_file(tensors or TENSORS, folder / SINGLE)
    return folder


def sharded(folder: Path, weight_map: Any = None) -> Path:
    save_file({"a": TENSORS["a"]}, folder / "one.safetensors")
    save_file({"b": TENSORS["b"]}, folder / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"} if weight_map is None else weight_map
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensors_come_back_as_written(dtype: Any, tmp_path: Path) -> None:
    """Values, shape and type of every float type are those of the file."""
    value = np.random.default_rng(0).standard_normal((3, 5)).astype(dtype)
    checkpoint = Checkpoint(single(tmp_path, {"x": value, "empty": np.zeros((0, 2), dtype)}))
    read = checkpoint.read("x")
    assert read.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(read.view(np.uint8), value.view(np.uint8))
    assert checkpoint.read("empty").shape == (0, 2)
    assert checkpoint.nbytes == value.nbytes


def test_shards_are_joined(tmp_path: Path) -> None:
    """Each tensor is read from the shard that holds it."""
    checkpoint = Checkpoint(sharded(tmp_path))
    assert checkpoint.entry("b").file.name == "two.safetensors"
    np.testing.assert_array_equal(checkpoint.read("a"), TENSORS["a"])


def test_same_compares_bytes(tmp_path: Path) -> None:
    """Equal means equal shape, type and bytes."""
    value = TENSORS["a"]
    tensors = {"a": value, "copy": value.copy(), "other": value + 1, "flat": value.reshape(-1)}
    checkpoint = Checkpoint(single(tmp_path, tensors))
    assert [checkpoint.same("a", name) for name in ("copy", "other", "flat")] == [True, False, False]


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    """Asking for a tensor that is not there says which and where."""
    with pytest.raises(BadSource, match="'lost'"):
        Checkpoint(single(tmp_path)).read("lost")


def test_integers_are_no_weights(tmp_path: Path) -> None:
    """A quantized checkpoint's integer tensors can be listed, not read as weights."""
    checkpoint = Checkpoint(single(tmp_path, {"q": np.zeros(4, np.int8)}))
    with pytest.raises(UnsupportedModel, match="I8"):
        checkpoint.read("q")


def test_pickled_checkpoints_get_advice(tmp_path: Path) -> None:
    """A folder of .bin files is told how to become safetensors."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BadSource, match="save_pretrained"):
        Checkpoint(tmp_path)


BROKEN_SHARDS: dict[str, Callable[[Path], object]] = {
    "a missing shard": lambda folder: (folder / "two.safetensors").unlink(),
    "an index that is no JSON": lambda folder: (folder / INDEX).write_text("{"),
    "an index without a map": lambda folder: (folder / INDEX).write_text("{}"),
    "a tensor the shard lacks": lambda folder: sharded(folder, {"a": "one.safetensors", "z": "two.safetensors"}),
    "a tensor in another shard": lambda folder: sharded(folder, {"b": "one.safetensors", "a": "two.safetensors"}),
    "a path that leaves the folder": lambda folder: sharded(folder, {"a": "../one.safetensors"}),
    "a tensor in two shards": lambda folder: save_file(TENSORS, folder / "two.safetensors"),
}


@pytest.mark.parametrize("what", BROKEN_SHARDS)
def test_broken_shards_are_refused(what: str, tmp_path: Path) -> None:
    """Every way for index and shards to disagree is a bad source."""
    BROKEN_SHARDS[what](sharded(tmp_path))
    with pytest.raises(BadSource):
        Checkpoint(tmp_path)


def with_header(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The bytes of a good file with its header changed and its data left alone."""
    good = save(TENSORS)
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + good[8 + length :]


BROKEN_FILES: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x01",
    "a length past the end": (1 << 40).to_bytes(8, "little") + b"{}",
    "no JSON": (4).to_bytes(8, "little") + b"{{{{",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "data cut": save(TENSORS)[:-1],
    "data added": save(TENSORS) + b"\0",
    "unknown type": with_header(lambda header: header["a"].update(dtype="F7")),
    "negative size": with_header(lambda header: header["a"].update(shape=[-2, -3])),
    "wrong shape": with_header(lambda header: header["a"].update(shape=[2, 4])),
    "a hole": with_header(lambda header: header.pop("a")),
    "an overlap": with_header(lambda header: header["b"].update(data_offsets=header["a"]["data_offsets"])),
    "fractional": with_header(lambda header: header["a"].update(shape=[2.0, 3])),
    "no offsets": with_header(lambda header: header["a"].pop("data_offsets")),
}


@pytest.mark.parametrize("what", BROKEN_FILES)
def test_broken_files_are_refused(what: str, tmp_path: Path) -> None:
    """Every way for a file to break the format is a bad source, found from its header."""
    (tmp_path / SINGLE).write_bytes(BROKEN_FILES[what])
    with pytest.raises(BadSource):
        Checkpoint(tmp_path)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, len(save(TENSORS)) - 1), value=st.integers(0, 255))
def test_a_spoiled_byte_is_noticed_or_harmless(
    position: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any one byte changed: either the file is refused, or all it names can be read without another error."""
    raw = bytearray(save(TENSORS))
    raw[position] = value
    folder = tmp_path_factory.mktemp("spoiled")
    (folder / SINGLE).write_bytes(bytes(raw))
    try:
        checkpoint = Checkpoint(folder)
    except BadSource:
        return
    for name in checkpoint.entries:
        try:
            assert checkpoint.read(name).shape == checkpoint.shape(name)
        except UnsupportedModel:
            assert checkpoint.entry(name).dtype not in ("F32", "F16", "BF16")
