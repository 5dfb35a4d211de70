"""The shipped draft model through the public door: the same text by every road that ought to lead to it."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns bfloat16 from it)
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import edgekit
from edgekit.bundle.store import read_bundle
from edgekit.errors import BadRequest
from edgekit.export import build
from edgekit.quant.precision import PRECISIONS
from edgekit.runtime.backends import open_session
from edgekit.runtime.llm.tree import TokenTree
from edgekit.runtime.llm.verifier import LocalVerifier

DRAFT = Path(__file__).resolve().parents[3] / "models" / "pycode-draft"
PROMPT = 'class Stack:\n    """A stack."""\n\n    def __init__(self):\n'
PROMPTS = ("import os\n", PROMPT, "def mean(values):\n    return", "# 東京 🙂\nx = ", "for i in range(10):\n    if")
CHAT = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}"
    "# {{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}# assistant:{% endif %}"
)
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(source, precision=, device=) -> the path of its bundle, made once."""
    made: dict[tuple[Path, str, str], Path] = {}

    def get(source: Path = DRAFT, precision: str = "fp32", device: str = "cpu") -> Path:
        key = (source, precision, device)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("shipped") / "x.bundle"
            request = build.ExportRequest(source, made[key], device=device, precision=precision)
            build.export(request, lambda _what, _fraction: None)
        return made[key]

    return get


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """A copy of the model folder in which some JSON files have other values, and some files other text."""

    def make(files: dict[str, str] | None = None, **values: dict[str, Any]) -> Path:
        folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(DRAFT, folder)
        for name, more in values.items():
            path = folder / f"{name}.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
        for name, text in (files or {}).items():
            (folder / name).write_text(text)
        return folder

    return make


def load(path: Path, **options: Any) -> Any:
    """A pipeline of its own, with nothing in its cache."""
    return edgekit.load(path, task="text-generation", **{"threads": 1, **options})


def rows(path: Path, prompt: tuple[int, ...], text: tuple[int, ...]) -> np.ndarray:
    """The model's logits before each token of `text`, without a pipeline: (len(text), vocabulary)."""
    found = read_bundle(path)
    decoding = found.manifest.decoding
    assert decoding is not None
    session = open_session(found.root / found.manifest.parts[decoding.part].graph, threads=1)
    return LocalVerifier(session, decoding).score(prompt, TokenTree.chain(prompt[-1], text[:-1])).logits


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_p": 0.9, "seed": 4},
    "penalised": {"repetition_penalty": 1.3},
    "all at once": {"temperature": 1.2, "top_k": 20, "min_p": 0.02, "repetition_penalty": 1.1, "seed": 9},
}


@pytest.mark.parametrize("way", WAYS)
def test_both_dialects_write_the_same_text(bundle: Made, way: str) -> None:
    """At fp32 the engine's own operators and the standard's give the same tokens, greedy and sampled."""
    ours, standard = load(bundle()), load(bundle(device="trt"))
    for prompt in PROMPTS:
        texts = [model.generate(prompt, max_new_tokens=32, **WAYS[way]) for model in (ours, standard)]
        assert texts[0].tokens == texts[1].tokens
        assert texts[0].text == texts[1].text


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_text_is_the_same_by_every_road(bundle: Made, precision: str) -> None:
    """Whole, streamed, again from a warm cache, and by a fresh pipeline: one text in each precision."""
    model = load(bundle(precision=precision))
    options = {"max_new_tokens": 24, "temperature": 0.7, "seed": 1}
    first = model.generate(PROMPT, **options)
    chunks = list(model.stream(PROMPT, **options))
    assert "".join(chunk.text for chunk in chunks) == first.text
    assert tuple(token for chunk in chunks for token in chunk.tokens) == first.tokens
    again = model.generate(PROMPT, **options)
    assert (again.text, again.tokens) == (first.text, first.tokens)
    assert again.stats.reused_tokens == len(first.prompt_tokens) - 1
    assert load(bundle(precision=precision)).generate(PROMPT, **options).tokens == first.tokens
    assert first.text == model.tokenizer.decode(first.tokens)


def test_the_engines_threads_do_not_change_an_fp32_text(bundle: Made) -> None:
    """One thread or two: the same tokens, greedy and sampled."""
    models = [load(bundle(), threads=count) for count in (1, 2)]
    for way in ("greedy", "sampled"):
        texts = [model.generate(PROMPT, max_new_tokens=40, **WAYS[way]).tokens for model in models]
        assert texts[0] == texts[1]


def test_no_order_of_calls_changes_a_text(bundle: Made) -> None:
    """Prompts that share beginnings, shrink, grow and come back give what a fresh pipeline gives for each."""
    model = load(bundle())
    long = PROMPT * 4
    turns = [PROMPT, PROMPT + "        self", PROMPT[:30], long, "import os\n", long + "x", PROMPT, long[:-5], "y"]
    for prompt in turns:
        warm = model.generate(prompt, max_new_tokens=8)
        cold = load(bundle()).generate(prompt, max_new_tokens=8)
        assert (warm.tokens, warm.text) == (cold.tokens, cold.text)
        assert warm.stats.prefill_tokens + warm.stats.reused_tokens == len(warm.prompt_tokens)


