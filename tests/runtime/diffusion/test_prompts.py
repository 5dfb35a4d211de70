"""Prompts to ids: lengths, padding and its mask, and what a text encoder sees around a prompt."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer as Engine
from tokenizers import models, pre_tokenizers, processors

from edgekit.bundle.manifest import Tokenizer
from edgekit.errors import BadManifest
from edgekit.runtime.diffusion.prompts import Prompts, in_template

WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "fox", "draw", ":")


@pytest.fixture
def entry(tmp_path: Path) -> Tokenizer:
    """Six ids, `</s>` behind the words, `<pad>` for the rest."""
    engine = Engine(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    engine.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer(file="tokenizer.json", fingerprint="0" * 64, length=6, pad=0)


def test_ids_are_padded_and_the_mask_says_where(entry: Tokenizer, tmp_path: Path) -> None:
    """A row per text; the closing token is the text's own, padding is not."""
    prompts = Prompts(tmp_path, {"default": entry})
    texts = ("a red fox", "")
    np.testing.assert_array_equal(prompts.ids("default", texts), [[3, 4, 5, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(prompts.masks("default", texts), [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
    assert prompts.ids("default", texts).dtype == prompts.masks("default", texts).dtype == np.int64


def test_a_padding_id_inside_a_text_is_not_masked(entry: Tokenizer, tmp_path: Path) -> None:
    """The mask counts places, not ids: CLIP pads with a token that prompts end in."""
    prompts = Prompts(tmp_path, {"default": msgspec.structs.replace(entry, pad=1)})
    np.testing.assert_array_equal(prompts.ids("default", ["fox"]), [[5, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(prompts.masks("default", ["fox"]), [[1, 1, 0, 0, 0, 0]])


def test_a_long_text_keeps_its_closing_token(entry: Tokenizer, tmp_path: Path) -> None:
    """It is cut to the length, and all of it is there."""
    prompts = Prompts(tmp_path, {"default": entry})
    np.testing.assert_array_equal(prompts.ids("default", ["a a a a a a a a"]), [[3, 3, 3, 3, 3, 1]])
    assert prompts.masks("default", ["a a a a a a a a"]).all()


def test_a_template_goes_around_the_prompt(entry: Tokenizer, tmp_path: Path) -> None:
    """The prompt alone is stripped and put into lower case, and may hold braces of its own."""
    entry = msgspec.structs.replace(entry, template="Draw: {}\n", lower=True)
    assert in_template(entry, "  A Red {} Fox ") == "Draw: a red {} fox\n"
    prompts = Prompts(tmp_path, {"default": msgspec.structs.replace(entry, template="draw : {}")})
    np.testing.assert_array_equal(prompts.ids("default", ["A FOX"]), [[6, 7, 3, 5, 1, 0]])


@pytest.mark.parametrize("template", ["no place", "{} and {}", "{name} {}"])
def test_a_template_has_one_place(template: str) -> None:
    """Anything else is refused as the manifest is read."""
    raw = msgspec.json.encode({"file": "a.json", "fingerprint": "0" * 64, "template": template})
    with pytest.raises(msgspec.ValidationError, match="template"):
        msgspec.json.decode(raw, type=Tokenizer)


def test_a_text_encoder_needs_a_length(entry: Tokenizer, tmp_path: Path) -> None:
    """Graphs of text encoders have a fixed one."""
    with pytest.raises(BadManifest, match="no fixed length"):
        Prompts(tmp_path, {"default": msgspec.structs.replace(entry, length=None)}).ids("default", ["a"])
