"""What stands beside the weights: tokenizer, chat template, sampling defaults, end tokens."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from edgekit.bundle.manifest import SamplingDefaults, Tokenizer
from edgekit.errors import BadSource
from edgekit.export.language.config import Config
from edgekit.export.sources import read_json_if_any
from edgekit.runtime.tokenizer import fingerprint

TOKENIZER_FILE = "tokenizer/tokenizer.json"
TEMPLATE_FILE = "tokenizer/chat_template.jinja"
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def export_tokenizer(source: Path, staging: Path) -> Tokenizer:
    """Copy (or convert) the tokenizer and its chat template to `staging/tokenizer/`.

    Raises:
        BadSource: no tokenizer that can be used, with what to do about it.
    """
    target = staging / TOKENIZER_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    settings = read_json_if_any(source / "tokenizer_config.json")
    if (source / "tokenizer.json").is_file():
        shutil.copyfile(source / "tokenizer.json", target)
        _check_tokenizer(target)
    else:
        _convert_gpt2(source, settings, target)
    template = chat_template(source, settings)
    if template is not None:
        (staging / TEMPLATE_FILE).write_text(template, encoding="utf-8", newline="\n")
    return Tokenizer(
        file=TOKENIZER_FILE,
        fingerprint=fingerprint(target.read_bytes()),
        chat_template=None if template is None else TEMPLATE_FILE,
        special={name: text for name in _SPECIAL if (text := _content(settings.get(name)))},
    )


def chat_template(source: Path, settings: dict[str, Any]) -> str | None:
    """`chat_template.jinja`, else the template in `chat_template.json` or `tokenizer_config.json`; None without one.

    Of several named templates the one called "default" is taken.
    """
    file = source / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = read_json_if_any(source / "chat_template.json").get("chat_template", settings.get("chat_template"))
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise BadSource(f"{source}: chat_template must be text or a list of named templates")
    return template


def sampling_defaults(source: Path) -> SamplingDefaults:
    """What `generation_config.json` states; greedy unless it says `do_sample`."""
    stated = read_json_if_any(source / "generation_config.json")
    if not stated.get("do_sample"):
        return SamplingDefaults(repetition_penalty=_number(stated, "repetition_penalty", 1.0))
    return SamplingDefaults(
        temperature=_number(stated, "temperature", 1.0),
        top_k=int(_number(stated, "top_k", 0)),
        top_p=_number(stated, "top_p", 1.0),
        min_p=_number(stated, "min_p", 0.0),
        repetition_penalty=_number(stated, "repetition_penalty", 1.0),
    )


def token_ids(source: Path, config: Config) -> tuple[tuple[int, ...], int | None]:
    """End tokens and begin token; `generation_config.json` goes before `config.json` (and its `text_config`)."""
    stated = (
        read_json_if_any(source / "generation_config.json"),
        config.values,
        config.values.get("text_config") or {},
    )
    ends, begin = (
        next((values[key] for values in stated if values.get(key) is not None), None)
        for key in ("eos_token_id", "bos_token_id")
    )
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(token) is int and token >= 0 for token in (*ends, 0 if begin is None else begin)):
        raise BadSource(f"{source}: token ids must be whole numbers, not {ends} and {begin!r}")
    return tuple(ends), begin


def _number(values: dict[str, Any], key: str, default: float) -> float:
    value = values.get(key)
    if value is None:
        return default
    if type(value) not in (int, float):
        raise BadSource(f"generation_config.json: {key} must be a number, not {value!r}")
    return float(value)


def _content(token: Any) -> str | None:
    """A special token is text, or an object with its text in `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _check_tokenizer(file: Path) -> None:
    from tokenizers import Tokenizer as Loaded

    try:
        Loaded.from_file(str(file))
    except Exception as why:
        raise BadSource(f"tokenizer.json cannot be read ({why}). Download it again.") from why


def _convert_gpt2(source: Path, settings: dict[str, Any], target: Path) -> None:
    """GPT-2's vocab.json and merges.txt as a tokenizer.json: byte-level BPE without a leading space."""
    from tokenizers import ByteLevelBPETokenizer

    files = source / "vocab.json", source / "merges.txt"
    kind = str(settings.get("tokenizer_class", "GPT2Tokenizer")).removesuffix("Fast")
    if not all(file.is_file() for file in files) or kind != "GPT2Tokenizer":
        has = "only tokenizer.model" if (source / "tokenizer.model").is_file() else f"a {kind} without tokenizer.json"
        raise BadSource(
            f"{source} has {has if (source / 'tokenizer.model').is_file() or settings else 'no tokenizer'}. Make a "
            "tokenizer.json with `AutoTokenizer.from_pretrained(folder).save_pretrained(folder)` and export again."
        )
    try:
        tokenizer = ByteLevelBPETokenizer.from_file(*map(str, files), add_prefix_space=False)
    except Exception as why:
        raise BadSource(f"{source}: vocab.json and merges.txt cannot be read ({why})") from why
    special = [text for name in _SPECIAL if (text := _content(settings.get(name)))]
    tokenizer.add_special_tokens(special or ["<|endoftext|>"])
    tokenizer.save(str(target))
