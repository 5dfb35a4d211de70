"""A CLIP tokenizer folder, of whatever vintage, as one tokenizer.json that pads and cuts by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekit.bundle.manifest import Tokenizer
from edgekit.errors import BadSource, UnsupportedModel
from edgekit.export.families import PromptTokenizer
from edgekit.export.sources import Source, read_json_if_any
from edgekit.runtime.tokenizer import fingerprint

CLIP_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
# CLIP splits text into special tokens, contractions, runs of letters, single digits and runs of anything else
# (Radford et al. 2021, the tokenizer published with the model).
CLIP_PIECES = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
START, END = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(source: Source, asked: PromptTokenizer, target: Path, root: Path) -> Tokenizer:
    """Write one tokenizer of a pipeline as a tokenizer.json that gives exactly `asked.length` ids.

    Args:
        source: the model folder.
        asked: which tokenizer folder, and the number of ids of its text encoder.
        target: the file to write.
        root: the bundle's folder, which the manifest's path is relative to.

    Raises:
        BadSource: files missing or malformed. UnsupportedModel: a class without tokenizer.json that is not CLIP's.
    """
    from tokenizers import Tokenizer as Fast

    folder = source.root / asked.folder
    config = read_json_if_any(folder / "tokenizer_config.json")
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Fast.from_file(str(folder / "tokenizer.json"))
        else:
            tokenizer = _from_vocabulary(source, asked.folder, config)
    except (OSError, UnsupportedModel, BadSource):
        raise
    except Exception as why:  # tokenizers raises nothing narrower
        raise BadSource(f"{folder}: {why}") from why
    length, pad = _length(config, asked.length), _pad(folder, config, tokenizer)
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad[1], pad_token=pad[0])
    target.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(target), pretty=False)
    return Tokenizer(
        file=target.relative_to(root).as_posix(),
        fingerprint=fingerprint(target.read_bytes()),
        length=length,
        pad=pad[1],
        template=asked.template,
        lower=asked.lower,
    )


def _from_vocabulary(source: Source, name: str, config: dict[str, Any]) -> Any:
    """CLIP's byte-level BPE from vocab.json and merges.txt."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    kind = config.get("tokenizer_class") or source.class_of(name)
    if kind not in CLIP_CLASSES:
        raise UnsupportedModel(f"{name} is a {kind} without tokenizer.json; only CLIP's is built from its vocabulary")
    vocabulary, merges = (source.root / name / file for file in ("vocab.json", "merges.txt"))
    for path in (vocabulary, merges):
        if not path.is_file():
            raise BadSource(f"{path} is missing; is the download complete?")
    model = models.BPE.from_file(str(vocabulary), str(merges), end_of_word_suffix="</w>", unk_token=END)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(START, special=True), AddedToken(END, special=True)])
    end, start = ((token, int(tokenizer.token_to_id(token) or 0)) for token in (END, START))
    tokenizer.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    return tokenizer


def _length(config: dict[str, Any], positions: int) -> int:
    """The tokenizer's own maximum where it has a meaningful one; transformers writes 1e30 for none."""
    length = config.get("model_max_length", positions)
    return min(int(length), positions)


def _pad(folder: Path, config: dict[str, Any], tokenizer: Any) -> tuple[str, int]:
    """The padding token and its id: from the config, the special tokens, or the tokenizer.json itself."""
    token = config.get("pad_token") or read_json_if_any(folder / "special_tokens_map.json").get("pad_token")
    if isinstance(token, dict):
        token = token.get("content")
    if token is None and tokenizer.padding is not None:
        token = tokenizer.padding["pad_token"]
    token = token or END
    number = tokenizer.token_to_id(token)
    if number is None:
        raise BadSource(f"{folder}: the padding token {token!r} is not in the vocabulary")
    return str(token), int(number)
