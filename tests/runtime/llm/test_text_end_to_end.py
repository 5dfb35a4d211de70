"""From a model folder to text: what edgekit writes is what transformers writes, token for token."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.bundle.manifest import Decoding
from edgekit.bundle.store import new_bundle, read_bundle
from edgekit.runtime.backends import open_session
from edgekit.runtime.llm.accept import own_draw
from edgekit.runtime.llm.drafters import NoDraft
from edgekit.runtime.llm.generate import generate
from edgekit.runtime.llm.probs import Sampling
from edgekit.runtime.llm.tree import TokenTree
from edgekit.runtime.llm.verifier import LocalVerifier
from edgekit.runtime.tasks import load
from edgekit.runtime.tokenizer import Tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tiny = pytest.importorskip("tests.export.language.tiny")

pytestmark = pytest.mark.torch

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = ["pycode", "pycode-draft"]
LENGTH, PROMPT = 40, [5, 17, 3, 42, 8, 77, 30]  # over twice the tiny models' window


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory):
    """(folder, dialect) -> the path of its sealed bundle, made once."""
    from edgekit.export.language.export import export_language

    made: dict[tuple[Path, str], Path] = {}

    def get(folder: Path, dialect: Any = "ort") -> Path:
        if (folder, dialect) not in made:
            target = tmp_path_factory.mktemp("bundles") / f"{folder.name}-{dialect}.bundle"
            with new_bundle(target) as draft:
                draft.seal(export_language(folder, draft.root, dialect=dialect))
            made[folder, dialect] = target
        return made[folder, dialect]

    return get


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """case -> (transformers model, its folder), made once."""
    made: dict[str, tuple[Any, Path]] = {}

    def get(case: str) -> tuple[Any, Path]:
        if case not in made:
            model = tiny.make_model(case)
            made[case] = model, tiny.save_model(model, tmp_path_factory.mktemp("models") / case)
        return made[case]

    return get


def open_verifier(path: Path, **options: Any) -> tuple[LocalVerifier, Decoding]:
    """A verifier of its own on a bundle's decoder."""
    bundle = read_bundle(path)
    decoding = bundle.manifest.decoding
    session = open_session(bundle.root / bundle.manifest.parts[decoding.part].graph, threads=1)
    return LocalVerifier(session, decoding, **options), decoding


def reference(model: Any, prompt: list[int], count: int, **options: Any) -> list[int]:
    """transformers' greedy continuation."""
    given = torch.tensor([prompt])
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=count, pad_token_id=0, eos_token_id=model.config.eos_token_id, **options
    )
    with torch.no_grad():
        out = model.generate(given, attention_mask=torch.ones_like(given), generation_config=settings)
    return out[0, len(prompt) :].tolist()


class HalfRight:
    """Trees in which the right continuation runs among wrong branches, and sometimes breaks off."""

    def __init__(self, text: list[int], vocab: int) -> None:
        self.text, self.vocab, self.random = text, vocab, np.random.default_rng(0)

    def propose(self, tokens, ask):
        nodes, parents, at = [tokens[-1]], [-1], 0
        for right in self.text[len(tokens) : len(tokens) + int(self.random.integers(0, 5))]:
            wrong = (right + int(self.random.integers(1, self.vocab))) % self.vocab
            pair = [wrong, right] if self.random.random() < 0.7 else [right, wrong]
            nodes += pair
            parents += [at, at]
            at = len(nodes) - 2 + pair.index(right)
        return TokenTree(tuple(nodes), tuple(parents))

    def observe(self, tree, step, scores):
        pass


@pytest.mark.parametrize("dialect", ["ort", "std"])
@pytest.mark.parametrize("case", tiny.CASES)
def test_every_family_writes_what_transformers_writes(case, dialect, tiny_model, bundle_of):
    """Greedy text past the sliding window, from a sealed bundle; then the same text with draft trees in fewer steps."""
    model, folder = tiny_model(case)
    right = reference(model, PROMPT, LENGTH)
    pipe = load(bundle_of(folder, dialect), task="text-generation", threads=1)
    result = pipe.generate(" ".join(f"t{token}" for token in PROMPT), max_new_tokens=LENGTH)
    assert list(result.prompt_tokens) == PROMPT
    assert list(result.tokens) == right
    verifier, decoding = open_verifier(bundle_of(folder, dialect), chunk=5)
    steps = list(
        generate(
            PROMPT,
            drafter=HalfRight([*PROMPT, *right], tiny.VOCAB),
            verifier=verifier,
            accept=partial(own_draw, draw=Sampling()),
            ends=decoding.eos,
            max_new_tokens=LENGTH,
        )
    )
    assert [token for step in steps for token in step.tokens] == right
    assert len(steps) < max(3, 0.8 * len(right))


