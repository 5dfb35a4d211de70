"""A draft model: the tree a slow draft would grow, the text of plain decoding, and no run too many."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import exp, inf, log

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgekit.errors import BadRequest
from edgekit.runtime.llm.drafters import Ask, NoDraft
from edgekit.runtime.llm.drafters.model import ModelDraft
from edgekit.runtime.llm.probs import Sampling, gumbel
from edgekit.runtime.llm.tree import Shape, Source
from edgekit.runtime.llm.verifier import LocalVerifier
from tests.runtime.llm.drafters.copying import ASKS, BUSH, assert_fits, steps, text
from tests.runtime.llm.drafters.drafting import OtherLM, paths, shapes
from tests.runtime.llm.fake_lm import VOCAB, FakeLM, greedy_text

PROMPT = (3, 1, 4, 1, 5)
CHAIN = Ask(Shape.chain(4))
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12).map(tuple)
LOUD = Sampling(temperature=1.0)
SAMPLINGS = {
    "greedy": Sampling(),
    "penalised": Sampling(repetition_penalty=1.3),
    "sampled": Sampling(temperature=0.8, seed=5),
    "hot": Sampling(temperature=3.0, seed=2**63 + 11),
    "filtered": Sampling(temperature=1.2, top_k=6, top_p=0.9, min_p=0.02, repetition_penalty=1.2, seed=9),
}


def ranking(row, context, sampling, *, rows):
    """Tokens and log-probabilities, best noisy score first, from the definitions."""
    scores = row.astype(np.float64)
    for token in set(context) if sampling.repetition_penalty != 1 else ():
        scores[token] *= sampling.repetition_penalty ** (1 if scores[token] < 0 else -1)
    sampled = sampling.temperature > 0
    heat = sampling.temperature if sampled else 1.0
    noise = gumbel(np.arange(len(row)), sampling.seed, len(context)) if sampled else 0
    chances = (scores if rows and sampled else row.astype(np.float64)) / heat
    chances -= np.log(np.exp(chances).sum())
    return [(int(token), float(chances[token])) for token in np.argsort(-(scores / heat + noise), kind="stable")]


def twin(lm: OtherLM, tokens, ask: Ask, width: int, *, stop_below: float, rows: bool):
    """(path, log q) of every node, level by level: a draft without a cache that computes every row from scratch."""
    below = [[] for _ in ask.shape.parents]
    for place, (parent, rank) in enumerate(zip(ask.shape.parents, ask.shape.ranks, strict=True)):
        if parent >= 0:
            below[parent].append((rank, place))
    found, front = [((), 0.0)], [(0, (), 0.0)]
    for _ in range(ask.room if max(tokens) < lm.width else 0):
        level = []
        for place, path, reach in front:
            ranked = ranking(lm.after((*tokens, *path))[:width], (*tokens, *path), ask.sampling, rows=rows)
            for rank, child in sorted(below[place]):
                if rank < len(ranked):
                    token, log_q = ranked[rank]
                    found.append(((*path, token), log_q))
                    if reach + log_q >= (log(stop_below) if stop_below else -inf):
                        level.append((child, (*path, token), reach + log_q))
        front = level
    return found


@settings(max_examples=150, deadline=None)
@given(
    TOKENS,
    st.builds(Ask, shapes(), st.sampled_from([*SAMPLINGS.values()][:4]), st.integers(0, 6)),
    st.sampled_from([5, VOCAB, 20]),
    st.sampled_from([0.0, 0.03, 0.2, 1.0]),
    st.booleans(),
    st.sampled_from([("ort", None, True), ("ort", 3, False), ("std", 3, True), ("std", None, False)]),
)
@example((3, 1), Ask(BUSH, LOUD, 6), 20, 0.0, True, ("ort", None, True))
@example((3, 1), Ask(Shape((-1, *[0] * 7), (0, *range(7))), LOUD, 6), 5, 0.0, False, ("ort", None, True))
def test_the_tree_is_that_of_a_draft_without_a_cache(tokens, ask, width, stop_below, rows, graph):
    """Every shape, chains and single nodes among them: tokens, order, log-probabilities, laws and where it stops."""
    dialect, window, live = graph
    lm = OtherLM(width, dialect=dialect, window=window)
    draft = ModelDraft(lm.verifier(live=live), vocabulary=VOCAB, stop_below=stop_below, rows=rows)
    tree = draft.propose(tokens, ask)
    right = twin(lm, tokens, ask, VOCAB, stop_below=stop_below, rows=rows)
    assert tree.tokens[0] == tokens[-1]
    assert paths(tree) == [path for path, _ in right]
    assert tree.log_q == pytest.approx([log_q for _, log_q in right], abs=1e-4)
    assert set(tree.sources) == {Source("model")}
    assert_fits(tree, ask)
    assert (tree.q is not None) == (rows and ask.sampling.temperature > 0 and len(tree) > 1)
    if tree.q is not None:
        assert tree.q.shape == (len(tree), VOCAB)
        for node, path in enumerate(paths(tree)):
            context = (*tokens, *path)
            law = ask.sampling.law(lm.after(context)[:VOCAB], context)
            padded = np.pad(law, (0, VOCAB - len(law))) * bool(tree.children(node))
            np.testing.assert_allclose(tree.q[node], padded, atol=1e-12)


# -------------------------------------------------------------------------------------------------- the text


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_text_is_that_without_drafts(sampling, ask):
    """Greedy and sampled, for chains and trees, with a draft that is right about half of the time."""
    sampling = SAMPLINGS[sampling]
    plain = text(steps(NoDraft(), FakeLM().verifier(), PROMPT, 40, Ask(), sampling))
    draft = ModelDraft(OtherLM(20).verifier(), vocabulary=VOCAB, stop_below=0.01)
    ask = ask._replace(sampling=sampling)
    done = steps(draft, FakeLM().verifier(), PROMPT, 40, ask, sampling)
    assert text(done) == plain
    assert ask.shape.depth == 0 or len(done) < 40
    if sampling == Sampling():
        assert plain == greedy_text(PROMPT, 40)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32),
    shapes(),
    st.sampled_from([0.0, 0.8, 1.5]),
    st.sampled_from([5, VOCAB, 20]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([None, 2]),
    st.booleans(),
)
def test_the_text_is_the_same_with_any_model(seed, shape, temperature, width, likeness, window, live):
    """Other windows, vocabularies and minds, and one drafter over two requests whose noise it is not always told."""
    sampling = Sampling(temperature=temperature, repetition_penalty=1.1, seed=seed)
    lm = FakeLM(window=3)
    draft = ModelDraft(OtherLM(width, likeness, window=window).verifier(live=live), vocabulary=VOCAB)
    for prompt, told in ((PROMPT, sampling), ((*PROMPT[:3], seed % VOCAB), Sampling(temperature=0.3))):
        plain = text(steps(NoDraft(), lm.verifier(), prompt, 20, Ask(), sampling))
        assert text(steps(draft, lm.verifier(), prompt, 20, Ask(shape, told), sampling)) == plain


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(
    "shape", [Shape.chain(4), Shape((-1, 0, 0, 1, 1, 2, 3, 5, 6, 6), (0, 0, 1, 0, 1, 0, 0, 0, 0, 1))]
)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_draft_that_is_its_target_is_always_right(sampling, shape, rows):
    """It draws with the target's own noise: at any temperature each step gives the whole depth and one token more."""
    sampling = SAMPLINGS[sampling]
    draft = ModelDraft(FakeLM().verifier(), rows=rows)
    done = steps(draft, FakeLM().verifier(), PROMPT, 50, Ask(shape, sampling), sampling)
    assert [len(step.tokens) for step in done] == [5] * 10
    assert done[0].sources == (*[Source("model")] * 4, None)


