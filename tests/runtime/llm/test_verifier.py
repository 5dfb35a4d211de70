"""The verifier: its cache may remember what it likes, its answers are those of a fresh start."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.bundle.manifest import TensorSpec
from edgekit.errors import BadManifest, BadRequest, SessionFailed
from edgekit.runtime.backends.fake import FakeSession
from edgekit.runtime.llm.feeds import DIALECTS
from edgekit.runtime.llm.kv import FIRST_CAPACITY
from edgekit.runtime.llm.tree import TokenTree
from edgekit.runtime.llm.verifier import LocalVerifier
from tests.runtime.llm.fake_lm import VOCAB, FakeLM, logits_after

MODELS = pytest.mark.parametrize(
    ("dialect", "window", "live", "dtype"),
    [(dialect, window, live, "float32") for dialect in DIALECTS for window in (None, 3) for live in (True, False)]
    + [("ort", 3, True, "float16")],
)


def scratch(tokens: tuple[int, ...], tree: TokenTree, window: int | None) -> np.ndarray:
    """Rows of a tree from the fake model's definition, path by path."""
    rows = []
    for node in range(len(tree)):
        path = []
        while node > 0:
            path.insert(0, tree.tokens[node])
            node = tree.parents[node]
        rows.append(logits_after([*tokens, *path], window))
    return np.stack(rows)


@st.composite
def trees(draw: st.DrawFn, root: int) -> TokenTree:
    """A tree of up to seven nodes below any mix of parents."""
    tokens, parents, taken = [root], [-1], set()
    for node in range(1, draw(st.integers(1, 7))):
        pair = draw(st.integers(0, node - 1)), draw(st.integers(0, VOCAB - 1))
        if pair not in taken:
            taken.add(pair)
            parents.append(min(pair[0], len(tokens) - 1))
            tokens.append(pair[1])
    pairs = list(dict.fromkeys(zip(parents, tokens, strict=True)))
    if len(pairs) != len(tokens):
        return TokenTree.chain(root)
    return TokenTree(tuple(tokens), tuple(parents))


@MODELS
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_sequence_of_calls_gives_the_logits_of_a_fresh_start(dialect, window, live, dtype, data):
    """Score, keep, rollback, edits of the text and chunked prefill in any order never change an answer."""
    verifier = FakeLM(dialect, window, dtype=dtype).verifier(live=live, chunk=data.draw(st.sampled_from([1, 3, 512])))
    tokens: tuple[int, ...] = tuple(data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9)))
    for _ in range(data.draw(st.integers(1, 6))):
        tree = data.draw(trees(tokens[-1]))
        tree = tree.spine() if verifier.chains_only else tree
        np.testing.assert_array_equal(verifier.score(tokens, tree).logits, scratch(tokens, tree, window))
        match data.draw(st.sampled_from(["keep", "leave", "rollback", "edit", "again"])):
            case "keep":
                path = [0]
                while children := [n for n in range(len(tree)) if tree.parents[n] == path[-1]]:
                    if data.draw(st.booleans()):
                        break
                    path.append(data.draw(st.sampled_from(children)))
                verifier.keep(path)
                tokens += (*(tree.tokens[node] for node in path[1:]), data.draw(st.integers(0, VOCAB - 1)))
            case "leave":
                tokens += (data.draw(st.integers(0, VOCAB - 1)),)
            case "rollback":
                verifier.rollback(data.draw(st.integers(0, len(tokens))))
            case "edit":
                cut = data.draw(st.integers(0, len(tokens) - 1))
                tokens = (*tokens[:cut], data.draw(st.integers(0, VOCAB - 1)))
            case "again":
                pass


@MODELS
def test_growth_keeps_what_the_cache_holds(dialect, window, live, dtype):
    """Doubling the capacity copies the used slots: no token is computed twice, and the answers stay right."""
    lm = FakeLM(dialect, window, dtype=dtype)
    session = lm.session(live=live)
    verifier = LocalVerifier(session, lm.decoding)
    tokens = tuple(np.random.default_rng(0).integers(0, VOCAB, FIRST_CAPACITY - 1).tolist())
    verifier.score(tokens, TokenTree.chain(tokens[-1]))
    verifier.keep([0])
    assert verifier.cached == tokens
    longer = (*tokens, 5, 6, 7)
    runs = session.runs
    np.testing.assert_array_equal(
        verifier.score(longer, TokenTree.chain(7, (1, 2))).logits, scratch(longer, TokenTree.chain(7, (1, 2)), window)
    )
    assert session.runs == runs + 1


