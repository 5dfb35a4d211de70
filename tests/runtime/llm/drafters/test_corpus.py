"""Copying from documents: the same text, the most frequent continuation, and the right source of every token."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgekit.errors import BadRequest
from edgekit.runtime.llm.drafters import Ask, NoDraft
from edgekit.runtime.llm.drafters.corpus import BETWEEN, CROWD, ContextIndex, CorpusDraft, Span, read_documents, spans
from edgekit.runtime.llm.probs import Sampling
from edgekit.runtime.llm.tree import Shape, Source, TokenTree
from edgekit.runtime.tokenizer import Tokenizer
from tests.runtime.llm.drafters.copying import ASKS, BUSH, Rule, assert_fits, steps, text
from tests.runtime.llm.fake_lm import VOCAB, FakeLM, greedy_text

PROMPT = (3, 1, 4, 1, 5)
CHAIN = Ask(Shape.chain(4))
DOCUMENTS = st.lists(st.lists(st.integers(0, 2), max_size=20), max_size=4)
TEXT = st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple)


def by_looking(documents, tokens, longest, shortest):
    """(length, document, offset) of every place with a token after it that the text's end stands before."""
    found = []
    for number, document in enumerate(documents):
        for offset in range(1, len(document)):
            length, most = 0, min(longest, offset, len(tokens))
            while length < most and document[offset - 1 - length] == tokens[-1 - length]:
                length += 1
            if length >= shortest:
                found.append((length, number, offset))
    return found


def places(index, tokens, shortest, *, shorter):
    return sorted((m, *index.document(place)) for m, place in index.matches(tokens, shortest, shorter=shorter))


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_the_text_is_that_without_drafts(temperature, ask):
    """Greedy and sampled, for chains and trees; the documents hold the greedy text, in part with mistakes."""
    sampling = Sampling(temperature=temperature, top_p=0.95, seed=7)
    right = greedy_text(PROMPT, 40)
    drafter = CorpusDraft({"right": right, "half": [*right[:20], *right[5:15]], "other": right[::-1]}, shortest=1)
    plain = text(steps(NoDraft(), FakeLM().verifier(), PROMPT, 40, Ask(), sampling))
    assert text(steps(drafter, FakeLM().verifier(), PROMPT, 40, ask, sampling)) == plain
    assert temperature or plain == right


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32), st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=60), max_size=3), st.sampled_from(ASKS)
)
def test_the_text_is_the_same_with_any_documents(seed, documents, ask):
    """Random documents, none at all and empty ones among them."""
    drafter = CorpusDraft({str(number): document for number, document in enumerate(documents)}, shortest=1)
    sampling = Sampling(temperature=1.2, seed=seed)
    plain = text(steps(NoDraft(), FakeLM().verifier(), PROMPT, 25, Ask(), sampling))
    assert text(steps(drafter, FakeLM().verifier(), PROMPT, 25, ask, sampling)) == plain


def test_every_draft_stands_where_the_model_recites():
    """A model that says a document by heart: each step gives all it can, and the answer is one span of it."""
    document = [place * place % 1009 for place in range(400)]
    verifier = Rule(lambda context: document[len(context) + 50], 1009)
    done = steps(CorpusDraft({"poem": document}), verifier, document[50:60], 300, Ask(Shape.chain(5)))
    assert {len(step.tokens) for step in done} == {6}
    sources = [source for step in done for source in step.sources]
    assert spans(sources) == (Span(0, 299, "poem", 60),)


@settings(max_examples=200)
@given(DOCUMENTS, TEXT, st.integers(1, 3), st.integers(0, 6))
@example([[0] * 20] * 3, (0,) * 12, 2, 6)
def test_matches_are_those_found_by_looking(documents, tokens, shortest, more):
    """Every place of every length, and none across the border of two documents."""
    index = ContextIndex(documents, shortest + more)
    right = sorted(by_looking(documents, tokens, shortest + more, shortest))
    if len(right) < CROWD:
        assert places(index, tokens, shortest, shorter=True) == right
        best = [match for match in right if match[0] == right[-1][0]]
        assert places(index, tokens, shortest, shorter=False) == best
    found = index.matches(tokens, shortest, shorter=True)
    assert [length for length, _ in found] == sorted((length for length, _ in found), reverse=True)