def test_other_noise_is_guessing():
    """With the noise of another seed the same draft is often wrong: the coupling is what makes it right."""
    sampling = Sampling(temperature=3.0, seed=1)
    other = CHAIN._replace(sampling=replace(sampling, seed=2))
    assert len(steps(ModelDraft(FakeLM().verifier()), FakeLM().verifier(), PROMPT, 50, other, sampling)) > 20


# -------------------------------------------------------------------------------------------------- its limits


@pytest.mark.parametrize("shape", [Shape.chain(4), BUSH])
def test_a_context_smaller_than_the_text(shape):
    """Trees get smaller towards the end of the draft's context, after it there are none, and the text stays right."""
    lm, right = OtherLM(context=14), greedy_text(PROMPT, 25)
    draft = ModelDraft(lm.verifier())
    assert text(steps(draft, FakeLM().verifier(), PROMPT, 25, Ask(shape))) == right
    known, ask = (*PROMPT, *right), Ask(shape)
    for size in range(8, 20):
        tree, whole = draft.propose(known[:size], ask), ModelDraft(OtherLM().verifier()).propose(known[:size], ask)
        assert set(paths(tree)) <= set(paths(whole))
        assert max(tree.depths) <= max(0, min(shape.depth, 15 - size))
        assert any(shape.ranks) or len(tree) == 1 + max(0, min(4, 15 - size))
        assert (len(tree) == 1) == (size > 14)


