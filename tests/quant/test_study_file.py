"""A study as a file: every table and fact comes back, vectors aside, and a damaged file is refused in words."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest

from edgekit.errors import BadRequest
from edgekit.quant.budget import Budget
from edgekit.quant.study import STUDY_FORMAT, Study, decode_study
from tests.quant.studies import made_up

STUDY = made_up(shared=True)
RAW = STUDY.encode()


def rewritten(drop: str = "", told: Any = None, **changes: Any) -> bytes:
    """The file with an entry left out, or with other values told."""
    with np.load(io.BytesIO(RAW), allow_pickle=False) as file:
        entries = {name: file[name] for name in file.files if name != drop}
    if "told" in entries:
        known = json.loads(str(entries["told"]))
        known |= changes
        entries["told"] = np.array(json.dumps(known if told is None else told))
    out = io.BytesIO()
    np.savez(out, **entries)
    return out.getvalue()


def same(one: Study, other: Study) -> None:
    """Everything but vectors."""
    for name in ("target", "choices", "fixed_bytes", "fixed_ms", "edges", "boundary_ms", "facts", "params"):
        assert getattr(one, name) == getattr(other, name)
    for a, b in zip(one.rows, other.rows, strict=True):
        assert (a.part, a.units, a.role, a.params, a.shape) == (b.part, b.units, b.role, b.params, b.shape)
    assert list(one.errors) == list(other.errors)
    for name in one.errors:
        np.testing.assert_array_equal(one.errors[name], other.errors[name])
    np.testing.assert_array_equal(one.bytes, other.bytes)
    np.testing.assert_array_equal(one.milliseconds, other.milliseconds)


def test_a_study_reads_back_as_it_was() -> None:
    """Tables bit for bit, NaN where a choice is not allowed, rows with all their units, facts."""
    again = decode_study(RAW, "it")
    same(again, STUDY)
    assert again.vectors == {}
    assert again.encode() == RAW


def test_it_decides_the_same() -> None:
    """Another budget is solved from the file as from what was measured."""
    budget = Budget(bits=9.0)
    np.testing.assert_array_equal(decode_study(RAW, "it").decide(budget).pick, STUDY.decide(budget).pick)


def test_vectors_stay_behind() -> None:
    """They are large, and what a bundle ships is small."""
    rows, columns = STUDY.bytes.shape
    vectors = {name: np.ones((rows, columns, 999), np.float32) for name in STUDY.errors}
    heavy = Study(**{**vars(STUDY), "vectors": vectors})
    assert heavy.encode() == RAW


def test_it_holds_tables_alone() -> None:
    """No entry that nobody reads, and no pickle: it opens where pickles are forbidden."""
    with np.load(io.BytesIO(RAW), allow_pickle=False) as file:
        assert sorted(file.files) == ["bytes", "error.content", "error.quality", "milliseconds", "told"]
        assert all(file[name].dtype != object for name in file.files)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"not a study",
        b"PK\x03\x04 and then nothing",
        RAW[: len(RAW) // 2],
        RAW[:-30],
        rewritten(drop="told"),
        rewritten(drop="bytes"),
        rewritten(told=[1, 2]),
        rewritten(told={"format": STUDY_FORMAT}),
        rewritten(rows=[["unet", ["a"]]]),
        rewritten(edges=[[1, 2, 3]]),
        rewritten(edges=5),
    ],
    ids=[
        "empty",
        "text",
        "no archive",
        "half",
        "end lost",
        "nothing told",
        "a table lost",
        "a list told",
        "little told",
        "short rows",
        "long edges",
        "no edges",
    ],
)
def test_a_damaged_file_is_refused(raw: bytes) -> None:
    """Which file, and how to make one."""
    with pytest.raises(BadRequest, match=r"some/study\.npz holds no study .*--precision mixed"):
        decode_study(raw, "some/study.npz")


@pytest.mark.parametrize("at", [0.25, 0.5, 0.75])
def test_a_changed_bit_is_noticed(at: float) -> None:
    """The archive's own checksums see to that."""
    raw = bytearray(RAW)
    raw[int(len(raw) * at)] ^= 1
    with pytest.raises(BadRequest, match="holds no study"):
        decode_study(bytes(raw), "it")


def test_another_format_is_refused() -> None:
    """It says which one this edgekit reads."""
    with pytest.raises(BadRequest, match=f"format {STUDY_FORMAT + 1}; this edgekit reads {STUDY_FORMAT}"):
        decode_study(rewritten(format=STUDY_FORMAT + 1), "it")