@settings(max_examples=200)
@given(DOCUMENTS, TEXT, st.integers(1, 3))
def test_a_chain_follows_the_most_frequent_continuation(documents, tokens, shortest):
    """At each depth the token that most places go on with which have agreed so far, with its share as confidence."""
    names = "abcd"
    tree = CorpusDraft(dict(zip(names, documents, strict=False)), 4, shortest).propose(tokens, CHAIN)
    found = by_looking(documents, tokens, 4, shortest)
    best = max(found, default=(0,))[0]
    runs = [documents[number][offset:][:4] for length, number, offset in found if length == best]
    for depth, draft in enumerate(tree.tokens[1:]):
        counts = Counter(run[depth] for run in runs if depth < len(run))
        assert counts[draft] == max(counts.values())
        share = counts[draft] / (counts.total() + 1 / (best + depth))
        assert tree.log_q[depth + 1] == pytest.approx(math.log(share))
        runs = [run for run in runs if depth < len(run) and run[depth] == draft]
        source = tree.sources[depth + 1]
        assert documents[names.index(source.document)][source.offset] == draft
    assert len(tree) == 5 or not any(len(run) >= len(tree) for run in runs)


@settings(max_examples=100)
@given(DOCUMENTS, TEXT, st.integers(0, 5))
def test_trees_fit_their_shape(documents, tokens, room):
    """Within shape and room, the likelier sibling first, and a source that says the token."""
    ask = Ask(BUSH, room=room)
    drafter = CorpusDraft(dict(zip("abcd", documents, strict=False)), shortest=1)
    tree = drafter.propose(tokens, ask)
    assert_fits(tree, ask)
    for node in range(1, len(tree)):
        siblings = tree.children(tree.parents[node])
        assert tree.log_q[siblings[0]] >= tree.log_q[node]
        source = tree.sources[node]
        assert documents["abcd".index(source.document)][source.offset] == tree.tokens[node]


def test_calls_are_independent():
    """Whatever was proposed before, cut back or changed: the same text gives the same tree."""
    drafter = CorpusDraft({"a": [1, 2, 3, 4, 5, 1, 2, 4]})
    tokens = (9, 1, 2, 3)
    first = drafter.propose(tokens, CHAIN)
    for other in ((1, 2), (9, 1), (4, 5, 1)):
        drafter.propose(other, CHAIN)
    assert drafter.propose(tokens, CHAIN) == first
    assert first.tokens == (3, 4, 5, 1, 2)
    assert first.sources[1] == Source("corpus", "a", 3)


@pytest.mark.parametrize("tokens", [(4,), (8, 9), (7, 4), (10**9, 2**31), (3, 4)])
def test_nothing_to_copy_is_the_root_alone(tokens):
    """One token, tokens that are in no document, a match over a border, and one at a document's end."""
    drafter = CorpusDraft({"a": [1, 2, 3, 4], "b": [4, 7], "c": [4, 1]})
    assert drafter.propose(tokens, CHAIN) == TokenTree(tokens[-1:], (-1,), (0.0,), (Source("corpus"),))
    assert len(drafter.propose((1, 2), Ask(Shape.chain(4), room=0))) == 1
    assert len(drafter.propose((1, 2), Ask())) == 1
    assert drafter.propose((1, 2), CHAIN).tokens == (2, 3, 4)


def test_a_crowd_is_sampled_evenly():
    """Where a match stands in thousands of places the shares come out right, and the work stays bounded."""
    document = [token for place in range(3000) for token in (1, 2, 3 if place % 4 else 4)]
    drafter = CorpusDraft({"a": document}, longest=2)
    assert len(drafter._index.matches((1, 2), 2, shorter=False)) <= CROWD + 1
    tree = drafter.propose((9, 1, 2), Ask(Shape((-1, 0, 0), (0, 0, 1))))
    assert tree.tokens == (2, 3, 4)
    assert math.exp(tree.log_q[1]) == pytest.approx(0.75, abs=0.1)