@pytest.mark.parametrize("size", range(9, 17))
def test_a_bush_fills_the_context_and_no_more(size):
    """A tree with more nodes than the draft's context has slots is cut instead of refused."""
    tokens = (*PROMPT, *greedy_text(PROMPT, 20))[:size]
    wide = Shape((-1, *[0] * 5, *range(1, 6), *range(6, 11)), (0, *range(5), *[0] * 10))
    tree = ModelDraft(OtherLM(context=16).verifier()).propose(tokens, Ask(wide))
    grown = sum(1 for node in range(1, len(tree)) if tree.children(node))
    assert len(tree) == 6 + grown
    assert grown == min(10, 16 - size)


def test_a_wider_draft_proposes_only_what_the_target_knows():
    """Ids beyond the target's vocabulary are left out, however likely."""

    class Beyond(OtherLM):
        def own(self, row):
            return super().own(row) + np.where(np.arange(self.width) < VOCAB, 0, 20).astype(np.float32)

    draft = ModelDraft(Beyond(20).verifier(), vocabulary=VOCAB, rows=True)
    for sampling in SAMPLINGS.values():
        tree = draft.propose(PROMPT, Ask(BUSH, sampling))
        assert len(tree) == len(BUSH.parents)
        assert max(tree.tokens) < VOCAB
        assert sampling.temperature == 0 or tree.q.sum(axis=1) == pytest.approx(
            [float(bool(tree.children(node))) for node in range(len(tree))]
        )


def test_a_narrower_draft_is_silent_after_ids_it_does_not_know():
    """With an id outside its vocabulary in the text nothing is proposed; it is back with a text that it knows."""
    draft = ModelDraft(OtherLM(5).verifier(), vocabulary=VOCAB)
    for tokens, known in (((1, 2, 3), True), ((1, 2, 7), False), ((1, 2, 7, 3), False), ((1, 2, 4), True)):
        assert (len(draft.propose(tokens, CHAIN)) == 5) == known
        assert known or draft.propose(tokens, CHAIN).tokens == tokens[-1:]


@pytest.mark.parametrize(
    ("stop_below", "drafts"), [(0.0, 6), (0.1, 5), (0.21, 4), (0.3, 3), (0.59, 2), (0.61, 1), (1.0, 1)]
)
def test_drafting_stops_below_a_probability(stop_below, drafts):
    """After a node whose whole way is less probable nothing is drafted; a node of 0.6 each time, six of them asked."""

    class Constant(OtherLM):
        def own(self, row):
            return np.log(np.array([0.1, 0.6, 0.3], np.float32))

    lm = Constant(3)
    session = lm.session()
    draft = ModelDraft(LocalVerifier(session, lm.decoding), stop_below=stop_below)
    tree = draft.propose((0, 2), Ask(Shape.chain(6)))
    assert tree.tokens == (2, *[1] * drafts)
    assert session.runs == drafts
    assert [exp(log_q) for log_q in tree.log_q[1:]] == pytest.approx([0.6] * drafts)


@pytest.mark.parametrize("stop_below", [-0.1, 1.5, float("nan")])
def test_what_is_no_probability_is_refused(stop_below):
    """Below 0, above 1, or no number."""
    with pytest.raises(BadRequest, match="stop_below"):
        ModelDraft(FakeLM().verifier(), stop_below=stop_below)


