"""Tokenizer, chat template, defaults and licence come along, or the folder is refused with advice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from edgekit.bundle.manifest import SamplingDefaults
from edgekit.errors import BadSource
from edgekit.export.language import assets
from edgekit.export.language.config import Config
from edgekit.export.sources import stated_licence
from edgekit.runtime.tokenizer import fingerprint
from tests.export.language import tiny

TEXT = "the quick brown fox, it's  naïve\n"


def write(folder: Path, **files: Any) -> Path:
    """JSON files by stem; text stays text."""
    for stem, value in files.items():
        (folder / f"{stem}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    tiny.add_tokenizer(folder)
    return folder


def test_tokenizer_is_copied_with_its_fingerprint(source: Path, tmp_path: Path) -> None:
    """tokenizer.json goes along byte for byte; special tokens are read in both of their forms."""
    write(
        source, tokenizer_config={"bos_token": "t1", "eos_token": {"content": "t2", "lstrip": False}, "pad_token": None}
    )
    entry = assets.export_tokenizer(source, tmp_path / "out")
    copy = (tmp_path / "out" / entry.file).read_bytes()
    assert copy == (source / "tokenizer.json").read_bytes()
    assert entry.fingerprint == fingerprint(copy)
    assert entry.special == {"bos_token": "t1", "eos_token": "t2"}
    assert entry.chat_template is None


def test_gpt2_files_are_converted(tmp_path: Path) -> None:
    """vocab.json and merges.txt become a tokenizer.json that splits text as GPT-2's own tokenizer does."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT * 3], vocab_size=300, show_progress=False)
    trained.add_special_tokens(["<|endoftext|>"])
    source = tmp_path / "source"
    source.mkdir()
    trained.save_model(str(source))
    write(source, tokenizer_config={"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"})
    entry = assets.export_tokenizer(source, tmp_path / "out")
    converted = Tokenizer.from_file(str(tmp_path / "out" / entry.file))
    for text in (TEXT, TEXT + "<|endoftext|>"):
        assert converted.encode(text).ids == trained.encode(text).ids
    assert converted.decode(converted.encode(TEXT).ids) == TEXT


