"""Decoders that optimum exported say, without torch, what transformers said: plain, drafted, cut back, remembered."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from edgekit.bundle.graphfile import read_graph
from edgekit.bundle.store import Bundle
from edgekit.runtime.backends import open_session
from edgekit.runtime.llm.accept import own_draw
from edgekit.runtime.llm.drafters import Ask, Drafter, NoDraft
from edgekit.runtime.llm.drafters.ngram import NgramDraft
from edgekit.runtime.llm.generate import generate
from edgekit.runtime.llm.pipeline import TextPipeline
from edgekit.runtime.llm.prefix import PrefixStore
from edgekit.runtime.llm.probs import Sampling
from edgekit.runtime.llm.tree import Shape, TokenTree
from edgekit.runtime.llm.verifier import LocalVerifier
from tests.export.onnx_folder.folders import DECODERS, FOLDERS, adopt, configure, copied, edit, golden

PENALTY = 2.0  # of tests/fixtures/optimum/make.py
PROMPT = "t3 t4 t5 t9 t3 t4 t5"
Adopted = Callable[[str], Bundle]


def verifier_of(bundle: Bundle, **options) -> LocalVerifier:
    """A fresh verifier of a bundle's decoder."""
    decoding = bundle.manifest.decoding
    session = open_session(bundle.root / bundle.manifest.parts[decoding.part].graph, threads=1)
    return LocalVerifier(session, decoding, **options)


def text(verifier: LocalVerifier, prompt, sampling=Sampling(), drafter: Drafter | None = None, count: int = 64):  # noqa: B008
    """Tokens after a prompt."""
    steps = generate(
        prompt,
        drafter=drafter or NoDraft(),
        verifier=verifier,
        accept=partial(own_draw, draw=sampling),
        ask=Ask(Shape.chain(4), sampling),
        ends=(2,),
        max_new_tokens=count,
    )
    return [token for step in steps for token in step.tokens]


def chain_rows(verifier: LocalVerifier, tokens: tuple[int, ...]) -> np.ndarray:
    """Logits after each token of a text, all in one run."""
    return verifier.score(tokens[:1], TokenTree.chain(tokens[0], tokens[1:])).logits.copy()


class Guess:
    """A drafter that knows the right text and errs at every third place, in chains."""

    name, outputs = "guess", ()

    def __init__(self, right: list[int]) -> None:
        self.right, self.asked = right, 0

    def propose(self, tokens, ask):
        self.asked += 1
        drafts = [token if at % 3 else (token + 1) % 60 for at, token in enumerate(self.right[:5], start=self.asked)]
        self.last = tokens
        return TokenTree.chain(tokens[-1], drafts[: min(ask.room, 5)])

    def observe(self, tree, step, scores):
        self.right = self.right[len(step.tokens) :]


# --------------------------------------------------------------------------------------------- as transformers


@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_those_of_transformers(adopted: Adopted, name: str) -> None:
    """A text of 48 tokens, at once and in runs of seven: 1e-5 of max|x| at every position."""
    right = golden(name)
    tokens = tuple(right["tokens"].tolist())
    limit = 1e-5 * np.abs(right["logits"]).max()
    assert np.abs(chain_rows(verifier_of(adopted(name)), tokens) - right["logits"]).max() <= limit
    verifier = verifier_of(adopted(name), chunk=7)
    for end in (20, 34, 48):
        row = verifier.score(tokens[:end], TokenTree.chain(tokens[end - 1])).logits[0]
        assert np.abs(row - right["logits"][end - 1]).max() <= limit


@pytest.mark.parametrize(("kind", "penalty"), [("text", 1.0), ("varied", PENALTY)])
@pytest.mark.parametrize("name", DECODERS)
def test_texts_are_those_of_transformers(adopted: Adopted, name: str, kind: str, penalty: float) -> None:
    """Greedy, plain and with a repetition penalty, from prompts of 1, 5 and 40 tokens, up to the end token."""
    right, verifier = golden(name), verifier_of(adopted(name))
    for number in range(3):
        prompt = right[f"prompt.{number}"].tolist()
        assert text(verifier, prompt, Sampling(repetition_penalty=penalty)) == right[f"{kind}.{number}"].tolist()


# --------------------------------------------------------------------------------- whatever the cache went through


@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.3])
@pytest.mark.parametrize("name", DECODERS)
def test_drafts_change_no_token(adopted: Adopted, name: str, temperature: float) -> None:
    """Chains that are right, partly right and wrong, and looked-up ones: the text of plain decoding."""
    sampling = Sampling(temperature=temperature, seed=5, repetition_penalty=1.1)
    prompt, bundle = (3, 9, 4, 3, 9), adopted(name)
    plain = text(verifier_of(bundle), prompt, sampling)
    assert text(verifier_of(bundle), prompt, sampling, Guess(list(plain))) == plain
    assert text(verifier_of(bundle), prompt, sampling, NgramDraft()) == plain


