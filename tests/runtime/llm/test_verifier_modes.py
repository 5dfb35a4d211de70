"""Exact mode, extra outputs, prefixes and forks of a verifier."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from edgekit.bundle.manifest import TensorSpec
from edgekit.runtime.backends.fake import FakeSession
from edgekit.runtime.llm.accept import own_draw
from edgekit.runtime.llm.drafters import NoDraft
from edgekit.runtime.llm.generate import generate
from edgekit.runtime.llm.prefix import PrefixStore
from edgekit.runtime.llm.probs import Sampling
from edgekit.runtime.llm.tree import TokenTree
from edgekit.runtime.llm.verifier import LocalVerifier
from tests.runtime.llm.fake_lm import FakeLM, greedy_text, logits_after

TEXT = (3, 1, 4, 1, 5, 9, 2, 6)


class LoneRowsDiffer(FakeLM):
    """An engine whose kernels for one row round otherwise, in the body and in the head, as ONNX Runtime's do."""

    def answer(self, feeds):
        results = super().answer(feeds)
        if feeds["input_ids"].shape[1] == 1 or len(feeds["rows"]) == 1:
            results["logits"] = results["logits"] + np.float32(100)
        return results


class HiddenLM(FakeLM):
    """The fake model with a second output: the sum of the tokens a row sees, and its own token."""

    def session(self, *, live=True):
        plain = super().session(live=live)
        hidden = TensorSpec("hidden.0", "float32", (1, "rows", 2))
        return FakeSession(self.answer, plain.inputs, [*plain.outputs, hidden], live=live)

    def answer(self, feeds):
        results = super().answer(feeds)
        keys, bias = results["present.0.key"][0, 0], feeds["attention_bias"][0, 0]
        rows = [(float(keys[: len(b)][b == 0, 0].sum() - (b == 0).sum())) for b in bias[feeds["rows"]]]
        own = feeds["input_ids"][0, feeds["rows"]]
        return results | {"hidden.0": np.stack([rows, own], axis=-1).astype(np.float32)[None]}


@pytest.mark.parametrize("dialect", ["ort", "std", "concat"])
@pytest.mark.parametrize("chunk", [2, 3, 512])
def test_filled_runs_have_no_lone_row(dialect, chunk):
    """Prefill, single steps, chains and the last position but one: every row comes from a run of two or more."""
    lm = LoneRowsDiffer(dialect, context=len(TEXT) + 3)
    verifier = LocalVerifier(lm.session(), lm.decoding, chunk=chunk, granule=2)
    tokens = TEXT
    for drafts in ((), (7,), ()):
        tree = TokenTree.chain(tokens[-1], drafts[: lm.decoding.context_length - len(tokens) - 1])
        scores = verifier.score(tokens, tree)
        for node in range(len(tree)):
            np.testing.assert_array_equal(scores.logits[node], logits_after([*tokens, *tree.tokens[1 : node + 1]]))
        verifier.keep((0,))
        tokens += (7,)


@pytest.mark.parametrize("granule", [2, 3, 8])
def test_every_run_is_a_multiple_of_the_granule(granule):
    """Tokens fed and rows asked for, for prompts, chains and trees of every size; the rows are those asked for."""
    lm, sizes = FakeLM(), []
    session = lm.session()

    def answer(feeds):
        sizes.append((feeds["input_ids"].shape[1], len(feeds["rows"])))
        return lm.answer(feeds)

    session._answer = answer
    verifier, tokens = LocalVerifier(session, lm.decoding, chunk=5, granule=granule), TEXT
    for count in range(9):
        tree = TokenTree((tokens[-1], *range(count)), (-1, *(node // 2 for node in range(count))))
        scores = verifier.score(tokens, tree)
        for node in range(len(tree)):
            path = [node]
            while path[0]:
                path.insert(0, tree.parents[path[0]])
            text = [*tokens, *(tree.tokens[step] for step in path[1:])]
            np.testing.assert_array_equal(scores.logits[node], logits_after(text))
        verifier.keep((0,))
        tokens += (7,)
    assert all(fed % granule == made % granule == 0 for fed, made in sizes)


def test_without_a_granule_a_lone_row_is_run_alone():
    """The default pays for no second row; the fake engine shows that it would be seen."""
    lm = LoneRowsDiffer()
    logits = LocalVerifier(lm.session(), lm.decoding).score(TEXT, TokenTree.chain(TEXT[-1])).logits
    np.testing.assert_allclose(logits[0], logits_after(TEXT) + 100, rtol=1e-6)


def test_exact_text_is_the_models_own():
    """The whole loop in exact mode, on the engine whose lone rows are wrong."""
    lm = LoneRowsDiffer()
    verifier = LocalVerifier(lm.session(), lm.decoding, granule=2)
    accept = partial(own_draw, draw=Sampling())
    steps = generate(TEXT, drafter=NoDraft(), verifier=verifier, accept=accept, max_new_tokens=25)
    assert [token for step in steps for token in step.tokens] == greedy_text(TEXT, 25)


@pytest.mark.parametrize("dialect", ["ort", "std"])
@pytest.mark.parametrize("granule", [1, 2, 8])
def test_extra_outputs_come_with_the_rows(dialect, granule):
    """Each node finds its own row of every other output, also where a tree meets an empty cache in two runs."""
    lm = HiddenLM(dialect)
    verifier = LocalVerifier(lm.session(), lm.decoding, granule=granule)
    assert verifier.extra == ("hidden.0",)
    tree = TokenTree((TEXT[-1], 7, 8, 2), (-1, 0, 0, 1))
    for _ in range(2):  # on the empty cache, then on a full one
        hidden = verifier.score(TEXT, tree).extra["hidden.0"]
        sums = [sum(TEXT), sum(TEXT) + 7, sum(TEXT) + 8, sum(TEXT) + 9]
        assert hidden.tolist() == [[total, token] for total, token in zip(sums, tree.tokens, strict=True)]
        verifier.keep((0,))


def test_a_fork_goes_its_own_way():
    """Two verifiers from one prefix: each keeps its own text, and neither computes the prefix again."""
    lm = FakeLM()
    session = lm.session()
    first = LocalVerifier(session, lm.decoding)
    first.score(TEXT, TokenTree.chain(TEXT[-1]))
    first.keep((0,))
    second = first.fork()
    for verifier, token in ((first, 7), (second, 8), (first, 7), (second, 8)):
        tokens = (*TEXT, token)
        logits = verifier.score(tokens, TokenTree.chain(token)).logits
        np.testing.assert_array_equal(logits[0], logits_after(tokens))
    assert session.runs == 5
    assert first.cached == second.cached == TEXT


@pytest.mark.parametrize("live", [True, False])
def test_a_stored_prefix_is_not_computed_again(live):
    """What one verifier remembered, another begins from; the rest of the text is computed as ever."""
    lm, store = FakeLM(), PrefixStore(1 << 20)
    teacher = LocalVerifier(lm.session(live=live), lm.decoding, prefixes=store)
    teacher.score(TEXT, TokenTree.chain(TEXT[-1]))
    teacher.keep((0,))
    teacher.remember()
    pupil = LocalVerifier(lm.session(live=live), lm.decoding, prefixes=store)
    tokens = (*TEXT[:6], 7, 7)
    assert pupil.recall(tokens) == 6
    np.testing.assert_array_equal(pupil.score(tokens, TokenTree.chain(7)).logits[0], logits_after(tokens))
    assert pupil.recall(TEXT) == len(TEXT) - 1  # never the last token: its row is what the next score is for
