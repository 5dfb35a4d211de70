"""Two drafters in one: who is asked when, who is told, and the same text as ever."""

from __future__ import annotations

from math import log, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import BadRequest
from edgekit.runtime.llm.accept import Accepted
from edgekit.runtime.llm.drafters import Ask, NoDraft
from edgekit.runtime.llm.drafters.hybrid import HybridDraft
from edgekit.runtime.llm.drafters.model import ModelDraft
from edgekit.runtime.llm.drafters.ngram import NgramDraft
from edgekit.runtime.llm.probs import Sampling
from edgekit.runtime.llm.tree import Shape, Source, TokenTree
from edgekit.runtime.llm.verifier import LocalVerifier
from tests.runtime.llm.drafters.copying import ASKS, BUSH, Rule, assert_fits, steps, text
from tests.runtime.llm.drafters.drafting import OtherLM, shapes
from tests.runtime.llm.fake_lm import VOCAB, FakeLM, greedy_text

PROMPT = (3, 1, 4, 1, 5)
CHAIN = Ask(Shape.chain(4))


class Fixed:
    """Proposes the same every time, and remembers what it was asked and told."""

    def __init__(self, name: str, drafts=(), log_q=(), outputs: tuple[str, ...] = ()) -> None:
        self.name, self.outputs = name, outputs
        self.drafts, self.log_q = drafts, log_q
        self.asked: list[tuple] = []
        self.told: list[tuple] = []

    def propose(self, tokens, ask):
        self.asked.append((tokens, ask.shape, ask.sampling, ask.room))
        return TokenTree.chain(tokens[-1], self.drafts, self.log_q, Source(self.name))

    def observe(self, tree, step, scores):
        self.told.append((tree, step, scores))


def bush(tokens, log_q) -> TokenTree:
    """A tree of siblings with these log-probabilities."""
    count = len(log_q)
    return TokenTree((tokens[-1], *range(count)), (-1, *[0] * count), (0.0, *log_q))


@pytest.mark.parametrize(
    ("probability", "sure", "used"),
    [
        (0.75, 0.75, "first"),
        (0.7499, 0.75, "second"),
        (1.0, 1.0, "first"),
        (0.9999, 1.0, "second"),
        (1e-9, 0.0, "first"),
        (0.8, 0.5, "first"),
    ],
)
def test_the_first_is_used_where_it_is_sure(probability, sure, used):
    """At least the probability asked for, of the first draft alone, however unlikely the ones after it are."""
    first, second = Fixed("first", (1, 2), (log(probability), -30.0)), Fixed("second", (3,), (-9.0,))
    tree = HybridDraft(first, second, sure=sure).propose((7, 8), CHAIN)
    assert tree == (first if used == "first" else second).propose((7, 8), CHAIN)
    assert {source.drafter for source in tree.sources} == {used}


@pytest.mark.parametrize("matched", range(1, 7))
def test_one_over_what_an_ngram_matched_is_what_is_left_to_doubt(matched):
    """An n-gram that stood once before is sure of m / (m + 1), so 0.75 asks for three tokens, whatever the rounding."""
    text_now = (*range(20, 20 + matched), 5, 6, *range(20, 20 + matched))
    second = Fixed("second", (3,), (-9.0,))
    for needed in range(1, 7):
        hybrid = HybridDraft(NgramDraft(shortest=1), second, sure=needed / (needed + 1))
        used = hybrid.propose(text_now, CHAIN).sources[1].drafter
        assert used == ("ngram" if matched >= needed else "second")


def test_the_second_is_not_asked_while_the_first_is_sure():
    """Precedence: the first every time, the second only for a text where the first is not sure."""
    first, second = Fixed("first", (1,), (log(0.9),)), Fixed("second", (2,), (0.0,))
    hybrid = HybridDraft(first, second)
    hybrid.propose((7,), CHAIN)
    assert (len(first.asked), len(second.asked)) == (1, 0)
    first.log_q = (log(0.5),)
    ask = Ask(Shape.chain(2), Sampling(temperature=0.5, seed=3), room=9)
    assert hybrid.propose((7, 8), ask).tokens == (8, 2)
    assert first.asked[-1] == second.asked[-1] == ((7, 8), ask.shape, ask.sampling, 9)
    assert len(second.asked) == 1


def test_each_may_be_asked_for_a_shape_of_its_own():
    """Shapes by name go to the two they name, the common one to whoever is not named."""
    ask = Ask(Shape.chain(4), room=9, shapes={"first": Shape.chain(7), "third": BUSH})
    cases = {("first", "second"): (Shape.chain(7), Shape.chain(4)), ("x", "third"): (Shape.chain(4), BUSH)}
    for names, wanted in cases.items():
        two = [Fixed(name) for name in names]
        HybridDraft(*two).propose((7,), ask)
        assert [drafter.asked for drafter in two] == [[((7,), shape, ask.sampling, 9)] for shape in wanted]


@pytest.mark.parametrize("log_q", [(), (nan,), (log(0.3),)])
def test_the_unsure_tree_of_the_first_is_used_where_the_second_has_none(log_q):
    """A guess without a probability, or with a small one, is better than no guess."""
    first, second = Fixed("first", (1,), log_q), Fixed("second")
    hybrid = HybridDraft(first, second)
    assert hybrid.propose((7,), CHAIN).tokens == (7, 1)
    assert len(second.asked) == 1
    second.drafts, second.log_q = (4,), ()
    assert hybrid.propose((7,), CHAIN).tokens == (7, 4)


def test_neither_has_a_guess():
    """The root alone, as ordinary decoding wants it."""
    tree = HybridDraft(Fixed("first"), Fixed("second"), sure=0.0).propose((7,), CHAIN)
    assert (tree.tokens, tree.parents) == ((7,), (-1,))


