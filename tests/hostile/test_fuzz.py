"""Random damage ends in a BundleError or a true read, never in a crash of another kind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.bundle.graphfile import read_graph
from edgekit.bundle.manifest import MANIFEST_FILE
from edgekit.bundle.store import Bundle, read_bundle
from edgekit.errors import BundleError
from tests.bundle import tiny

Damage = tuple[list[tuple[int, int]], int, bytes]

damages = st.tuples(
    st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=8),  # (where, byte)
    st.integers(0, 2**16),  # cut there
    st.binary(max_size=16),  # and go on like this
)


def damaged(raw: bytes, damage: Damage) -> bytes:
    """Overwrite some bytes; cut, if the place to cut lies inside, and append."""
    flips, cut, tail = damage
    out = bytearray(raw)
    for where, byte in flips:
        out[where % len(out)] = byte
    return bytes(out[:cut] + tail) if cut < len(out) else bytes(out)


@pytest.fixture(scope="module")
def victim(image_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One copy that every example damages and mends."""
    folder = tmp_path_factory.mktemp("fuzz") / "victim.bundle"
    shutil.copytree(image_bundle, folder)
    yield folder
    read_bundle(folder)


def outcome(folder: Path, *, verify: bool) -> Bundle | BundleError:
    """A read bundle or a refusal; anything else fails the test."""
    try:
        return read_bundle(folder, verify=verify)
    except BundleError as refusal:
        return refusal


@settings(max_examples=100, deadline=None)
@given(damage=damages)
def test_a_damaged_manifest_is_refused_or_means_something(victim: Path, damage: Damage) -> None:
    """Whatever bytes `edgekit.json` has, reading gives a bundle or a BundleError."""
    file = victim / MANIFEST_FILE
    good = file.read_bytes()
    try:
        file.write_bytes(damaged(good, damage))
        result = outcome(victim, verify=False)
    finally:
        file.write_bytes(good)
    assert isinstance(result, BundleError) or set(result.manifest.parts) == {"text_encoder", "unet", "vae_decoder"}


@settings(max_examples=100, deadline=None)
@given(damage=damages)
def test_a_damaged_graph_is_refused_or_reads_from_its_own_data(victim: Path, damage: Damage) -> None:
    """Whatever bytes a graph has, declared truthfully, its bundle is refused or reads nothing from elsewhere."""
    file, manifest = victim / "graphs/unet.onnx", victim / MANIFEST_FILE
    good, told = file.read_bytes(), manifest.read_bytes()
    try:
        file.write_bytes(damaged(good, damage))
        tiny.relist(victim)
        result = outcome(victim, verify=True)
        if isinstance(result, Bundle):
            assert {external.location for external in read_graph(file).external} <= {"unet.onnx.data"}
    finally:
        file.write_bytes(good)
        manifest.write_bytes(told)


@settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=64))
def test_any_bytes_read_as_a_graph_or_are_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    """The reader of graphs stands on its own: any short file is a graph or a BundleError."""
    file = tmp_path_factory.getbasetemp() / "fuzzed.onnx"
    file.write_bytes(raw)
    try:
        graph = read_graph(file)
    except BundleError:
        return
    assert graph.inputs == ()  # 64 bytes hold a graph at most, never a whole input
    assert graph.external == ()


@settings(max_examples=100, deadline=None)
@given(damage=damages)
def test_what_the_reference_parser_sees_outside_we_see_too(
    tmp_path_factory: pytest.TempPathFactory, victim: Path, damage: Damage
) -> None:
    """A damaged graph that both parsers accept has no external initializer that only the reference one finds."""
    file = tmp_path_factory.getbasetemp() / "compared.onnx"
    raw = damaged((victim / "graphs/unet.onnx").read_bytes(), damage)
    file.write_bytes(raw)
    try:
        ours = {external.location for external in read_graph(file).external}
        theirs = onnx.load_from_string(raw)
    except (BundleError, DecodeError):
        return
    seen = {row.value for tensor in theirs.graph.initializer for row in tensor.external_data if row.key == "location"}
    assert seen <= ours
