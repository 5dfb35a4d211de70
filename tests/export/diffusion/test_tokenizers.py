"""A CLIP tokenizer folder of any vintage gives the ids that transformers gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.errors import BadSource, UnsupportedModel
from edgekit.export.families import PromptTokenizer
from edgekit.export.families.tokenizers import write_tokenizer
from edgekit.export.sources import read_source
from edgekit.runtime.tokenizer import Tokenizer
from tests.export.diffusion.tiny_pipelines import FOREIGN, POSITIONS

pytestmark = FOREIGN

Folders = dict[str, tuple[Any, Path]]
ASKED = PromptTokenizer("tokenizer", POSITIONS)


@pytest.fixture(scope="module", params=["lcm", "sd-turbo"], ids=["tokenizer.json", "vocab and merges"])
def pair(request: pytest.FixtureRequest, folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' tokenizer, ours, and what the manifest says of ours."""
    pipeline, folder = folders[request.param]
    root = tmp_path_factory.mktemp("written")
    spec = write_tokenizer(read_source(folder), ASKED, root / "tokenizer" / "tokenizer.json", root)
    return pipeline.tokenizer, Tokenizer.from_file(root / spec.file), spec


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60) | st.from_regex(r"[a-z' ]{0,80}", fullmatch=True))
def test_ids_are_those_of_transformers(pair: Any, text: str) -> None:
    """Padded, cut and accented alike: any text becomes the ids that diffusers would feed."""
    theirs, ours, spec = pair
    wanted = theirs(text, padding="max_length", max_length=theirs.model_max_length, truncation=True).input_ids
    assert ours.encode_padded(text, spec.length, spec.pad) == wanted


def test_the_manifest_has_length_pad_and_fingerprint(pair: Any) -> None:
    """What a runtime in another language needs to do the same."""
    theirs, ours, spec = pair
    assert (spec.length, spec.pad, spec.fingerprint) == (POSITIONS, theirs.pad_token_id, ours.fingerprint)


def test_incomplete_folders_are_refused(folders: Folders, tmp_path: Path) -> None:
    """A vocabulary without merges, another class without tokenizer.json, a pad token that is no token."""
    copy = shutil.copytree(folders["sd-turbo"][1], tmp_path / "m")
    target = tmp_path / "out" / "tokenizer.json"
    config = json.loads((copy / "tokenizer" / "tokenizer_config.json").read_text())

    def written(**changes: Any) -> None:
        (copy / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({**config, **changes}))
        write_tokenizer(read_source(copy), ASKED, target, tmp_path)

    with pytest.raises(UnsupportedModel, match="T5Tokenizer"):
        written(tokenizer_class="T5Tokenizer")
    with pytest.raises(BadSource, match="<nothing>"):
        written(pad_token="<nothing>")
    (copy / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(BadSource, match=r"merges\.txt"):
        written()