@pytest.mark.parametrize("draft", ["ngram", "lookahead"])
def test_every_drafter_of_the_command_keeps_to_chains(adopted: Adopted, draft: str) -> None:
    """The controller never asks for branches, so nothing is refused, and the text is that without drafts."""
    plain = TextPipeline(adopted("llama"), threads=1).generate(PROMPT, max_new_tokens=120)
    config = {"num_speculative_tokens": 6, "adaptive": True}
    drafted = TextPipeline(adopted("llama"), threads=1, draft=draft, speculative_config=config)
    assert drafted.verifier.chains_only
    assert drafted.generate(PROMPT, max_new_tokens=120).tokens == plain.tokens
    assert (
        drafted.generate(PROMPT, max_new_tokens=120, temperature=1.0, seed=3).tokens
        == TextPipeline(adopted("llama"), threads=1)
        .generate(PROMPT, max_new_tokens=120, temperature=1.0, seed=3)
        .tokens
    )


def test_one_adopted_decoder_drafts_for_another(adopted: Adopted) -> None:
    """A ready-made folder serves as draft model too."""
    plain = TextPipeline(adopted("llama"), threads=1).generate(PROMPT, max_new_tokens=60)
    drafted = TextPipeline(adopted("llama"), threads=1, draft=str(adopted("qwen2").root))
    assert drafted.generate(PROMPT, max_new_tokens=60).tokens == plain.tokens


def test_a_cut_text_goes_on_from_the_cut(adopted: Adopted) -> None:
    """Rolled back to any length, the next rows are those of a fresh start, up to the engine's rounding."""
    tokens = tuple(golden("llama")["tokens"].tolist())
    verifier = verifier_of(adopted("llama"))
    whole = chain_rows(verifier_of(adopted("llama")), tokens)
    verifier.score(tokens, TokenTree.chain(tokens[-1]))
    for length in (40, 17, 3, 0, 30):
        verifier.rollback(length)
        rows = verifier.score(tokens[:46], TokenTree.chain(tokens[45], tokens[46:])).logits
        np.testing.assert_allclose(rows, whole[45:], atol=1e-4)


def test_a_text_longer_than_the_first_buffer_goes_on(adopted: Adopted) -> None:
    """The context of 256 is filled to its last place and no further."""
    pipeline = TextPipeline(adopted("llama"), threads=1)
    result = pipeline.generate(PROMPT, max_new_tokens=1000, temperature=1.5, seed=1)
    assert result.finish_reason in ("context", "eos")
    if result.finish_reason == "context":
        assert len(result.prompt_tokens) + len(result.tokens) == 256


def test_a_stored_prefix_is_not_computed_again(adopted: Adopted) -> None:
    """Keys and values of a prompt come from the store, and the text is the same."""
    store = PrefixStore(1 << 20)
    tokens = golden("llama")["prompt.2"].tolist()
    first, second = (verifier_of(adopted("llama"), prefixes=store) for _ in range(2))
    right = text(first, tokens, Sampling(repetition_penalty=PENALTY))
    first.remember()
    assert second.recall(tuple(tokens)) == len(tokens) - 1
    assert text(second, tokens, Sampling(repetition_penalty=PENALTY)) == right
    assert store.stats.reused >= len(tokens) - 1


# ------------------------------------------------------------------------------------------------- the bundle


@pytest.mark.parametrize("name", DECODERS)
def test_the_decoding_block_is_the_folders(adopted: Adopted, name: str) -> None:
    """Dialect, cache layout, vocabulary, end tokens and context from config and graph; the axes have names."""
    manifest = adopted(name).manifest
    decoding, decoder = manifest.decoding, manifest.parts["decoder"]
    assert (decoding.dialect, decoding.context_length, decoding.vocab_size) == ("concat", 256, 60)
    assert (decoding.eos, decoding.bos) == ((2,), 1)
    assert (decoding.kv.heads, decoding.kv.head_dim, decoding.kv.layers) == (2, 4, {"llama": 2, "qwen2": 1}[name])
    shapes = {spec.name: spec.shape for spec in (*decoder.inputs, *decoder.outputs)}
    assert shapes["attention_mask"] == ("batch", "total")
    assert shapes["past.0.key"] == ("batch", 2, "past", 4)
    assert shapes["present.0.value"] == ("batch", 2, "total", 4)
    assert shapes["logits"] == ("batch", "rows", 60)
    assert manifest.axes["past"].min == 0
    assert manifest.family == name
    assert [gate.value <= 1e-5 for gate in manifest.precision.gates] == [True, True]


