"""`edgekit.json` as values: what is written reads back, and the published schema is the one in force."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.bundle.manifest import MAX_MANIFEST, Manifest, check_path, encode_manifest, json_schema, nesting, parse
from edgekit.bundle.store import read_bundle
from edgekit.bundle.validate import decode_manifest
from edgekit.errors import UnsafePath, WrongSize

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def manifest(image_bundle: Path) -> Manifest:
    """A good one."""
    return read_bundle(image_bundle).manifest


def test_a_manifest_reads_back(manifest: Manifest) -> None:
    """Encoding and decoding are inverse, and encoding is canonical."""
    raw = encode_manifest(manifest)
    assert decode_manifest(raw) == manifest
    assert encode_manifest(decode_manifest(raw)) == raw


def test_a_manifest_can_be_read_by_a_person(manifest: Manifest) -> None:
    """Defaults are left out and lines are short enough to look at."""
    raw = encode_manifest(manifest).decode()
    assert '"clip"' not in raw
    assert max(map(len, raw.splitlines())) < 160


def test_a_manifest_is_frozen(manifest: Manifest) -> None:
    """No later code can change what was checked."""
    with pytest.raises(AttributeError, match="immutable"):
        manifest.task = "text-generation"  # type: ignore[misc]


def test_the_published_schema_is_current() -> None:
    """docs/bundle.schema.json is what these classes generate."""
    write = (
        "from edgekit.bundle.manifest import json_schema; open('docs/bundle.schema.json', 'wb').write(json_schema())"
    )
    assert (DOCS / "bundle.schema.json").read_bytes() == json_schema(), f'run: python -c "{write}"'


def test_every_field_is_explained() -> None:
    """docs/bundle.md names each top-level field of the manifest."""
    page = (DOCS / "bundle.md").read_text()
    missing = [name for name in Manifest.__struct_fields__ if f"`{name}`" not in page]
    assert missing == []


def test_the_schema_covers_every_field(manifest: Manifest) -> None:
    """A good manifest has no key the schema does not know."""
    schema = json.loads(json_schema())
    known = schema["$defs"]["Manifest"]["properties"]
    assert set(msgspec.to_builtins(manifest)) <= set(known)


safe = st.lists(st.text("abcXYZ012_-. é", min_size=1, max_size=8), min_size=1, max_size=4).map("/".join)


@given(path=safe)
def test_a_path_that_passes_stays_inside(path: str) -> None:
    """Whatever path is accepted, joined to a folder it lies below that folder, spelt the one way it can be."""
    try:
        check_path(path)
    except UnsafePath:
        parts = PurePosixPath(path).parts
        assert not parts or ".." in parts or str(PurePosixPath(path)) != path
        return
    joined = PurePosixPath("/bundle") / path
    assert joined.is_relative_to("/bundle")
    assert joined != PurePosixPath("/bundle")
    assert str(joined) == f"/bundle/{path}"


values = st.recursive(
    st.none() | st.integers() | st.text('[]{}"\\ab'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('[]{}"\\', max_size=3), inner, max_size=3),
)


def depth_of(value: object) -> int:
    """The obvious recursive depth."""
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


@given(value=values)
def test_nesting_is_counted_without_parsing(value: object) -> None:
    """The linear scan agrees with recursion, brackets and quotes in strings included."""
    assert nesting(json.dumps(value).encode()) == depth_of(value)


def test_numbers_survive_to_the_last_bit(manifest: Manifest) -> None:
    """A table's coefficients are written so that they read back exactly."""
    row = (999.0, 1 / 3, 0.1 + 0.2, 1e-300, -0.0, 5e-324, 1.7976931348623157e308, 2**-0.5, 0.0, 1.0)
    table = msgspec.structs.replace(manifest.tables[0], rows=(row,))
    changed = msgspec.structs.replace(manifest, tables=(table,))
    assert [x.hex() for x in parse(encode_manifest(changed)).tables[0].rows[0]] == [x.hex() for x in row]


def test_a_manifest_over_the_limit_is_not_parsed() -> None:
    """The size is looked at before the content, wherever the bytes come from."""
    with pytest.raises(WrongSize, match="limit"):
        parse(b" " * (MAX_MANIFEST + 1))
