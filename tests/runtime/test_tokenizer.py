"""Tokenizers: streamed text is decoded text, and never takes a character back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Engine

from edgekit.errors import BadManifest
from edgekit.runtime.tokenizer import REPLACEMENT, Tokenizer, fingerprint

CORPUS = [
    "def walk(path):\n    return path\n",
    "the cat sat on the mat",
    "日本語の文章です",
    "naïve café, 12 €",
    "🦊🦊 fox",
] * 20


def byte_level() -> Engine:
    """Byte-level BPE as GPT-2's family and the shipped models have it."""
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    engine.train_from_iterator(CORPUS, trainer)
    engine.add_tokens(["<plain>"])
    return engine


def metaspace() -> Engine:
    """SentencePiece style: a mark for each space, one put before the text, and bytes for what has no token."""
    words = {word: -float(n) for n, word in enumerate(["▁the", "▁", "c", "a", "t", "▁s", "日", "本", "▁▁", "é"], 1)}
    bytes_ = {f"<0x{byte:02X}>": -50.0 for byte in range(256)}
    vocab = [("<unk>", 0.0), ("<s>", 0.0), *bytes_.items(), *words.items()]
    engine = Engine(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    engine.add_special_tokens(["<s>"])
    engine.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return engine


def prepending() -> Engine:
    """T5 and Gemma style: the Metaspace pre-tokenizer and its decoder, which drops the first space."""
    pieces = ["▁a", "▁b", "a", "b", "▁", "日", "▁ab", "🦊"]
    engine = Engine(models.Unigram([("<unk>", 0.0), *((piece, -1.0) for piece in pieces)], unk_id=0))
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    engine.decoder = decoders.Metaspace()
    return engine


def wordpiece() -> Engine:
    """A decoder that puts spaces between tokens and joins `##` pieces."""
    words = ["[UNK]", "a", "##b", "c", ".", "'", "s", "##日"]
    engine = Engine(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece()
    return engine


TOKENIZERS = {
    make.__name__: Tokenizer(make().to_str().encode()) for make in (byte_level, metaspace, prepending, wordpiece)
}
EVERY = pytest.mark.parametrize("name", TOKENIZERS)


def check_stream(tokenizer: Tokenizer, ids: list[int], sizes: list[int]) -> None:
    """All laws of a stream at once."""
    stream, shown, at, turn = tokenizer.stream(), "", 0, 0
    whole = tokenizer.decode(ids)
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        shown += stream.feed(ids[at : at + size])
        assert whole.startswith(shown)
        at, turn = at + size, turn + 1
    assert shown + stream.finish() == whole


@EVERY
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_ids_stream_to_what_they_decode_to(name, data):
    """Ids in any order, special, unknown and broken bytes: what is shown is what the whole text begins with."""
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.size + 3), max_size=25))
    check_stream(tokenizer, ids, data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))


@pytest.mark.parametrize("name", ["byte_level", "metaspace"])
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=20))
def test_any_text_comes_back_and_streams(name, text):
    """Whatever Unicode goes in comes out of both kinds of tokenizer, streamed token by token."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    # Metaspace writes spaces as its own mark, so the mark itself cannot come back as anything else.
    expected = text if name == "byte_level" else text.replace("▁", " ")
    assert tokenizer.decode(ids) == expected
    check_stream(tokenizer, ids, [1])


@pytest.mark.parametrize("name", ["byte_level", "metaspace"])
def test_a_character_waits_for_its_bytes(name):
    """A fox of four bytes appears once, whole, and no placeholder before it."""
    stream = TOKENIZERS[name].stream()
    ids = TOKENIZERS[name].encode("a🐍b", add_special_tokens=False)
    pieces = [stream.feed([index]) for index in ids] + [stream.finish()]
    assert "".join(pieces) == "a🐍b"
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert any(piece.startswith("🐍") for piece in pieces)


def test_text_is_not_held_back_without_need():
    """Ordinary tokens come out at once."""
    tokenizer = TOKENIZERS["byte_level"]
    stream = tokenizer.stream()
    ids = tokenizer.encode("the cat")
    assert [stream.feed([index]) for index in ids] == [tokenizer.decode([index]) for index in ids]


def test_special_tokens_are_added_and_skipped_on_request():
    """Both directions have the switch."""
    tokenizer = TOKENIZERS["metaspace"]
    with_start, without = tokenizer.encode("the"), tokenizer.encode("the", add_special_tokens=False)
    assert with_start == [tokenizer.id_of("<s>"), *without]
    assert tokenizer.decode(with_start) == "the"
    assert tokenizer.decode(with_start, skip_special_tokens=False) == "<s> the"


def test_the_fingerprint_is_of_the_content():
    """Layout and key order do not count; one changed merge does."""
    raw = byte_level().to_str()
    value = json.loads(raw)
    shuffled = json.dumps(dict(reversed(value.items())), indent=3).encode()
    assert fingerprint(raw.encode()) == fingerprint(shuffled) == Tokenizer(shuffled).fingerprint
    value["model"]["merges"].pop()
    assert fingerprint(json.dumps(value).encode()) != fingerprint(shuffled)


def test_lengths_are_the_callers():
    """Truncation and padding stored in the file are off; a fixed length cuts before the closing token, or fills up."""
    engine = byte_level()
    end = engine.token_to_id("<|end|>")
    engine.post_processor = processors.TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", end)])
    engine.enable_truncation(3)
    engine.enable_padding(length=9)
    tokenizer = Tokenizer(engine.to_str().encode())
    ids = tokenizer.encode("日本語 the cat")
    assert len(ids) not in (3, 9)
    assert tokenizer.encode_padded("日本語 the cat", 4, 0) == [*ids[:3], end]
    assert tokenizer.encode_padded("日本語 the cat", 30, 7) == ids + [7] * (30 - len(ids))
    assert tokenizer.encode("日本語 the cat") == ids


@pytest.mark.parametrize("raw", [b"", b"{}", b"\xff\xfe", b'{"model": {"type": "Nonsense"}}'])
def test_what_is_no_tokenizer_is_refused(raw):
    """In our words, with the library's reason."""
    with pytest.raises(BadManifest, match=r"tokenizer\.json"):
        Tokenizer(raw)


def test_a_regex_pre_tokenizer_is_fine():
    """What the shipped models use: a Split pattern before byte-level, decoded all the same."""
    engine = byte_level()
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" {2,}|\n+| ?\p{L}+|\s|[^\s]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = Tokenizer(engine.to_str().encode())
    text = "def walk():\n        return 'é'\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    check_stream(tokenizer, tokenizer.encode(text), [1])