@pytest.mark.parametrize("dialect", DIALECTS)
def test_only_what_is_new_is_run(dialect):
    """A kept step costs one run of one token, and a shared prefix is not computed again."""
    lm = FakeLM(dialect)
    fed: list[int] = []
    session = lm.session()
    answer = session._answer
    session._answer = lambda feeds: fed.append(feeds["input_ids"].shape[1]) or answer(feeds)
    verifier = LocalVerifier(session, lm.decoding, chunk=4)
    tokens = (1, 2, 3, 4, 5, 6, 7, 8, 9, 1)
    verifier.score(tokens, TokenTree.chain(1))
    assert fed == [4, 4, 2]
    verifier.keep([0])
    verifier.score((*tokens, 2), TokenTree.chain(2))
    assert fed == [4, 4, 2, 1]
    assert verifier.shared((1, 2, 3, 7)) == 3
    verifier.score((1, 2, 3, 7), TokenTree.chain(7))
    assert fed == [4, 4, 2, 1, 1]


@pytest.mark.parametrize("tokens", [(3,), (3, 4, 5)])
def test_branches_on_an_empty_cache_are_exact(tokens):
    """GroupQueryAttention takes a first prompt for one chain; a tree as the very first call is right all the same."""
    tree = TokenTree((tokens[-1], 1, 2, 3), (-1, 0, 0, 1))
    np.testing.assert_array_equal(FakeLM("ort").verifier().score(tokens, tree).logits, scratch(tokens, tree, None))


def test_an_interrupted_run_leaves_the_verifier_right():
    """Whatever a failing run wrote lies in slots that nothing counts on."""
    lm = FakeLM("ort")
    session = lm.session()
    answer = session._answer
    verifier = LocalVerifier(session, lm.decoding, chunk=2)

    def fails(feeds):
        session._answer = answer
        answer(feeds)
        raise KeyboardInterrupt

    tokens = (1, 2, 3, 4, 5, 6)
    verifier.score(tokens[:3], TokenTree.chain(3, (7, 8)))
    session._answer = fails
    with pytest.raises(KeyboardInterrupt):
        verifier.score(tokens, TokenTree.chain(6))
    np.testing.assert_array_equal(verifier.score(tokens, TokenTree.chain(6)).logits[0], logits_after(tokens))


@pytest.mark.parametrize(
    ("tokens", "tree", "words"),
    [
        ((), TokenTree.chain(1), "last token"),
        ((1, 2), TokenTree.chain(1), "last token"),
        ((1, VOCAB, 2), TokenTree.chain(2), "outside the model's vocabulary"),
        ((1, 2), TokenTree.chain(2, (-1,)), "outside the model's vocabulary"),
        ((1,) * 9, TokenTree.chain(1), "context of 8"),
        ((1,) * 7, TokenTree((1, 2, 3), (-1, 0, 0)), "context of 8"),
    ],
)
def test_requests_that_cannot_be_meant_are_refused(tokens, tree, words):
    """Before anything is run, and in words."""
    verifier = FakeLM(context=8).verifier()
    with pytest.raises(BadRequest, match=words):
        verifier.score(tokens, tree)
    np.testing.assert_array_equal(verifier.score((4,), TokenTree.chain(4)).logits[0], logits_after([4]))


@pytest.mark.parametrize("path", [(1,), (0, 2, 1), (0, 1, 2)])
def test_keep_takes_a_path_of_the_scored_tree(path):
    """What is no path from the root is refused, as is keeping before scoring."""
    verifier = FakeLM().verifier()
    with pytest.raises(BadRequest, match="no path"):
        verifier.keep([0])
    verifier.score((1, 2), TokenTree((2, 3, 4), (-1, 0, 0)))
    with pytest.raises(BadRequest, match="no path"):
        verifier.keep(path)


def test_a_window_input_needs_a_window():
    """A graph with sliding layers and a manifest without their window contradict each other."""
    lm = FakeLM(window=4)
    session = lm.session()
    with pytest.raises(BadManifest, match="sliding_window"):
        LocalVerifier(session, FakeLM().decoding)


def test_an_engine_failure_is_told_as_such():
    """The fake refuses what an engine refuses, so a wrong dialect cannot pass unseen."""
    session = FakeSession(lambda feeds: {}, [TensorSpec("input_ids", "int64", (1, "seq"))], [])
    with pytest.raises(SessionFailed, match="missing or unknown"):
        LocalVerifier(session, FakeLM().decoding).score((1,), TokenTree.chain(1))