def test_nothing_asked_is_the_root_alone():
    """No shape or no room: no run of the draft either."""
    lm = FakeLM()
    session = lm.session()
    draft = ModelDraft(LocalVerifier(session, lm.decoding), rows=True)
    for ask in (Ask(), Ask(BUSH, room=0), Ask(BUSH, LOUD, 0)):
        tree = draft.propose(PROMPT, ask)
        assert (tree.tokens, tree.parents, tree.q) == ((5,), (-1,), None)
    assert session.runs == 0
    assert (draft.name, draft.outputs) == ("model", ())


# -------------------------------------------------------------------------------------------------- its runs


def counted(lm: FakeLM, live: bool = True) -> tuple[LocalVerifier, list[int]]:
    """A verifier, and the list of how many tokens each of its runs was fed."""
    fed: list[int] = []
    session = lm.session(live=live)
    answer = session._answer
    session._answer = lambda feeds: fed.append(feeds["input_ids"].shape[1]) or answer(feeds)
    return LocalVerifier(session, lm.decoding), fed


def test_a_step_costs_one_run_per_draft_and_none_for_the_targets_own_token():
    """The token the target drew, and a last draft that stood, are fed with the first run of the next tree."""
    verifier, fed = counted(FakeLM())
    draft = ModelDraft(verifier)
    drafts = draft.propose(PROMPT, CHAIN).tokens[1:]
    assert fed == [5, 1, 1, 1]
    fed.clear()
    tokens = (*PROMPT, *drafts)
    draft.propose((*tokens, 7), CHAIN)  # all stood
    assert fed == [2, 1, 1, 1]
    fed.clear()
    wrong = (drafts[2] + 1) % VOCAB
    draft.propose((*PROMPT, *drafts[:2], wrong), CHAIN)  # two stood
    assert fed == [1, 1, 1, 1]
    fed.clear()
    draft.propose((*PROMPT, *drafts[:2], wrong), CHAIN)  # asked again
    assert fed == [1, 1, 1, 1]


@settings(max_examples=60, deadline=None)
@given(
    TOKENS.filter(lambda tokens: len(tokens) > 1),
    shapes(),
    st.integers(0, 6),
    st.sampled_from(["ort", "std"]),
    st.booleans(),
)
def test_a_tree_costs_one_run_per_level(tokens, shape, room, dialect, live):
    """As many runs as the tree is deep, whatever its width, also after another text of at least two tokens."""
    verifier, fed = counted(OtherLM(dialect=dialect), live)
    draft = ModelDraft(verifier)
    for text_now in (tokens, (*tokens, 3), tokens[:2]):
        fed.clear()
        tree = draft.propose(text_now, Ask(shape, room=room))
        assert len(fed) == max(tree.depths) == min(shape.depth, room)
        assert sum(fed) <= len(text_now) + sum(range(len(tree) + 1))


@pytest.mark.parametrize("shape", [Shape((-1, 0, 0, 0, 1, 1, 4, 4), (0, 0, 1, 2, 0, 1, 0, 1))])
def test_siblings_that_stay_childless_are_not_fed(shape):
    """A spine with leaves beside it costs what the spine alone does."""
    verifier, fed = counted(OtherLM())
    ModelDraft(verifier).propose(PROMPT, Ask(shape))
    assert fed == [5, 1, 1]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(["ort", "std"]), st.booleans(), st.sampled_from([None, 3]), st.booleans())
def test_a_drafter_has_no_memory_of_other_texts(data, dialect, live, window, rows):
    """Texts that grow along its drafts or beside them, are cut back or change: the tree that a new drafter proposes."""
    lm = OtherLM(dialect=dialect, window=window, context=30)
    make = partial(ModelDraft, rows=rows, stop_below=0.01)
    draft, tokens = make(lm.verifier(live=live)), data.draw(TOKENS)
    for _ in range(data.draw(st.integers(1, 5))):
        temperature = data.draw(st.sampled_from([0.0, 1.0]))
        ask = Ask(data.draw(shapes()), Sampling(temperature=temperature, seed=3), data.draw(st.integers(0, 5)))
        tree, fresh = draft.propose(tokens, ask), make(lm.verifier()).propose(tokens, ask)
        assert tree == fresh
        np.testing.assert_array_equal(tree.q, fresh.q)
        cut = data.draw(st.integers(1, len(tokens)))
        kept = data.draw(st.sampled_from([tokens, tokens[:cut]]))
        tokens = (*kept, *data.draw(st.sampled_from(paths(tree))), *data.draw(TOKENS)[:3])[:29]
