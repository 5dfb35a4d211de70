"""The pipeline over a fake model: prompts, streams, ends, and calls that are left early."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers

from edgekit.bundle.manifest import FORMAT, Decoding, Manifest, Part, Provenance, SamplingDefaults, Tokenizer
from edgekit.errors import BadManifest, BadRequest
from edgekit.runtime.llm import pipeline as module
from edgekit.runtime.llm.pipeline import TextPipeline
from edgekit.runtime.tokenizer import REPLACEMENT
from tests.runtime.llm.fake_lm import VOCAB, FakeBundle, FakeLM, greedy_text

LETTERS = "·abcdefghijk"  # token i is letter i; token 0 is the end-of-sequence token
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}"


@pytest.fixture
def open_bundle(tmp_path, monkeypatch):
    """A pipeline whose session is the fake model."""

    def make(*, task="text-generation", template: bool = True, context: int = 600, letters=LETTERS, **decoding: object):
        engine = Engine(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="·"))
        engine.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        engine.decoder = decoders.Fuse()
        (tmp_path / "tokenizer.json").write_text(engine.to_str())
        (tmp_path / "chat.jinja").write_text(TEMPLATE)
        lm = FakeLM(context=context)
        fields = {name: getattr(lm.decoding, name) for name in Decoding.__struct_fields__} | decoding
        spec = Tokenizer("tokenizer.json", "0" * 64, chat_template="chat.jinja" if template else None)
        manifest = Manifest(
            format=FORMAT,
            task=task,
            family="fake",
            parts={"decoder": Part(graph="graphs/decoder.onnx", inputs=(), outputs=())},
            files=(),
            provenance=Provenance(source="fake", source_sha256="0" * 64),
            tokenizers={"default": spec},
            decoding=Decoding(**fields),
        )
        monkeypatch.setattr(module, "open_session", lambda graph, device, **options: lm.session())
        return TextPipeline(FakeBundle(tmp_path, manifest))

    return make


def ids(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


def letters(tokens) -> str:
    return "".join(LETTERS[token] for token in tokens)


@pytest.mark.parametrize("prompt", ["abc", "hgd", "k"])
def test_greedy_text_is_the_models_own(open_bundle, prompt):
    """Tokens, text and prompt are those of the model's definition; the end token is a token and no text."""
    result = open_bundle().generate(prompt, max_new_tokens=40)
    right = greedy_text(ids(prompt), 40, ends=(0,))
    assert result.tokens == tuple(right)
    assert result.text == letters(token for token in right if token)
    assert result.prompt_tokens == tuple(ids(prompt))
    assert result.finish_reason == ("eos" if right[-1] == 0 else "length")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_is_the_whole_text_in_pieces(open_bundle, temperature):
    """Chunks join to `generate`'s text and tokens, and only the last one says why it ended."""
    pipe = open_bundle(eos=())
    options = {"max_new_tokens": 30, "temperature": temperature, "seed": 3, "stop": ["zz"]}
    whole = pipe.generate("abc", **options)
    chunks = list(pipe.stream("abc", **options))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(token for chunk in chunks for token in chunk.tokens) == whole.tokens
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == whole.finish_reason == "length"


def test_the_seed_is_the_text(open_bundle):
    """The same seed gives the same text from any state of the cache; another seed another text."""
    pipe = open_bundle(eos=())
    first = pipe.generate("abc", temperature=1.0, seed=7)
    pipe.generate("abd", temperature=1.0, seed=8)
    assert pipe.generate("abc", temperature=1.0, seed=7).tokens == first.tokens
    assert pipe.generate("abc", temperature=1.0, seed=8).tokens != first.tokens


def test_stop_strings_end_the_text_before_them(open_bundle):
    """The stop string is not shown, the reason says so, and its tokens are still reported."""
    pipe = open_bundle(eos=())
    free = pipe.generate("abc", max_new_tokens=40)
    stop = free.text[10:13]
    result = pipe.generate("abc", max_new_tokens=40, stop=[stop])
    cut = free.text.index(stop)
    assert (result.text, result.finish_reason) == (free.text[:cut], "stop")
    assert result.tokens == free.tokens[: cut + 3]


def test_text_that_waited_comes_with_the_end(open_bundle):
    """What the detokenizer held back when the tokens ended, here a replacement character, is in the last chunk."""
    right = greedy_text(ids("abc"), 60)
    count = right.index(VOCAB - 1) + 1
    pipe = open_bundle(eos=(), letters=LETTERS[:-1] + REPLACEMENT)
    chunks = list(pipe.stream("abc", max_new_tokens=count))
    assert [chunk.text for chunk in chunks[-2:]] == ["", REPLACEMENT]
    assert "".join(chunk.text for chunk in chunks)[:-1] == letters(right[: count - 1])


def test_a_full_context_is_its_own_reason(open_bundle):
    """When the context ends before max_new_tokens, the text says it."""
    pipe = open_bundle(eos=(), context=20)
    result = pipe.generate("abc", max_new_tokens=100)
    assert (len(result.tokens), result.finish_reason) == (17, "context")
    assert pipe.generate("abc", max_new_tokens=17).finish_reason == "length"


