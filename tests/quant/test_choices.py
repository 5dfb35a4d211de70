"""Choices: the bytes of each are those of the weights as stored, counted one by one, and names are names."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from edgekit.errors import BadRequest
from edgekit.quant.choices import CHOICES, Choice, WeightFormat, get_choice
from edgekit.quant.weights import store

SIDES = st.integers(1, 300)
FORMATS = st.builds(
    WeightFormat,
    st.just("int"),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([0, 16, 32, 64, 128]),
    st.sampled_from([8, 16, 32]),
    st.booleans(),
)


def counted(form: WeightFormat, n: int, k: int) -> int:
    """Bits row by row and block by block: padded codes, a scale, a zero point; rows of zero points end on bytes."""
    if form.kind == "float":
        return n * k * form.bits // 8
    bits = 0
    for _ in range(n):
        zeros = 0
        starts = range(0, k, form.block) if form.block else range(1)
        for _ in starts:
            bits += (form.block or k) * form.bits
            bits += 0 if form.kind == "fp8" else form.scale_bits
            zeros += form.bits if form.zero else 0
        bits += -(-zeros // 8) * 8
    return -(-bits // 8) + (4 if form.kind in ("fp8", "fp4") else 0)


@settings(max_examples=60, deadline=None)
@given(n=SIDES, k=SIDES, name=st.sampled_from(sorted(CHOICES)))
def test_bytes_are_those_counted_one_by_one(n: int, k: int, name: str) -> None:
    """For every choice and any shape, the last block's padding included."""
    assert CHOICES[name].weight.bytes(n, k) == counted(CHOICES[name].weight, n, k)


@settings(max_examples=60, deadline=None)
@given(n=SIDES, k=SIDES, form=FORMATS)
def test_bytes_of_any_format(n: int, k: int, form: WeightFormat) -> None:
    """Also of formats that no choice has: other blocks and scales, with zero points."""
    assert form.bytes(n, k) == counted(form, n, k)


@pytest.mark.parametrize("name", [name for name, each in CHOICES.items() if each.weight.kind == "int"])
@pytest.mark.parametrize(("n", "k"), [(24, 64), (5, 200), (1, 33)])
def test_bytes_are_those_of_the_stored_arrays(name: str, n: int, k: int) -> None:
    """As many codes and scales as rounding makes; codes of less than 8 bits are packed when they are written."""
    form = CHOICES[name].weight
    stored = store(np.random.default_rng(0).standard_normal((n, k)).astype(np.float32), CHOICES[name])
    padded = form.blocks(k) * form.block or k
    assert stored.scales.size == n * form.blocks(k)
    assert form.bytes(n, k) == -(-n * padded * form.bits // 8) + stored.scales.size * form.scale_bits // 8


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("fp32", 32),
        ("fp16", 16),
        ("bf16", 16),
        ("w8a16", 8.125),
        ("w4a16-32", 4.5),
        ("w4a16-128", 4.125),
        ("w2a16-32", 2.5),
    ],
)
def test_bits_of_a_weight(name: str, bits: float) -> None:
    """In whole blocks, a scale of 16 bits is shared by as many weights as the name says."""
    assert 8 * CHOICES[name].weight.bytes(256, 1024) / (256 * 1024) == bits


def test_a_table_of_choices() -> None:
    """Every row is under its own name, floats are floats, and floats meet float activations."""
    for name, choice in CHOICES.items():
        assert choice.name == name
        assert choice.is_float == (name in ("fp32", "fp16", "bf16"))
        assert choice.activation == "float" or not choice.is_float
        assert choice.weight.blocks(256) == (
            0 if choice.weight.kind in ("float", "fp8") else 256 // (choice.weight.block or 256)
        )


def test_names_say_what_is_stored() -> None:
    """w4a16-32: four bits, floats beside, blocks of 32; a8 is a measured scale, a8-row one that is taken as it runs."""
    for name, choice in CHOICES.items():
        if name[0] != "w":
            continue
        head, _, tail = name.partition("-")
        assert choice.weight.bits == int(head[1])
        assert choice.activation == {"16": "float", "8": "row" if tail == "row" else "static"}[head.partition("a")[2]]
        assert not tail.isdigit() or choice.weight.block == int(tail)


def test_get_choice() -> None:
    """A row by its name; another name is refused with all that there are."""
    assert get_choice("w8a8") == Choice("w8a8", WeightFormat("int", 8), "static")
    with pytest.raises(BadRequest) as caught:
        get_choice("w3a16")
    assert "'w3a16'" in str(caught.value)
    assert str(caught.value).endswith(", ".join(CHOICES))