def test_streams_left_early_and_interleaved_spoil_nothing(bundle: Made) -> None:
    """Two streams taken in turns on one pipeline, one of them dropped: both said what they say alone."""
    alone = [load(bundle()).generate(prompt, max_new_tokens=12).tokens for prompt in PROMPTS[:2]]
    model = load(bundle())
    streams = [model.stream(prompt, max_new_tokens=12) for prompt in PROMPTS[:2]]
    taken: list[list[int]] = [[], []]
    for (index, stream), _ in zip(itertools.cycle(enumerate(streams)), range(12), strict=False):
        taken[index] += next(stream).tokens
    assert [tuple(tokens) for tokens in taken] == [tokens[:6] for tokens in alone]
    streams[0].close()
    assert model.generate(PROMPTS[0], max_new_tokens=12).tokens == alone[0]


def test_a_stop_string_cuts_wherever_it_falls(bundle: Made) -> None:
    """Every piece of the text as a stop string, within a token or across several, ends it where it first stands."""
    model = load(bundle())
    free = model.generate(PROMPT, max_new_tokens=16).text
    for start in range(0, len(free) - 4, 3):
        for length in (1, 4):
            stop = free[start : start + length]
            cut = model.generate(PROMPT, max_new_tokens=16, stop=["never this", stop])
            assert cut.text == free[: free.index(stop)]
            assert cut.finish_reason == "stop"
    assert model.generate(PROMPT, max_new_tokens=16, stop=[free + "more"]).text == free


@pytest.mark.parametrize("place", ["generation_config", "config"])
def test_an_end_token_ends_the_text(bundle: Made, changed: Callable[..., Path], place: str) -> None:
    """A token the model does say, declared as an end in either file, ends the text and is no part of it."""
    model = load(bundle())
    free = model.generate(PROMPT, max_new_tokens=24)
    end = free.tokens[9]
    at = free.tokens.index(end)
    values: dict[str, Any] = {place: {"eos_token_id": [4095, end] if place == "generation_config" else end}}
    if place == "config":
        values["generation_config"] = {"eos_token_id": None}
    result = load(bundle(changed(**values))).generate(PROMPT, max_new_tokens=24)
    assert result.tokens == free.tokens[: at + 1]
    assert result.finish_reason == "eos"
    assert result.text == model.tokenizer.decode(free.tokens[:at])


def test_the_context_ends_a_text_that_nothing_else_ended(bundle: Made, changed: Callable[..., Path]) -> None:
    """A model of 40 positions writes up to the fortieth token, says why it stopped, and refuses a prompt of 40."""
    model = load(bundle(changed(config={"max_position_embeddings": 40})))
    result = model.generate(PROMPT, max_new_tokens=1000)
    assert result.finish_reason == "context"
    assert len(result.prompt_tokens) + len(result.tokens) == 40
    assert result.tokens == load(bundle()).generate(PROMPT, max_new_tokens=len(result.tokens)).tokens
    ids = model.tokenizer.encode(PROMPT * 9)
    brim = model.tokenizer.decode(ids[:39])
    assert model.tokenizer.encode(brim) == ids[:39]
    last = model.generate(brim, max_new_tokens=5)
    assert (len(last.tokens), last.finish_reason) == (1, "context")
    with pytest.raises(BadRequest, match="40"):
        model.generate(PROMPT * 9)


DEFAULTS = {"do_sample": True, "temperature": 0.8, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.2}


def test_generation_config_is_the_default_and_only_that(bundle: Made, changed: Callable[..., Path]) -> None:
    """What the model's author set holds where nothing is asked, each option alone can be overruled."""
    authors, plain = load(bundle(changed(generation_config=DEFAULTS))), load(bundle())
    options = {name: value for name, value in DEFAULTS.items() if name != "do_sample"}

    def text(model: Any, **asked: Any) -> tuple[int, ...]:
        return model.generate(PROMPT, max_new_tokens=24, seed=5, **asked).tokens

    wanted = text(plain, **options)
    assert text(authors) == wanted != text(plain)
    for name, value in {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}.items():
        assert text(authors, **{name: value}) == text(plain, **{**options, name: value})
    assert text(authors, temperature=0.0, repetition_penalty=1.0) == text(plain)


