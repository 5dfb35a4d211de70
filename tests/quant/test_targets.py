"""Targets: which choices a unit may take where, and that each of them can be lowered and run there."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from edgekit.errors import UnknownDevice
from edgekit.quant.choices import CHOICES
from edgekit.quant.graph import Role, Unit
from edgekit.quant.targets import CAREFUL, TARGETS, get_target, has_int8_dot

INTEGERS = {name for name, choice in CHOICES.items() if choice.activation != "float"}


def unit(op: Any = "MatMul", role: Any = "linear", group: int = 1) -> Unit:
    """A unit of no graph."""
    kernel = (3, 3) if op == "Conv" else ()
    return Unit("u", op, "w", role, 64, 128, "x", "y", kernel, group, "w")


def units() -> Iterator[Unit]:
    """One of every operator in every role."""
    for role in get_args(Role):
        yield unit("MatMul", role)
        yield unit("Conv", role)
        yield unit("Conv", role, group=4)
    yield unit("Gather", "embedding")


def is_careful(each: Unit) -> bool:
    return each.role in CAREFUL


@pytest.mark.parametrize("name", TARGETS)
def test_every_choice_is_one_and_the_first_is_exact(name: str) -> None:
    """Known names, none twice, fp32 first, so that a unit can always stay what it was."""
    for each in units():
        allowed = TARGETS[name].allowed(each)
        assert allowed[0] == "fp32"
        assert len(set(allowed)) == len(allowed)
        assert set(allowed) <= set(CHOICES)


@pytest.mark.parametrize("name", TARGETS)
def test_careful_layers_meet_no_integers(name: str) -> None:
    """First and last layers and those of time keep float activations on every target."""
    for each in filter(is_careful, units()):
        assert not INTEGERS & set(TARGETS[name].allowed(each))


@pytest.mark.parametrize("name", TARGETS)
def test_tables_meet_no_integers(name: str) -> None:
    """What is gathered is no product."""
    assert not INTEGERS & set(TARGETS[name].allowed(unit("Gather", "embedding")))


@pytest.mark.parametrize(
    ("name", "product", "convolution"),
    [
        ("cpu:vnni", {"w8a16", "w8a8", "w8a8-row", "w4a16-32", "w4a16-128", "w2a16-32"}, {"w8a8"}),
        ("cpu:any", {"w8a16", "w8a8", "w8a8-row", "w4a16-32", "w4a16-128", "w2a16-32"}, {"w8a8"}),
        ("cuda", {"w8a16", "w4a16-32", "w4a16-128"}, set()),
        ("trt", {"w8a8", "fp8", "w4a16-64", "w4a16-128", "nvfp4"}, {"w8a8"}),
        ("trt-rtx", {"w8a8", "fp8", "w4a16-64", "w4a16-128", "nvfp4"}, {"w8a8"}),
        ("openvino", {"w8a8"}, {"w8a8"}),
    ],
)
def test_what_a_device_fuses(name: str, product: set[str], convolution: set[str]) -> None:
    """Products and convolutions beyond floats; a convolution has no product of stored integers with floats anywhere."""
    floats = {"fp32", "fp16", "bf16"}
    assert product <= set(TARGETS[name].allowed(unit("MatMul", "ff_in")))
    assert set(TARGETS[name].allowed(unit("Conv", "conv"))) - floats == convolution


@pytest.mark.parametrize("name", ["cpu:vnni", "cpu:any"])
def test_a_grouped_convolution_stays_floats_on_a_cpu(name: str) -> None:
    """Integers are planned for whole convolutions alone."""
    assert set(TARGETS[name].allowed(unit("Conv", "conv", group=64))) == {"fp32", "fp16"}


def test_codes_keep_within_what_the_processor_adds() -> None:
    """Without a dot product of bytes, two products are added in 16 bits: codes of 7 bits never saturate there."""
    assert TARGETS["cpu:vnni"].code_bits == 8
    assert TARGETS["cpu:any"].code_bits == 7
    largest = 1 << TARGETS["cpu:any"].code_bits - 1
    assert 2 * largest * 255 < 2**15 <= 2 * 127 * 255


def test_only_tensorrt_is_symmetric() -> None:
    """Its activations are signed, with zero point 0."""
    assert {name for name, target in TARGETS.items() if target.symmetric} == {"trt", "trt-rtx"}
    assert all(target.name == name for name, target in TARGETS.items())


def test_cpu_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row that fits the processor, by whether it multiplies bytes into 32 bits."""
    assert get_target("cpu") is TARGETS["cpu:vnni" if has_int8_dot() else "cpu:any"]
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert has_int8_dot()
    assert get_target("cpu") is TARGETS["cpu:vnni"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags : fpu sse2 avx2 avx512_vnni", True),
        ("flags : fpu avx2 avx_vnni", True),
        ("flags : fpu sse2 avx2 avx512f", False),
        (None, False),
    ],
)
def test_a_dot_product_is_read_off_the_processors_flags(
    monkeypatch: pytest.MonkeyPatch, flags: str | None, expected: bool
) -> None:
    """Both spellings of VNNI; where there are no flags to read, none is claimed."""

    def read(path: Path) -> str:
        assert path.name == "cpuinfo"
        if flags is None:
            raise FileNotFoundError(path)
        return flags

    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(Path, "read_text", read)
    assert has_int8_dot() == expected


def test_another_device_is_refused() -> None:
    """With every name that there is."""
    with pytest.raises(UnknownDevice) as caught:
        get_target("abacus")
    assert "'abacus'" in str(caught.value)
    for name in ("cpu", *TARGETS):
        assert name in str(caught.value)