@pytest.mark.torch
def test_gpt2_conversion_equals_transformers(tmp_path: Path) -> None:
    """The converted tokenizer gives the ids transformers gives from the same two files."""
    from transformers import GPT2Tokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT * 3], vocab_size=300, show_progress=False)
    trained.save_model(str(tmp_path))
    reference = GPT2Tokenizer.from_pretrained(tmp_path)
    entry = assets.export_tokenizer(tmp_path, tmp_path / "out")
    converted = Tokenizer.from_file(str(tmp_path / "out" / entry.file))
    assert converted.encode(TEXT).ids == reference(TEXT)["input_ids"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no tokenizer"),
        ({"tokenizer.model": "x"}, "only tokenizer.model"),
        (
            {"tokenizer_config.json": '{"tokenizer_class": "Qwen2Tokenizer"}', "vocab.json": "{}", "merges.txt": ""},
            "Qwen2",
        ),
        ({"tokenizer.json": "{"}, "cannot be read"),
        ({"vocab.json": "[]", "merges.txt": ""}, "cannot be read"),
        ({"tokenizer_config.json": "{"}, "not JSON"),
        ({"tokenizer_config.json": "[]"}, "JSON object"),
    ],
)
def test_unusable_tokenizers_are_refused_with_advice(files: dict[str, str], words: str, tmp_path: Path) -> None:
    """Without a tokenizer that the runtime can read there is no bundle."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(BadSource, match=words):
        assets.export_tokenizer(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"chat_template": "{{ a }}"}, "{{ a }}"),
        ({"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]}, "d"),
        ({"chat_template": [{"name": "tool", "template": "t"}]}, None),
        ({}, None),
    ],
)
def test_chat_template_of_the_tokenizer_config(
    settings: dict[str, Any], wanted: str | None, source: Path, tmp_path: Path
) -> None:
    """One template, or of several the default one, becomes a file of the bundle."""
    entry = assets.export_tokenizer(write(source, tokenizer_config=settings), tmp_path / "out")
    assert (entry.chat_template is None) == (wanted is None)
    if entry.chat_template is not None:
        assert (tmp_path / "out" / entry.chat_template).read_text() == wanted


def test_template_files_go_before_the_config(source: Path) -> None:
    """chat_template.jinja, then chat_template.json, then tokenizer_config.json."""
    settings = {"chat_template": "config"}
    assert assets.chat_template(source, settings) == "config"
    assert assets.chat_template(write(source, chat_template={"chat_template": "json"}), settings) == "json"
    (source / "chat_template.jinja").write_text("jinja")
    assert assets.chat_template(source, settings) == "jinja"


def test_a_template_of_another_kind_is_refused(source: Path) -> None:
    """A template that is neither text nor a list is malformed."""
    with pytest.raises(BadSource, match="chat_template"):
        assets.chat_template(source, {"chat_template": 3})


@pytest.mark.parametrize(
    ("stated", "wanted"),
    [
        ({}, SamplingDefaults()),
        ({"temperature": 0.7, "top_k": 20}, SamplingDefaults()),
        ({"repetition_penalty": 1.1}, SamplingDefaults(repetition_penalty=1.1)),
        ({"do_sample": True}, SamplingDefaults(temperature=1.0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05},
            SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95, min_p=0.05),
        ),
    ],
)
def test_sampling_defaults_are_those_stated(stated: dict[str, Any], wanted: SamplingDefaults, tmp_path: Path) -> None:
    """generation_config.json is taken at its word; without do_sample decoding is greedy."""
    assert assets.sampling_defaults(write(tmp_path, generation_config=stated)) == wanted


def test_malformed_defaults_are_refused(tmp_path: Path) -> None:
    """A temperature that is no number is the source's fault."""
    with pytest.raises(BadSource, match="temperature"):
        assets.sampling_defaults(write(tmp_path, generation_config={"do_sample": True, "temperature": "hot"}))


@pytest.mark.parametrize(
    ("config", "stated", "wanted"),
    [
        ({"eos_token_id": 2, "bos_token_id": 1}, {}, ((2,), 1)),
        ({"eos_token_id": 2}, {"eos_token_id": [7, 8]}, ((7, 8), None)),
        ({"text_config": {"eos_token_id": 5}}, {}, ((5,), None)),
        ({"eos_token_id": None}, {"bos_token_id": 0}, ((), 0)),
    ],
)
def test_end_tokens(config: dict[str, Any], stated: dict[str, Any], wanted: Any, tmp_path: Path) -> None:
    """generation_config.json goes before config.json; one or several, or none."""
    folder = write(tmp_path, generation_config=stated)
    assert assets.token_ids(folder, Config(config, "config.json")) == wanted


@pytest.mark.parametrize("value", ["</s>", [1, "x"], -1, True])
def test_end_tokens_must_be_ids(value: Any, tmp_path: Path) -> None:
    """Text, negatives and booleans are no token ids."""
    with pytest.raises(BadSource, match="token ids"):
        assets.token_ids(tmp_path, Config({"eos_token_id": value}, "config.json"))


@pytest.mark.parametrize(
    ("card", "config", "wanted"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\n", {}, "apache-2.0"),
        ('---\nlicense: "mit"\n---\n', {"license": "bsd"}, "mit"),
        ("---\nlicense: other\nlicense_name: qwen-research\n---\n", {}, "qwen-research"),
        ("# Model\nlicense: gpl\n", {}, "unknown"),
        (None, {"license": "llama3.2"}, "llama3.2"),
        (None, {}, "unknown"),
    ],
)
def test_licence_is_the_stated_one(card: str | None, config: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    """The model card's front matter goes first, then the configuration; nothing is guessed."""
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert stated_licence(tmp_path, config) == wanted