def test_ids_may_be_large():
    """Vocabularies of any size below 2^32 - 1; what is no id is refused."""
    big = BETWEEN - 1
    assert CorpusDraft({"a": [big, 0, big - 1, 7]}).propose((big, 0), CHAIN).tokens == (0, big - 1, 7)
    for wrong in (-1, BETWEEN):
        with pytest.raises(BadRequest, match="ids are in"):
            CorpusDraft({"a": [wrong]})


def test_lengths_are_checked():
    """At least one token, the longest no shorter than the shortest."""
    with pytest.raises(BadRequest, match="1 <= min <= max"):
        CorpusDraft({"a": [1]}, longest=2, shortest=3)


# ----------------------------------------------------------------------------------------------------- spans


def test_spans_join_what_lines_up():
    """Runs of one document are joined, over the token that a step ends with; other gaps and documents are not."""
    a, b, own = "a.txt", "b.txt", Source("ngram", "", 3)
    sources = [None, *(Source("corpus", a, place) for place in (5, 6, 7)), None, Source("corpus", a, 9)]
    sources += [Source("corpus", b, 10), own, Source("corpus", b, 12), None, None, Source("corpus", b, 15), None]
    assert spans(sources) == (Span(1, 6, a, 5), Span(6, 9, b, 10), Span(11, 12, b, 15))
    assert spans([Source("corpus", a, 1), Source("corpus", a, 3)]) == (Span(0, 1, a, 1), Span(1, 2, a, 3))
    assert spans([]) == spans([None, own]) == ()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=30, max_size=60), st.integers(0, 2**32), st.sampled_from(ASKS))
def test_spans_tell_the_truth(document, seed, ask):
    """Every token of a span, those the model drew between two copies included, stands in the document where it says."""
    rule = Rule(lambda context: (seed >> len(context) % 24) % 3, 3)
    done = steps(CorpusDraft({"a": document}), rule, document[:4], 40, ask)
    said = text(done)
    for span in spans(source for step in done for source in step.sources or [None] * len(step.tokens)):
        assert said[span.start : span.end] == document[span.offset :][: span.end - span.start]


# ------------------------------------------------------------------------------------------------- documents


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(Path(__file__).resolve().parents[4] / "models/pycode-draft/tokenizer.json")


def test_a_folder_is_read_in_order(tmp_path, tokenizer):
    """All files below it by their path, sorted, as the tokenizer cuts them and without its special tokens."""
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    files = {
        "b.txt": "def f(x):\n    return x\n",
        "a.md": "Grüße 🙂",
        "sub/c.py": "",
        ".git/config": "\udcff",
        ".x": "\udcff",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    documents = read_documents(tmp_path, tokenizer)
    assert list(documents) == ["a.md", "b.txt", "sub/c.py"]
    assert {name: tokenizer.decode(ids) for name, ids in documents.items()} == {n: files[n] for n in documents}
    assert CorpusDraft(documents).propose(tuple(documents["b.txt"][:5]), CHAIN).sources[1].document == "b.txt"


def test_a_file_is_one_document(tmp_path, tokenizer):
    """Under its name; a byte order mark is no part of the text."""
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfimport os")
    assert read_documents(tmp_path / "x.txt", tokenizer) == {
        "x.txt": tokenizer.encode("import os", add_special_tokens=False)
    }


@pytest.mark.parametrize("content", [b"caf\xe9", b"\x89PNG\r\n", b"a\0b", "text".encode("utf-16"), b"\xed\xa0\x80"])
def test_what_is_no_text_is_refused_by_name(tmp_path, tokenizer, content):
    """Other encodings, binaries, half surrogates: the message names the file."""
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "odd.txt").write_bytes(content)
    with pytest.raises(BadRequest, match=r"odd\.txt"):
        read_documents(tmp_path, tokenizer)


def test_nothing_and_too_much_are_refused(tmp_path, tokenizer):
    """No such path, a folder without files, more bytes than the limit."""
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(BadRequest, match="no text file"):
            read_documents(path, tokenizer)
    (tmp_path / "x.txt").write_text("12345")
    assert read_documents(tmp_path, tokenizer, limit=5)
    with pytest.raises(BadRequest, match=r"5 bytes; at most 4"):
        read_documents(tmp_path, tokenizer, limit=4)