def test_a_chat_template_makes_the_prompt(bundle: Made, changed: Callable[..., Path]) -> None:
    """Messages, a system text and a lone prompt become the template's text, special tokens as single ids."""
    model = load(bundle(changed({"chat_template.jinja": CHAT})))
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "é"}]
    text = "# system: be brief<|endoftext|>\n# user: hi<|endoftext|>\n# assistant: yo<|endoftext|>\n"
    text += "# user: é<|endoftext|>\n# assistant:"
    result = model.generate(messages=talk, system="be brief", max_new_tokens=4)
    assert list(result.prompt_tokens) == model.tokenizer.encode(text)
    assert result.prompt_tokens.count(0) == 4
    assert model.generate(text, max_new_tokens=4).tokens == result.tokens
    lone = model.generate("hi", system="s", max_new_tokens=1)
    wanted = "# system: s<|endoftext|>\n# user: hi<|endoftext|>\n# assistant:"
    assert list(lone.prompt_tokens) == model.tokenizer.encode(wanted)
    with pytest.raises(BadRequest, match="no role tool"):
        model.generate(messages=[{"role": "tool", "content": "x"}])


def test_a_second_turn_computes_only_what_is_new(bundle: Made, changed: Callable[..., Path]) -> None:
    """A conversation continued with the model's own answer finds its beginning in the cache."""
    model = load(bundle(changed({"chat_template.jinja": CHAT})))
    talk = [{"role": "user", "content": "write a loop over a list of names and print each of them"}]
    first = model.generate(messages=talk, max_new_tokens=8)
    assert first.stats.reused_tokens == 0
    talk += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "again"}]
    second = model.generate(messages=talk, max_new_tokens=8)
    assert second.stats.reused_tokens >= len(first.prompt_tokens) - 3
    cold = load(bundle(changed({"chat_template.jinja": CHAT}))).generate(messages=talk, max_new_tokens=8)
    assert second.tokens == cold.tokens


def test_repetition_penalty_is_its_slow_twin(bundle: Made) -> None:
    """Each token of a penalised text is the best after dividing or multiplying, one by one, what was said before."""
    penalty = 1.4
    result = load(bundle()).generate(PROMPT, max_new_tokens=32, repetition_penalty=penalty)
    logits = rows(bundle(), result.prompt_tokens, result.tokens)
    for at, token in enumerate(result.tokens):
        scores = logits[at].copy()
        for said in {*result.prompt_tokens, *result.tokens[:at]}:
            scores[said] = scores[said] / penalty if scores[said] > 0 else scores[said] * penalty
        assert scores.max() - scores[token] < 1e-4


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(3, 1.0, 0.0), (0, 0.5, 0.0), (0, 1.0, 0.3), (8, 0.8, 0.1)])
def test_sampled_tokens_are_among_those_kept(bundle: Made, top_k: int, top_p: float, min_p: float) -> None:
    """At a high temperature every token is one that top-k, top-p and min-p leave, found by sorting everything."""
    options = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "temperature": 1.5}
    result = load(bundle()).generate(PROMPT, max_new_tokens=32, seed=3, **options)
    logits = rows(bundle(), result.prompt_tokens, result.tokens).astype(np.float64) / 1.5
    outranked = []
    for scores, token in zip(logits, result.tokens, strict=True):
        order = np.argsort(-scores)[: top_k or None]
        p = np.exp(scores[order] - scores[order[0]])
        p /= p.sum()
        order = order[: int((np.cumsum(p) - p < top_p + 1e-6).sum())]
        left = set(order[scores[order] >= scores[order[0]] + np.log(max(min_p, 1e-30)) - 1e-5].tolist())
        assert token in left
        outranked.append(token != order[0])
    assert any(outranked)


def dequantized(source: Path, target: Path, precision: str) -> Path:
    """The model whose float32 weights are what the codes mean, its tied head written out."""
    shutil.copytree(source, target)
    row = PRECISIONS[precision]
    weights = {name: value.astype(np.float32) for name, value in load_file(source / "model.safetensors").items()}
    meant = {
        name: row.unpack(row.pack(value), value.shape[1]) if value.ndim == 2 and "embed" not in name else value
        for name, value in weights.items()
    }
    table = weights["model.embed_tokens.weight"]
    meant["lm_head.weight"] = row.unpack(row.pack(table), table.shape[1])
    meant["model.embed_tokens.weight"] = table.astype(np.float16).astype(np.float32)
    save_file({name: np.ascontiguousarray(value) for name, value in meant.items()}, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False, "dtype": "float32"}))
    return target


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantized_text_leaves_its_twin_only_at_near_ties(bundle: Made, tmp_path: Path, precision: str) -> None:
    """The twin holds the same weights in fp32: where it would choose otherwise, the two logits are nearly equal.

    Measured: 1 of 200 tokens, 0.12 apart. The model before int4 would choose otherwise for 13, up to 0.66 apart.
    """
    twin = bundle(dequantized(DRAFT, tmp_path / "twin", precision))
    model = load(bundle(precision=precision))
    gaps = []
    for prompt in PROMPTS:
        result = model.generate(prompt, max_new_tokens=40, temperature=0.0)
        logits = rows(twin, result.prompt_tokens, result.tokens)
        gaps += [row.max() - row[token] for row, token in zip(logits, result.tokens, strict=True)]
    assert max(gaps) < 0.3
    assert np.mean(np.array(gaps) > 0) < 0.05
