"""Model folders as people really have them: what is read, what is refused, and never because of a name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from edgekit.errors import BadSource
from edgekit.export import sources
from edgekit.export.sources import read_json, read_source

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "safety_checker": [None, None],
    "feature_extractor": None,
    "requires_safety_checker": True,
    "odd": ["one"],
}


def test_a_pipelines_components_are_named_by_its_index(tmp_path: Path) -> None:
    """A class where a [library, class] pair stands; None for null, for flags and for what is no pair."""
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX))
    source = read_source(tmp_path)
    named = {name: source.class_of(name) for name in (*INDEX, "absent")}
    assert {name for name, kind in named.items() if kind} == {"unet"}
    assert source.root == tmp_path


def test_a_components_config_is_read_below_its_folder(tmp_path: Path) -> None:
    """`config("unet")` is unet/config.json; another name can be asked for; a missing one is named."""
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX))
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"in_channels": 4}')
    (tmp_path / "unet" / "other.json").write_text('{"a": [1, null, "é"]}')
    source = read_source(tmp_path)
    assert source.config("unet") == {"in_channels": 4}
    assert source.config("unet", "other.json") == {"a": [1, None, "é"]}
    with pytest.raises(BadSource, match=r"vae.config\.json is missing"):
        source.config("vae")


def test_a_hub_snapshot_of_links_is_a_folder(tmp_path: Path) -> None:
    """The hub's cache keeps files elsewhere and links to them: the links are followed, a link to the folder too."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "aa").write_text('{"model_type": "llama"}')
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "config.json").symlink_to(tmp_path / "blobs" / "aa")
    (tmp_path / "link").symlink_to(snapshot)
    assert read_source(snapshot).index == read_source(tmp_path / "link").index == {"model_type": "llama"}


NO_FOLDER = {
    "missing": lambda path: None,
    "a file": lambda path: path.write_text("{}"),
    "a link that leads nowhere": lambda path: path.symlink_to(path.with_name("nowhere")),
    "empty": lambda path: path.mkdir(),
    "the folder above": lambda path: (path / "model").mkdir(parents=True),
}


@pytest.mark.parametrize("case", NO_FOLDER)
def test_what_is_no_model_folder_says_what_to_give(tmp_path: Path, case: str) -> None:
    """The message names the path and what was looked for."""
    path = tmp_path / "it"
    NO_FOLDER[case](path)
    with pytest.raises(BadSource) as caught:
        read_source(path)
    assert str(path) in str(caught.value)
    assert "give the folder" in str(caught.value)


CONTENTS = {
    "an array": "[]",
    "a number": "3",
    "null": "null",
    "truncated": '{"a": 1',
    "two objects": "{}{}",
    "deep": '{"a":' * 100_000,
    "latin-1": b'{"a": "\xe9"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "empty": "",
}


@pytest.mark.parametrize("case", CONTENTS)
def test_a_file_that_is_no_object_is_a_bad_source(tmp_path: Path, case: str) -> None:
    """Whatever the bytes are, the answer is BadSource with the file's name."""
    content = CONTENTS[case]
    path = tmp_path / "some.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadSource, match=r"some\.json"):
        read_json(path)


def test_a_config_has_a_size_a_config_can_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config larger than any is refused by its size, unread; one of just the limit is read."""
    monkeypatch.setattr(sources, "INDEX_LIMIT", 64)
    path = tmp_path / "config.json"
    path.write_text("{}" + " " * 62)
    assert read_json(path) == {}
    path.write_text("{}" + " " * 63)
    with pytest.raises(BadSource, match="65 bytes"):
        read_json(path)


def test_what_cannot_be_read_is_a_bad_source(tmp_path: Path) -> None:
    """A folder where the file should be, and a link in a circle, are the source's fault and named."""
    (tmp_path / "config.json").mkdir()
    (tmp_path / "loop.json").symlink_to("loop.json")
    for name in ("config.json", "loop.json"):
        with pytest.raises(BadSource, match=name.replace(".", r"\.")):
            read_json(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_of_somebody_else_is_a_bad_source(tmp_path: Path) -> None:
    """A config without read permission is named, with the system's reason."""
    path = tmp_path / "config.json"
    path.write_text("{}")
    path.chmod(0)
    with pytest.raises(BadSource, match=r"config\.json"):
        read_json(path)