@pytest.mark.parametrize("penalty", [1.0, 1.2])
@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_models_write_what_transformers_writes(name, penalty, bundle_of):
    """Real weights, real text, plain and with repetition penalty: same tokens, same characters, streamed or not."""
    folder = ROOT / "models" / name
    model = tiny.load_model(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = 'def read_lines(path, encoding="utf-8"):\n'
    pipe = load(bundle_of(folder), task="text-generation", threads=1)
    result = pipe.generate(prompt, max_new_tokens=48, temperature=0.0, repetition_penalty=penalty)
    ids = tokenizer(prompt)["input_ids"]
    assert list(result.prompt_tokens) == ids
    right = reference(model, ids, 48, repetition_penalty=penalty)
    assert list(result.tokens) == right
    assert result.text == tokenizer.decode(right, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    chunks = pipe.stream(prompt, max_new_tokens=48, temperature=0.0, repetition_penalty=penalty)
    assert "".join(chunk.text for chunk in chunks) == result.text


def test_sampled_text_does_not_depend_on_drafts(bundle_of):
    """Own-draw at a temperature: the text with draft trees is the text without, on a real graph."""
    path = bundle_of(ROOT / "models" / "pycode-draft")
    prompt = tuple(Tokenizer.from_file(path / "tokenizer" / "tokenizer.json").encode("class Stack:\n"))
    sampling = Sampling(temperature=0.9, top_p=0.95, seed=11)

    def text(drafter: Any) -> list[int]:
        verifier, _ = open_verifier(path)
        accept = partial(own_draw, draw=sampling)
        steps = generate(prompt, drafter=drafter, verifier=verifier, accept=accept, max_new_tokens=40)
        return [token for step in steps for token in step.tokens]

    plain = text(NoDraft())
    assert text(HalfRight([*prompt, *plain], 4000)) == plain


def test_text_needs_neither_torch_nor_an_exporter(bundle_of):
    """A bundle writes text where torch, transformers, onnx and edgekit's own exporter cannot be imported."""
    bundle = bundle_of(ROOT / "models" / "pycode-draft")
    script = f"""
import sys
for name in ("torch", "transformers", "diffusers", "onnx", "onnx_ir", "scipy", "edgekit.export", "edgekit.quant"):
    sys.modules[name] = None
from edgekit.runtime.tasks import load
from edgekit.runtime.tokenizer import Tokenizer
print(len(load({str(bundle)!r}, threads=1).generate("import os\\n", max_new_tokens=8).tokens))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "8", done.stderr


@pytest.mark.parametrize("dialect", ["ort", "std"])
def test_a_half_precision_cache_takes_the_same_feeds(dialect, tiny_model, bundle_of, tmp_path):
    """At fp16 biases and cache are halves: a chunked prompt past the window and a tree, near the fp32 rows."""
    from edgekit.export.language.export import export_language

    _, folder = tiny_model("gemma2")
    with new_bundle(tmp_path / "half.bundle") as draft:
        draft.seal(export_language(folder, draft.root, dialect=dialect, precision="fp16"))
    tokens = tuple((PROMPT * 6)[:40])
    tree = TokenTree((tokens[-1], 4, 9, 11), (-1, 0, 0, 2))
    rows = []
    for path in (bundle_of(folder, dialect), tmp_path / "half.bundle"):
        verifier, decoding = open_verifier(path, chunk=11)
        rows.append(verifier.score(tokens, tree).logits)
    assert decoding.kv.dtype == "float16"
    np.testing.assert_allclose(rows[1], rows[0], atol=0.02 * np.abs(rows[0]).max())


def test_a_long_prompt_in_chunks_is_a_long_prompt(bundle_of):
    """Prefill by the piece, across a growing cache, ends in the same text."""
    path = bundle_of(ROOT / "models" / "pycode-draft")
    tokenizer = Tokenizer.from_file(path / "tokenizer" / "tokenizer.json")
    ids = tuple(tokenizer.encode((ROOT / "edgekit" / "errors.py").read_text())[:500])
    rows = [open_verifier(path, chunk=chunk)[0].score(ids, TokenTree.chain(ids[-1])).logits[0] for chunk in (512, 37)]
    np.testing.assert_allclose(rows[0], rows[1], atol=2e-4 * np.abs(rows[0]).max())
