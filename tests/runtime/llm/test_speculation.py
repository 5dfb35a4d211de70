"""From what was asked for to a drafter under its controller: every road, and every refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit.errors import BadRequest
from edgekit.export import build
from edgekit.runtime.llm import speculation
from edgekit.runtime.llm.drafters.by_text import ByTextDraft
from edgekit.runtime.llm.drafters.hybrid import HybridDraft
from edgekit.runtime.llm.drafters.model import ModelDraft
from edgekit.runtime.llm.probe import Invariance
from edgekit.runtime.llm.rules import RULES
from edgekit.runtime.llm.speculation import DRAFTERS, SpeculativeConfig, read_config

MODELS = Path(__file__).resolve().parents[3] / "models"
PROMPT = "def read_json(path):\n    with open(path) as f:\n"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """The shipped draft model, which here is target and draft."""
    path = tmp_path_factory.mktemp("small") / "small.bundle"
    build.export(build.ExportRequest(MODELS / "pycode-draft", path), lambda _what, _share: None)
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """The same model whose tokenizer knows one merge less, and so is another one."""
    source = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(MODELS / "pycode-draft", source)
    tokens = json.loads((source / "tokenizer.json").read_text())
    tokens["model"]["merges"].pop()
    (source / "tokenizer.json").write_text(json.dumps(tokens))
    path = source.with_name("other.bundle")
    build.export(build.ExportRequest(source, path), lambda _what, _share: None)
    return path


READ = {
    "none": ("none", None, {"method": "none"}),
    "auto": ("auto", None, {"method": "auto", "model": None}),
    "a row of the table": ("ngram", None, {"method": "ngram"}),
    "texts": ("corpus:a/b:c", None, {"method": "corpus", "documents": "a/b:c"}),
    "keys beside it": ("ngram", {"prompt_lookup_max": 5}, {"method": "ngram", "prompt_lookup_max": 5}),
    "keys alone": ("auto", {"method": "lookahead"}, {"method": "lookahead"}),
    "keys instead of none": ("none", {"method": "ngram"}, {"method": "ngram"}),
    "keys without a method": ("none", {"num_speculative_tokens": 4}, {"method": "auto"}),
}


@pytest.mark.parametrize("case", READ)
def test_what_is_asked_for_is_understood(case):
    """`draft` and the keys of vLLM say together what to do."""
    draft, options, wanted = READ[case]
    config = read_config(draft, options)
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_the_path_of_a_bundle_is_a_drafter(bundle):
    """A path means the model there."""
    config = read_config(str(bundle))
    assert (config.method, config.model) == ("model", str(bundle))


@pytest.mark.parametrize("method", [*DRAFTERS, "auto"])
@pytest.mark.parametrize("rule", RULES)
def test_every_method_goes_with_every_rule(method, rule):
    """No row of one table is refused because of a row of the other."""
    assert SpeculativeConfig(method=method, acceptance=rule).is_adaptive


def test_a_number_alone_is_kept_to():
    """As in vLLM; with `adaptive` it is the most, and without a number the controller decides."""
    assert not read_config("ngram", {"num_speculative_tokens": 4}).is_adaptive
    assert read_config("ngram", {"num_speculative_tokens": 4, "adaptive": True}).is_adaptive
    assert read_config("ngram").is_adaptive


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "method": ("auto", {"method": "psychic"}, "no drafter 'psychic'"),
    "rule": ("auto", {"acceptance": "generous"}, "no acceptance rule 'generous'"),
    "number": ("ngram", {"num_speculative_tokens": 65}, "between 1 and 64"),
    "lookup": ("ngram", {"prompt_lookup_min": 5, "prompt_lookup_max": 4}, "1 <= min <= max"),
    "key": ("ngram", {"n": 4}, "unknown field"),
    "contradiction": ("ngram", {"method": "corpus"}, "contradict"),
    "nobody chooses": ("ngram", {"adaptive": False}, "must say how many"),
    "option of another rule": ("ngram", {"posterior_alpha": 0.3}, "lossy-typical"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused(case):
    """With the name of the key and the legal values."""
    draft, options, words = REFUSED[case]
    with pytest.raises(BadRequest, match=words):
        read_config(draft, options)


def drafter(pipe):
    return pipe.speculator.drafter._drafter


def test_auto_is_the_best_there_is(bundle):
    """Without a draft model it copies; with one it does both."""
    assert drafter(edgekit.load(bundle, draft="auto")).name == "ngram"
    both = drafter(edgekit.load(bundle, draft="auto", speculative_config={"model": str(bundle)}))
    assert isinstance(both, HybridDraft)
    assert both.members == ("ngram", "model")


def test_a_draft_with_the_same_tokenizer_drafts_tokens(bundle):
    """And one that is its target is always right, so steps are as long as they may be."""
    config = {"model": str(bundle), "method": "model", "num_speculative_tokens": 5}
    pipe = edgekit.load(bundle, draft="auto", speculative_config=config, exact=True)
    assert isinstance(drafter(pipe), ModelDraft)
    pipe.generate(PROMPT, max_new_tokens=60, temperature=0.8)
    stats = pipe.speculator.stats()
    assert stats.acceptance[-1].rate > 0.97
    assert stats.tokens_per_verify > 5.5


def test_a_draft_with_another_tokenizer_drafts_text(bundle, other):
    """The fingerprints tell; the text is that of plain decoding all the same, and drafts are accepted."""
    config = {"model": str(other), "method": "model", "num_speculative_tokens": 4}
    pipe = edgekit.load(bundle, draft="auto", speculative_config=config, exact=True)
    assert isinstance(drafter(pipe), ByTextDraft)
    plain = edgekit.load(bundle, exact=True)
    assert pipe.generate(PROMPT, max_new_tokens=60).tokens == plain.generate(PROMPT, max_new_tokens=60).tokens
    assert pipe.speculator.stats().accepted > 20
    with pytest.raises(BadRequest, match="no probabilities"):
        edgekit.load(bundle, draft="auto", speculative_config={**config, "acceptance": "rejection"})


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_runs_on_a_real_pair(bundle, rule):
    """The shipped model with itself as a draft: the rule says what it promises, and greedy text is the same by all."""
    config = {"model": str(bundle), "method": "model", "num_speculative_tokens": 3, "acceptance": rule}
    pipe = edgekit.load(bundle, draft="auto", speculative_config=config, exact=True)
    plain = edgekit.load(bundle, exact=True).generate(PROMPT, max_new_tokens=30).tokens
    assert pipe.generate(PROMPT, max_new_tokens=30).tokens == plain
    result = pipe.generate(PROMPT, max_new_tokens=30, temperature=1.0)
    assert len(result.tokens) == 30
    told = result.stats.speculation
    assert told.lossless == (not rule.startswith("lossy"))
    assert told.disagreements == 0 or not told.lossless


def test_a_bundle_without_text_is_no_draft(bundle, tmp_path):
    """A file that is no bundle, and a bundle that is missing, are refused as such."""
    with pytest.raises(BadRequest, match="no drafter and no bundle"):
        edgekit.load(bundle, draft=str(tmp_path / "nowhere"))
    with pytest.raises(edgekit.errors.BundleError):
        edgekit.load(bundle, draft=str(tmp_path))


def test_outputs_that_the_graph_lacks_are_named(bundle, monkeypatch):
    """A drafter that reads hidden states is refused where the bundle has none."""

    class Reader:
        name, outputs = "reader", ("hidden.3",)

    monkeypatch.setitem(DRAFTERS, "none", lambda config, target: Reader())
    pipe = edgekit.load(bundle)
    with pytest.raises(BadRequest, match=r"hidden\.3"):
        pipe.speculate(SpeculativeConfig(method="none"))


def test_a_graph_whose_rows_depend_on_each_other_is_refused(bundle, monkeypatch):
    """As a verifier, and in exact mode; without drafts it may be used."""
    monkeypatch.setattr(speculation, "remembered", lambda kind, key, find: Invariance("dependent", 3.0))
    assert edgekit.load(bundle).generate(PROMPT, max_new_tokens=2).tokens
    for options in ({"draft": "ngram"}, {"exact": True}):
        with pytest.raises(BadRequest, match="cannot verify drafts"):
            edgekit.load(bundle, **options)


def test_exact_mode_promises_what_was_compared(bundle):
    """More rows than the probe looks at are refused, where they would be asked for at every step."""
    config = {"num_speculative_tokens": 16}
    assert edgekit.load(bundle, draft="ngram", speculative_config=config).speculator
    with pytest.raises(BadRequest, match="at most 15"):
        edgekit.load(bundle, draft="ngram", speculative_config=config, exact=True)


def test_what_takes_seconds_is_announced_once(bundle, monkeypatch, tmp_path):
    """The first load on a machine says what it measures, the second finds it."""
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path))
    told: list[str] = []
    edgekit.load(bundle, draft="ngram", report=told.append)
    assert [words.split()[0] for words in told] == ["looking", "measuring"]
    edgekit.load(bundle, draft="ngram", report=told.append)
    assert len(told) == 2


def test_exact_mode_is_refused_where_there_is_none(bundle, monkeypatch):
    """Rows equal up to rounding are good enough for drafts, and not for the promise of equal bits."""
    monkeypatch.setattr(
        speculation, "remembered", lambda kind, key, find: Invariance("rounding", 0.1) if kind is Invariance else find()
    )
    assert edgekit.load(bundle, draft="ngram").speculator.stats().invariance == "rounding"
    with pytest.raises(BadRequest, match="no exact mode"):
        edgekit.load(bundle, exact=True)


ENDS: dict[str, dict[str, Any]] = {
    "length": {"max_new_tokens": 23},
    "stop": {"max_new_tokens": 200, "stop": ["self."]},
    "eos or context": {"max_new_tokens": 2000, "temperature": 1.2, "seed": 5},
}


@pytest.mark.parametrize("case", ENDS)
def test_a_stream_is_the_same_chunk_by_chunk(bundle, case):
    """Texts, tokens, what is held back and the reason for the end do not depend on drafts; only the source does."""
    config = {"model": str(bundle), "method": "model", "num_speculative_tokens": 6}
    plain = edgekit.load(bundle, exact=True)
    helped = edgekit.load(bundle, draft="auto", speculative_config=config, exact=True)
    one, other = (list(pipe.stream("class A:\n", **ENDS[case])) for pipe in (plain, helped))
    assert [(c.text, c.tokens, c.finish_reason) for c in one] == [(c.text, c.tokens, c.finish_reason) for c in other]
    assert {c.source for c in one} == {None}
    assert {c.source.drafter for c in other if c.source} == {"model"}


def test_a_stream_left_early_spoils_nothing(bundle):
    """Half a draft may lie in the cache: the next text is that of a fresh start."""
    config = {"model": str(bundle), "method": "model", "num_speculative_tokens": 6}
    helped = edgekit.load(bundle, draft="auto", speculative_config=config, exact=True)
    fresh = edgekit.load(bundle, exact=True).generate(PROMPT, max_new_tokens=40, seed=2, temperature=0.7).tokens
    for count in (1, 4, 9):
        stream = helped.stream("class A:\n", max_new_tokens=50)
        for _ in range(count):
            next(stream)
        stream.close()
        assert helped.generate(PROMPT, max_new_tokens=40, seed=2, temperature=0.7).tokens == fresh


def test_a_step_is_one_run_of_the_target(bundle):
    """The token that corrects a draft is the root of the next tree: no second run, whatever is accepted."""
    pipe = edgekit.load(bundle, draft="lookahead", speculative_config={"num_speculative_tokens": 3})
    binding, runs = pipe.verifier._kv.binding, []
    original = binding.run
    binding.run = lambda feeds, into=None: runs.append(feeds["input_ids"].shape[1]) or original(feeds, into)
    pipe.generate(PROMPT, max_new_tokens=60)
    stats = pipe.speculator.stats()
    assert 0 < stats.accepted < stats.drafted
    assert len(runs) == stats.steps + 1  # and one for the prompt
    assert sum(runs[1:]) == pytest.approx(stats.rows_per_token * stats.tokens)
