"""The promise, on the shipped pair: with any drafter, at any temperature, the text is that of plain decoding.

Token for token wherever no run has a lone row (exact mode). In the fast mode of a graph whose rows are equal up to
rounding, every difference must be one that this rounding can make.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit.export import build
from edgekit.runtime.backends import Array
from edgekit.runtime.llm.pipeline import TextPipeline
from edgekit.runtime.llm.probs import Sampling, gumbel, survivors
from edgekit.runtime.llm.speculation import DRAFTERS
from edgekit.runtime.llm.tree import TokenTree

MODELS = Path(__file__).resolve().parents[3] / "models"
NAMES = ("read_json", "Stack", "parse_line", "count_words", "open_file", "main", "to_hex", "merge", "Node", "walk_tree")
FORMS = (
    "def {0}(self, path, encoding='utf-8'):\n    ",
    "class {0}:\n    def __init__(self, items):\n        self.items = items\n",
    "import os\nimport sys\n\ndef {0}(values):\n    for value in values:\n        if",
    '    def {0}(self):\n        """Return the',
    "def {0}(a, b):\n    return a + b\n\ndef {0}_again(a, b):\n    return",
)
PROMPTS = tuple(form.format(name) for form in FORMS for name in NAMES)
SAMPLINGS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "T=0.7": {"temperature": 0.7},
    "T=1.3, top-p": {"temperature": 1.3, "top_p": 0.95},
}
DRAFTS = ("ngram", "corpus", "lookahead", "model", "hybrid", "auto")
PRECISIONS = ("fp32", "int8-row", "int4")
NEW = 24
Open = Callable[..., TextPipeline]
Tokens = tuple[int, ...]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """(precision, draft, exact) -> a pipeline on the shipped target; bundles and pipelines are made once."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "texts").mkdir()
    (folder / "texts" / "code.py").write_text("\n".join(PROMPTS) + "\n        return self.items\n" * 3)
    made: dict[Any, TextPipeline] = {}

    def bundle(model: str, precision: str) -> Path:
        path = folder / f"{model}-{precision}.bundle"
        if not path.exists():
            build.export(build.ExportRequest(MODELS / model, path, precision=precision), lambda _what, _share: None)
        return path

    def get(precision: str, draft: str = "none", exact: bool = True) -> TextPipeline:
        if (precision, draft, exact) not in made:
            small = str(bundle("pycode-draft", "fp32"))
            config: dict[str, Any] = {"model": small} if draft in ("model", "hybrid", "auto") else {}
            if draft not in ("none", "auto"):
                config["num_speculative_tokens"] = 4
            source = f"corpus:{folder / 'texts'}" if draft == "corpus" else draft
            made[precision, draft, exact] = edgekit.load(
                bundle("pycode", precision),
                task="text-generation",
                threads=1,
                draft=source,
                speculative_config=config or None,
                exact=exact,
            )
        return made[precision, draft, exact]

    return get


@pytest.fixture(scope="module")
def plain_texts(opened: Open) -> Callable[..., list[Tokens]]:
    """(precision, sampling, exact) -> the texts of plain decoding, drawn once."""
    return cache(lambda precision, sampling, exact: texts(opened(precision, exact=exact), SAMPLINGS[sampling]))


@pytest.fixture(scope="module")
def margin(opened: Open, plain_texts: Callable[..., list[Tokens]]) -> Callable[[str], float]:
    """precision -> the largest difference in logits between single steps and one run, along all greedy texts."""

    @cache
    def measure(precision: str) -> float:
        pipe, apart = opened(precision, exact=False), []
        for prompt, new in zip(PROMPTS, plain_texts(precision, "greedy", False), strict=True):
            text = (*pipe.tokenizer.encode(prompt), *new)
            start, verifier = len(text) - len(new), pipe.verifier
            rows = []
            for end in range(start, len(text)):
                rows.append(verifier.score(text[:end], TokenTree.chain(text[end - 1])).logits[0].copy())
                verifier.keep((0,))
            verifier.rollback(start - 1)
            whole = verifier.score(text[:start], TokenTree.chain(text[start - 1], text[start:-1])).logits
            verifier.rollback(start - 1)
            apart.append(np.abs(np.stack(rows) - whole).max())
        return float(max(apart))

    return measure


def texts(pipe: TextPipeline, sampling: dict[str, float]) -> list[Tokens]:
    """What a pipeline says after each prompt, every prompt with its own seed."""
    return [
        pipe.generate(prompt, max_new_tokens=NEW, seed=seed, **sampling).tokens  # type: ignore[arg-type]
        for seed, prompt in enumerate(PROMPTS)
    ]


def test_every_drafter_is_here():
    """The table of drafters has no row that this page leaves out."""
    assert set(DRAFTS) == {*DRAFTERS, "auto"} - {"none"}


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_drafts_change_no_token(opened, plain_texts, precision, draft, sampling):
    """Exact mode: fifty prompts, the same tokens as without drafts."""
    helped = opened(precision, draft)
    assert texts(helped, SAMPLINGS[sampling]) == plain_texts(precision, sampling, True)
    assert helped.speculator.stats(total=True).drafted > 0


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("draft", DRAFTS)
def test_what_differs_in_fast_mode_is_rounding(opened, plain_texts, margin, draft, sampling):
    """Fast int4: every difference is counted, and lies within the measured difference of the engine's own kernels."""
    plain, helped = opened("int4", exact=False), opened("int4", draft, exact=False)
    options = SAMPLINGS[sampling]
    pairs = list(zip(PROMPTS, plain_texts("int4", sampling, False), texts(helped, options), strict=True))
    apart = [(seed, *pair) for seed, pair in enumerate(pairs) if pair[1] != pair[2]]
    sys.stdout.write(f"{draft}, {sampling}: {len(apart)} of {len(PROMPTS)} texts differ; margin {margin('int4'):.3g}\n")
    assert len(apart) <= len(PROMPTS) // 2
    for seed, prompt, one, other in apart:
        place = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        text = (*plain.tokenizer.encode(prompt), *one[:place])
        row = plain.verifier.score(text, TokenTree.chain(text[-1])).logits[0]
        gap = apart_by(row, Sampling(**options, seed=seed), len(text), one[place], other[place])
        assert gap <= 2 * margin("int4"), (prompt, place)


def apart_by(row: Array, sampling: Sampling, position: int, one: int, other: int) -> float:
    """How much a row of logits would have to change for one token to be drawn instead of the other."""
    scale = sampling.temperature or 1.0
    scores = row.astype(np.float64)
    noisy = scores + (scale * gumbel(np.arange(len(scores)), sampling.seed, position) if sampling.temperature else 0)
    apart = abs(float(noisy[one] - noisy[other]))
    kept = survivors((row / np.float32(scale)).astype(np.float32), top_p=sampling.top_p)
    edge = scores[kept].min()  # a token next to the edge of the nucleus may come or go
    return min(apart, abs(scores[one] - edge), abs(scores[other] - edge)) if sampling.top_p < 1 else apart


def test_fp32_in_fast_mode_differs_in_no_token(opened, plain_texts):
    """The last bits of float32 decide no token of these texts: fast mode, with the model drafter, gives the same."""
    for sampling, options in SAMPLINGS.items():
        assert texts(opened("fp32", "model", exact=False), options) == plain_texts("fp32", sampling, False)