def test_only_rows_that_are_asked_for_meet_the_vocabulary(adopted: Adopted) -> None:
    """The selection stands before the last product, so a prompt costs one row of it."""
    bundle = adopted("llama")
    session = open_session(bundle.root / "graphs" / "decoder.onnx")
    kv = np.zeros((1, 2, 0, 4), np.float32)
    feeds = {f"past.{layer}.{side}": kv for layer in range(2) for side in ("key", "value")}
    ids = np.array([[5, 6, 7, 8]])
    feeds |= {"input_ids": ids, "position_ids": np.arange(4)[None], "attention_mask": np.ones_like(ids)}
    every = session.run({**feeds, "rows": np.arange(4)})["logits"]
    some = session.run({**feeds, "rows": np.array([3, 1])})["logits"]
    np.testing.assert_allclose(some, every[:, [3, 1]], atol=1e-5)


def drop_positions(model) -> None:
    """An export whose positions count from the cache's length: here, from zeros that nobody feeds."""
    rest = [value for value in model.graph.input if value.name != "position_ids"]
    del model.graph.input[:]
    model.graph.input.extend(rest)
    source = next(node for node in model.graph.node if "position_ids" in node.input)
    place = list(source.input).index("position_ids")
    source.input[place] = "input_ids"  # any int64 (batch, seq)


def test_a_graph_that_counts_positions_itself_gets_an_input_it_does_not_read(tmp_path: Path) -> None:
    """The contract is one for all: positions are fed, and this graph has no use for them."""
    folder = copied("qwen2", tmp_path)
    edit(folder / "model.onnx", drop_positions)
    bundle = adopt(folder, tmp_path / "x.bundle")
    assert "position_ids" in [spec.name for spec in bundle.manifest.parts["decoder"].inputs]
    assert "position_ids" in [tensor.name for tensor in read_graph(bundle.root / "graphs" / "decoder.onnx").inputs]
    assert TextPipeline(bundle, threads=1).generate(PROMPT, max_new_tokens=5).tokens


def test_a_graph_below_the_configs_folder_is_found(tmp_path: Path) -> None:
    """Pages that put graphs into `onnx/` and configs above it are adopted as they are."""
    folder = copied("llama", tmp_path)
    (folder / "onnx").mkdir()
    (folder / "model.onnx").rename(folder / "onnx" / "model.onnx")
    bundle = adopt(folder, tmp_path / "x.bundle")
    prompt = golden("llama")["prompt.1"].tolist()
    assert text(verifier_of(bundle), prompt) == golden("llama")["text.1"].tolist()


CONTEXTS = {
    "window": ({"sliding_window": 32, "use_sliding_window": True}, 32, "sliding window of 32"),
    "window off": ({"sliding_window": 32, "use_sliding_window": False}, 256, None),
    "window past the end": ({"sliding_window": 4096, "use_sliding_window": True}, 256, None),
    "longrope": ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 64}, 64, "longrope"),
    "dynamic": ({"rope_scaling": {"rope_type": "dynamic", "original_max_position_embeddings": 48}}, 48, "dynamic"),
    "llama3": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 256, None),
    "odd": ({"rope_scaling": "none"}, 256, None),
}


@pytest.mark.parametrize("case", CONTEXTS)
def test_the_context_ends_where_the_graph_may_go_wrong(tmp_path: Path, case: str) -> None:
    """Windows and scalings by length cannot be seen from outside: the bundle stops before they matter, and says so."""
    changes, context, word = CONTEXTS[case]
    folder = copied("qwen2", tmp_path)
    configure(folder / "config.json", **changes)
    manifest = adopt(folder, tmp_path / "x.bundle").manifest
    assert manifest.decoding.context_length == context
    assert (word or "") in " ".join(manifest.notes.values())
    assert bool(manifest.notes) == (word is not None)


def test_fixture_folders_are_as_optimum_wrote_them() -> None:
    """The graphs are of one opset, and no file but the compressed answers names a folder of the machine it is from."""
    assert {tuple(read_graph(file).opsets.items()) for file in FOLDERS.rglob("*.onnx")} == {(("ai.onnx", 18),)}
    files = [file for folder in FOLDERS.iterdir() if folder.is_dir() for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 50
    places = re.compile(rb"/(wo" + rb"rk|tm" + rb"p|ro" + rb"ot|ho" + rb"me|us" + rb"r|op" + rb"t)/")
    assert [file for file in files if places.search(file.read_bytes())] == []