def test_defaults_are_the_bundles_unless_asked_otherwise(open_bundle):
    """generation_config's temperature holds; an explicit 0 is greedy again."""
    pipe = open_bundle(eos=(), defaults=SamplingDefaults(temperature=1.3, top_k=5))
    assert pipe.generate("abc", seed=2).tokens == pipe.generate("abc", seed=2, temperature=1.3, top_k=5).tokens
    assert pipe.generate("abc", temperature=0.0).tokens == tuple(greedy_text(ids("abc"), 256))


def test_conversations_go_through_the_template(open_bundle):
    """Messages, a system text, and a prompt with a system text are the conversation they stand for."""
    pipe = open_bundle()
    talk = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    assert letters(pipe.generate(messages=talk).prompt_tokens) == "·abacd"  # u is no letter of this vocabulary
    with_system = pipe.generate("ab", system="k")
    assert letters(with_system.prompt_tokens) == "·k·ab"
    assert pipe.generate(messages=talk[:1], system="k").prompt_tokens == with_system.prompt_tokens


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either prompt or messages"),
        ({"prompt": "a", "messages": []}, "either prompt or messages"),
        ({"prompt": ""}, "no tokens"),
        ({"prompt": "a" * 20}, "context is 20"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompt": "a", "stop": "b"}, "stop strings are a list"),
        ({"prompt": "a", "temperature": -1}, "temperature is -1"),
        ({"prompt": "a", "system": "b"}, "no chat template"),
    ],
)
def test_requests_that_cannot_be_meant_are_refused_at_once(open_bundle, options, words):
    """Also by `stream`, before its first chunk is taken."""
    pipe = open_bundle(template=False, context=20)
    for call in (pipe.generate, pipe.stream):
        with pytest.raises(BadRequest, match=words):
            call(**options)


def test_an_empty_prompt_starts_from_the_beginning_token(open_bundle):
    """A model with a beginning-of-sequence token can start from nothing."""
    assert open_bundle(bos=3).generate("", max_new_tokens=4).prompt_tokens == (3,)


def test_leaving_early_spoils_nothing(open_bundle):
    """A closed stream, two streams in turns, and an interrupt in the middle of a run: the next call is right."""
    pipe = open_bundle(eos=())
    right = tuple(greedy_text(ids("abcde"), 12))
    stream = pipe.stream("abcde", max_new_tokens=12)
    next(stream)
    stream.close()
    assert pipe.generate("abcde", max_new_tokens=12).tokens == right
    one, two = pipe.stream("abcde", max_new_tokens=12), pipe.stream("abk", max_new_tokens=12)
    turns = list(zip(one, two, strict=True))
    assert tuple(token for chunk, _ in turns for token in chunk.tokens) == right
    assert tuple(token for _, chunk in turns for token in chunk.tokens) == tuple(greedy_text(ids("abk"), 12))


def test_an_interrupt_spoils_nothing(open_bundle, monkeypatch):
    """Ctrl-C while the graph runs reaches the caller, and the next call is right."""
    pipe = open_bundle(eos=())
    answer, left = FakeLM.answer, [5]

    def impatient(self, feeds):
        left[0] -= 1
        out = answer(self, feeds)
        if left[0] == 0:
            raise KeyboardInterrupt
        return out

    session = pipe.verifier._kv._session
    monkeypatch.setattr(session, "_answer", impatient.__get__(FakeLM()))
    with pytest.raises(KeyboardInterrupt):
        pipe.generate("abcde", max_new_tokens=12)
    assert pipe.generate("abcde", max_new_tokens=12).tokens == tuple(greedy_text(ids("abcde"), 12))


def test_a_shared_beginning_is_not_computed_again(open_bundle):
    """The second turn of a conversation prefills only what is new, and the counts say so."""
    pipe = open_bundle(eos=())
    first = pipe.generate("abcdefg", max_new_tokens=5)
    assert (first.stats.prefill_tokens, first.stats.reused_tokens) == (7, 0)
    assert (first.stats.decode_tokens, first.stats.decode_steps) == (4, 4)
    second = pipe.generate("abcdefg" + first.text + "h", max_new_tokens=5)
    assert (second.stats.prefill_tokens, second.stats.reused_tokens) == (2, 11)
    assert second.tokens == tuple(greedy_text([*first.prompt_tokens, *first.tokens, *ids("h")], 5))
    assert min(second.stats.prefill_seconds, second.stats.decode_seconds) > 0


def test_other_bundles_are_refused(open_bundle):
    """A picture bundle generates no text, and a text bundle says how it decodes."""
    with pytest.raises(BadRequest, match="text-to-image bundle"):
        open_bundle(task="text-to-image")
    pipe = open_bundle()
    assert np.array(pipe.tokenizer.encode("kba")).tolist() == [VOCAB - 1, 2, 1]
    with pytest.raises(BadManifest, match="decoding block"):
        TextPipeline(
            FakeBundle(
                None,
                Manifest(
                    format=FORMAT,
                    task="text-generation",
                    family="fake",
                    parts={},
                    files=(),
                    provenance=Provenance(source="fake", source_sha256="0" * 64),
                ),
            )
        )