def test_the_best_sibling_counts():
    """The first draft that is likeliest decides, wherever it stands among its siblings; deeper nodes do not."""
    first, second = Fixed("first"), Fixed("second", (9,), (0.0,))
    for log_q, used in (((log(0.1), log(0.8)), True), ((log(0.5), log(0.4)), False)):
        first.propose = lambda tokens, ask, log_q=log_q: bush(tokens, log_q)
        assert (HybridDraft(first, second).propose((7,), CHAIN).tokens == (7, 0, 1)) == used
    first.propose = lambda tokens, ask: TokenTree((7, 1, 2), (-1, 0, 1), (0.0, log(0.2), log(0.99)))
    assert HybridDraft(first, second).propose((7,), CHAIN).tokens == (7, 9)


def test_outputs_are_those_of_both_and_both_hear():
    """The verifier is asked for what either reads; every outcome reaches both, whoever drafted."""
    first, second = Fixed("first", (1,), (0.0,), ("hidden.1",)), Fixed("second", (2,), (0.0,), ("hidden.2", "hidden.3"))
    hybrid = HybridDraft(first, second)
    assert hybrid.outputs == ("hidden.1", "hidden.2", "hidden.3")
    assert HybridDraft(NoDraft(), NgramDraft()).outputs == ()
    assert hybrid.name == "hybrid"
    tree = hybrid.propose((7,), CHAIN)
    outcome = tree, Accepted((0, 1), (1, 6)), Rule(lambda context: 0, 9).score((7,), tree)
    hybrid.observe(*outcome)
    assert first.told == second.told == [outcome]


@pytest.mark.parametrize("sure", [-0.01, 1.01, nan])
def test_what_is_no_probability_is_refused(sure):
    """Below 0, above 1, or no number."""
    with pytest.raises(BadRequest, match="sure"):
        HybridDraft(NoDraft(), NoDraft(), sure=sure)


# -------------------------------------------------------------------------------------------------- the text


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("sure", [0.0, 0.6, 1.0])
def test_the_text_is_that_without_drafts(temperature, ask, sure):
    """Greedy and sampled, for chains and trees, with copies first and a model second."""
    sampling, prompt = Sampling(temperature=temperature, top_p=0.95, seed=7), (3, 1, 4, 3, 1, 4, 3, 1)
    plain = text(steps(NoDraft(), FakeLM().verifier(), prompt, 40, Ask(), sampling))
    hybrid = HybridDraft(NgramDraft(shortest=1), ModelDraft(OtherLM().verifier(), stop_below=0.01), sure=sure)
    ask = ask._replace(sampling=sampling)
    done = steps(hybrid, FakeLM().verifier(), prompt, 40, ask, sampling)
    assert text(done) == plain
    assert ask.shape.depth == 0 or len(done) < 40
    assert temperature or plain == greedy_text(prompt, 40)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), shapes(), st.sampled_from([0.0, 1.0]), st.floats(0, 1), st.booleans())
def test_the_text_is_the_same_with_any_two(seed, shape, temperature, sure, swapped):
    """Either order, any threshold, a sliding target and two requests in a row."""
    lm, sampling = FakeLM(window=2), Sampling(temperature=temperature, seed=seed)
    two = [NgramDraft(longest=4, shortest=1), ModelDraft(OtherLM(window=2).verifier(), rows=True)]
    hybrid = HybridDraft(*(two[::-1] if swapped else two), sure=sure)
    for prompt in (PROMPT, (seed % VOCAB,)):
        plain = text(steps(NoDraft(), lm.verifier(), prompt, 20, Ask(), sampling))
        assert text(steps(hybrid, lm.verifier(), prompt, 20, Ask(shape, sampling), sampling)) == plain


def test_sources_say_which_of_the_two_it_was():
    """In a text that repeats itself the model drafts through the first period and the copies from then on."""

    class Cycle(OtherLM):
        def answer(self, feeds):
            ends = feeds["input_ids"][0][feeds["rows"]]
            return {**super().answer(feeds), "logits": 50 * np.eye(VOCAB, dtype=np.float32)[None, (ends + 1) % VOCAB]}

    hybrid = HybridDraft(NgramDraft(), ModelDraft(Cycle().verifier()))
    done = steps(hybrid, Rule(lambda context: (context[-1] + 1) % VOCAB, VOCAB), (3,), 60, CHAIN)
    names = ["".join(source.drafter[0] if source else "-" for source in step.sources) for step in done]
    assert names == ["mmmm-"] * 3 + ["nnnn-"] * 9


def test_a_draft_model_catches_up_in_one_run():
    """While copies are used the model is not run; when its turn comes all it missed is fed at once."""
    lm, fed = OtherLM(), []
    session = lm.session()
    answer = session._answer
    session._answer = lambda feeds: fed.append(feeds["input_ids"].shape[1]) or answer(feeds)
    first = Fixed("first")
    hybrid = HybridDraft(first, ModelDraft(LocalVerifier(session, lm.decoding)))
    hybrid.propose(PROMPT, Ask(Shape.chain(2)))
    assert fed == [5, 1]
    first.drafts, first.log_q = (1, 2), (0.0, 0.0)
    grown = tuple((token + 1) % VOCAB for token in range(9))
    for size in range(9):
        hybrid.propose((*PROMPT, *grown[:size]), CHAIN)
    assert fed == [5, 1]
    first.drafts, first.log_q = (), ()
    tree = hybrid.propose((*PROMPT, *grown), Ask(BUSH))
    assert fed[2] in (8, 9)  # but for a first draft of its own that happened to stand
    assert_fits(tree, Ask(BUSH))
    assert tree == ModelDraft(OtherLM().verifier()).propose((*PROMPT, *grown), Ask(BUSH))
