"""Texts as a workload: the logits are those of plain decoding, and files and models are good sources of text."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.bundle.store import Bundle, new_bundle, read_bundle
from edgekit.errors import BadManifest, BadRequest
from edgekit.export.language.export import export_language
from edgekit.quant import texts
from edgekit.quant.graph import find_units, from_matrix, initializer, load_graph, normalised, to_matrix
from edgekit.quant.metrics import errors, kl_mean
from edgekit.quant.precision import PRECISIONS
from edgekit.quant.texts import TextWorkload, first_tokens, read, text_workloads, written
from edgekit.quant.workload import Workload, measure, reference_of
from edgekit.runtime.backends import Array, Session, open_session
from edgekit.runtime.llm.probs import Sampling
from edgekit.runtime.llm.tree import TokenTree
from edgekit.runtime.llm.verifier import LocalVerifier
from edgekit.runtime.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
DRAFT = ROOT / "models" / "pycode-draft"
SOURCE = (ROOT / "edgekit" / "runtime" / "llm" / "verifier.py").read_text()
REQUESTS = ((0, 303, 292, 8, 88, 317, 199, 258), (5, 17, 3, 42, 8, 77, 30, 1000))
Made = Callable[..., Bundle]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(dialect=, precision=) -> the draft model's bundle, made once."""
    made: dict[tuple[str, str], Bundle] = {}

    def get(dialect: Any = "ort", precision: str = "fp32") -> Bundle:
        if (dialect, precision) not in made:
            target = tmp_path_factory.mktemp("texts") / "x.bundle"
            with new_bundle(target) as draft:
                draft.seal(export_language(DRAFT, draft.root, dialect=dialect, precision=precision))
            made[dialect, precision] = read_bundle(target)
        return made[dialect, precision]

    return get


@pytest.fixture(scope="module")
def bundle(exported: Made) -> Bundle:
    return exported()


@pytest.fixture
def without(bundle: Bundle) -> Callable[..., Bundle]:
    """The bundle with other values in its manifest."""

    def make(**values: Any) -> Bundle:
        return replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, **values))

    return make


def one_by_one(bundle: Bundle, tokens: tuple[int, ...], session: Session | None = None) -> Array:
    """The slow twin: plain decoding through the runtime's cache, a token at a time."""
    decoding = bundle.manifest.decoding
    assert decoding is not None
    verifier = LocalVerifier(session or open_session(bundle.graph(decoding.part), threads=1), decoding)
    rows = []
    for end in range(1, len(tokens) + 1):
        rows.append(verifier.score(tokens[:end], TokenTree.chain(tokens[end - 1])).logits[0].copy())
        verifier.keep((0,))
    return np.stack(rows)


def rounded(bundle: Bundle, precision: str, folder: Path) -> Session:
    """The bundle's graph with every product's weights rounded, floats all the same."""
    model, how = normalised(load_graph(bundle.graph("decoder"))), PRECISIONS[precision]
    for unit in find_units(model):
        stored = initializer(model, unit.weight).numpy()
        matrix = how.unpack(how.pack(to_matrix(stored, unit)), unit.k)
        value = model.graph.initializers[unit.weight]
        value.const_value = ir.tensor(from_matrix(matrix, unit, stored.shape), name=unit.weight)
    path = folder / f"{precision}.onnx"
    ir.save(model, path, external_data=f"{path.name}.data")
    return open_session(path, threads=1)


# ---------------------------------------------------------------------------------------------- the workload


@pytest.mark.parametrize("dialect", ["ort", "std"])
def test_logits_are_those_of_plain_decoding(exported: Made, dialect: str) -> None:
    """One run of a whole text says what decoding it token by token says, in both dialects."""
    made = exported(dialect)
    outputs = TextWorkload(made, REQUESTS, threads=1).run({})
    assert len(outputs) == len(REQUESTS)
    for tokens, logits in zip(REQUESTS, outputs, strict=True):
        assert logits.shape == (len(tokens), 4096)
        np.testing.assert_allclose(logits, one_by_one(made, tokens), atol=1e-4)


def test_texts_longer_than_a_prefill_chunk_and_a_first_buffer(bundle: Bundle) -> None:
    """A text that the runtime would feed in pieces, into a cache that grows, is one run here all the same."""
    tokens = tuple(Tokenizer.from_file(bundle.tokenizer()).encode(SOURCE))[:300]
    workload = TextWorkload(bundle, [tokens, tokens[::-1]], threads=1)
    assert [tuple(feeds["input_ids"][0]) for feeds in workload.feeds] == [tokens, tokens[::-1]]
    logits, _ = workload.run({})
    np.testing.assert_allclose(logits, one_by_one(bundle, tokens), atol=1e-4)


def test_only_the_last_rows_are_compared_where_the_vocabulary_is_large(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for outputs is bounded: the rows at the end are the very rows of the whole text."""
    whole = TextWorkload(bundle, REQUESTS, threads=1)
    assert whole.rows == len(REQUESTS[0])
    monkeypatch.setattr(texts, "LOGITS", 3 * len(REQUESTS) * 4 * 4096)
    short = TextWorkload(bundle, REQUESTS, threads=1)
    assert short.rows == 3
    for all_rows, last in zip(whole.run({}), short.run({}), strict=True):
        assert last.shape == (3, 4096)
        np.testing.assert_allclose(last, all_rows[-3:], atol=1e-4)
    monkeypatch.setattr(texts, "LOGITS", 1)
    assert TextWorkload(bundle, REQUESTS).rows == 1
    assert TextWorkload(bundle, REQUESTS, rows=99).rows == len(REQUESTS[0])


def test_equal_sessions_give_equal_outputs(bundle: Bundle) -> None:
    """A replacement that is the same graph changes nothing, bit for bit, however often it is asked."""
    workload: Workload = TextWorkload(bundle, REQUESTS, threads=1)
    reference = reference_of(workload)
    session = open_session(bundle.graph("decoder"), threads=1)
    for _ in range(2):
        outputs = workload.run({"decoder": session, "other": session})
        assert all(np.array_equal(one, other) for one, other in zip(reference, outputs, strict=True))
    assert measure(workload, reference, {"decoder": session}) == {"kl": 0.0}


def test_a_session_that_can_only_run_is_enough(bundle: Bundle) -> None:
    """What takes the decoder's place needs `run` and no buffers of its own."""

    class Plain:
        def __init__(self, session: Session) -> None:
            self.run = session.run

    workload = TextWorkload(bundle, REQUESTS, threads=1)
    plain: Any = Plain(open_session(bundle.graph("decoder"), threads=1))
    for one, other in zip(workload.run({}), workload.run({"decoder": plain}), strict=True):
        np.testing.assert_array_equal(one, other)


def test_coarser_weights_diverge_more(bundle: Bundle, tmp_path: Path) -> None:
    """KL orders the precisions as their bits do, and its second order is close to the whole."""
    chosen, *_ = text_workloads(bundle, count=2, length=48, threads=1)
    reference = chosen.run({})
    found = []
    for precision in ("int8", "int8-128", "int4", "int4-128"):
        outputs = chosen.run({"decoder": rounded(bundle, precision, tmp_path)})
        found.append(errors(chosen.metrics, reference, outputs)["kl"])
        exact = np.mean([kl_mean(one, other) for one, other in zip(reference, outputs, strict=True)])
        assert found[-1] == pytest.approx(exact, rel=0.2)
    assert found == sorted(found)
    assert found[2] > 20 * found[1]


@pytest.mark.parametrize("precision", ["int4", "int4-128"])
def test_rounded_weights_predict_an_exported_bundle(exported: Made, precision: str, tmp_path: Path) -> None:
    """The KL of a float graph with rounded weights is that of the exporter's integer graph, within a tenth."""
    chosen, *_ = text_workloads(exported(), count=2, length=48, threads=1)
    reference = chosen.run({})
    predicted = measure(chosen, reference, {"decoder": rounded(exported(), precision, tmp_path)})["kl"]
    shipped = open_session(exported(precision=precision).graph("decoder"), threads=1)
    assert measure(chosen, reference, {"decoder": shipped})["kl"] == pytest.approx(predicted, rel=0.1)


def test_the_digest_names_what_is_measured(bundle: Bundle) -> None:
    """Equal texts have equal digests; another token, order or number of rows has another."""
    one = TextWorkload(bundle, REQUESTS)
    assert one.digest == TextWorkload(bundle, list(REQUESTS)).digest
    others = [
        TextWorkload(bundle, REQUESTS[::-1]),
        TextWorkload(bundle, REQUESTS[:1]),
        TextWorkload(bundle, REQUESTS, rows=2),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 4


@pytest.mark.parametrize(
    ("requests", "words"),
    [
        ((), "no tokens"),
        (((),), "at least one"),
        (((1, 2), (3,)), "all of one length"),
        (((1, 5000),), "vocabulary"),
        (((1,) * 2000,), "context"),
    ],
)
def test_texts_that_cannot_be_measured_are_refused(bundle: Bundle, requests: Any, words: str) -> None:
    """No text, unequal ones, unknown tokens and too long ones are named at once."""
    with pytest.raises(BadRequest, match=words):
        TextWorkload(bundle, requests)


def test_a_bundle_without_text_is_refused(without: Callable[..., Bundle], tmp_path: Path) -> None:
    """A picture bundle has no tokens to be measured on; a text bundle without tokenizer cannot read or write."""
    for make in (lambda b: TextWorkload(b, REQUESTS), text_workloads, lambda b: text_workloads(b, tmp_path / "x")):
        with pytest.raises(BadRequest, match="writes no text"):
            make(without(decoding=None, tokenizers={}))
    with pytest.raises(BadManifest, match="tokenizer"):
        text_workloads(without(tokenizers={}))


# -------------------------------------------------------------------------------------------------- from a file


def test_a_file_is_split_evenly_between_choosing_and_checking(bundle: Bundle, tmp_path: Path) -> None:
    """Pieces come from all over the file, by turns for one workload and the other, and none is in both."""
    path = tmp_path / "text.py"
    path.write_text(SOURCE)
    tokenizer = Tokenizer.from_file(bundle.tokenizer())
    chosen, held, _ = text_workloads(bundle, path, count=3, length=40)
    assert [len(text) for text in (*chosen.requests, *held.requests)] == [40] * 6
    places = [SOURCE.index(tokenizer.decode(text)) for text in (*chosen.requests, *held.requests)]
    expected = [len(SOURCE) * part / 6 for part in (0, 2, 4, 1, 3, 5)]
    assert np.allclose(places, expected, atol=20)


def test_a_short_file_gives_short_texts(bundle: Bundle, tmp_path: Path) -> None:
    """Where the file is too short for whole texts, all texts are shorter, and of one length."""
    path = tmp_path / "short.py"
    path.write_text(SOURCE[:1500])
    lengths = {len(text) for text in read(bundle, path, count=8, length=256)}
    assert len(lengths) == 1
    assert texts.SHORTEST <= lengths.pop() < 100


def test_no_text_is_longer_than_the_context(bundle: Bundle, without: Callable[..., Bundle], tmp_path: Path) -> None:
    """Read or written, a text fits the model."""
    assert bundle.manifest.decoding is not None
    small = without(decoding=msgspec.structs.replace(bundle.manifest.decoding, context_length=20))
    path = tmp_path / "text.py"
    path.write_text(SOURCE)
    assert {len(text) for text in read(small, path, count=2, length=256)} == {20}
    assert {len(text) for text in written(small, count=2, length=256, threads=1)} == {20}


@pytest.mark.parametrize("content", [b"", b"\n", b"x = 1\n" * 5])
def test_a_file_without_enough_text_is_refused_with_the_numbers(bundle: Bundle, tmp_path: Path, content: bytes) -> None:
    """An empty or too short file is named, with how much is needed and what else can be done."""
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(BadRequest, match=r"empty\.txt is too short.*4096 tokens.*the model writes one"):
        text_workloads(bundle, path)


def test_what_is_no_text_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    """A missing file, a folder and bytes that are no UTF-8 are named as what they are."""
    with pytest.raises(BadRequest, match="No such file"):
        text_workloads(bundle, tmp_path / "absent.txt")
    with pytest.raises(BadRequest, match="directory"):
        text_workloads(bundle, tmp_path)
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(256)) * 100)
    with pytest.raises(BadRequest, match=r"weights\.bin is no UTF-8 text"):
        text_workloads(bundle, path)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\r\ufeff"), max_size=200), count=st.integers(1, 9))
def test_pieces_are_cut_between_characters(text: str, count: int) -> None:
    """Whatever the text and the cuts, pieces are whole characters in order, and a cut costs one at most."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text"
        path.write_bytes(text.encode())
        pieces = list(texts._pieces(path, count, 1 << 20))
        short = list(texts._pieces(path, count, 3))
    assert len(pieces) == count
    at = 0
    for piece in pieces:
        at = text.index(piece, at) + len(piece)
    assert len(text) - sum(map(len, pieces)) <= count - 1
    assert all(piece.startswith(begin) for piece, begin in zip(pieces, short, strict=True))


def test_windows_newlines_and_marks_are_no_part_of_the_text(bundle: Bundle, tmp_path: Path) -> None:
    """A file saved on Windows gives the same tokens at its beginning as one saved elsewhere."""
    plain, windows = tmp_path / "plain.py", tmp_path / "windows.py"
    plain.write_bytes(SOURCE.encode())
    windows.write_bytes(b"\xef\xbb\xbf" + SOURCE.replace("\n", "\r\n").encode())
    assert read(bundle, plain, count=1, length=64) == read(bundle, windows, count=1, length=64)


# ---------------------------------------------------------------------------------------- written by the model


def test_the_model_writes_the_same_texts_every_time(bundle: Bundle) -> None:
    """Seeds are fixed: a second call gives the same texts, another seed gives others, and no two are alike."""
    first = written(bundle, count=4, length=24, threads=1)
    assert first == written(bundle, count=4, length=24, threads=1)
    assert first[:2] == written(bundle, count=2, length=24, threads=1)
    assert not set(first) & set(written(bundle, count=4, length=24, seed=50, threads=1))
    assert len(set(first)) == 4


def test_written_texts_are_draws_at_temperature_one(bundle: Bundle) -> None:
    """Slow twin: every token is what the addressed noise chooses from the whole text's last row, ends left out."""
    for number, text in enumerate(written(bundle, count=2, length=10, threads=1)):
        draw = Sampling(temperature=1.0, seed=texts.SEED + number)
        begin = 1 + number
        for end in range(begin, len(text)):
            row = one_by_one(bundle, text[:end])[-1]
            row[0] = -np.inf
            assert text[end] == draw(row, text[:end])


def test_written_texts_do_not_end(bundle: Bundle) -> None:
    """Every text has its full length, and the token that ends a text is only ever its first."""
    for text in written(bundle, count=4, length=64, temperature=3.0, threads=1):
        assert len(text) == 64
        assert 0 not in text[1:]


def test_texts_begin_as_a_text_does_and_in_random_places(bundle: Bundle, without: Callable[..., Bundle]) -> None:
    """Even texts begin with the token that begins a text, odd ones with a random one that is no special token."""
    decoding, tokenizer = bundle.manifest.decoding, Tokenizer.from_file(bundle.tokenizer())
    assert decoding is not None
    firsts = [first_tokens(decoding, tokenizer, number, seed=1) for number in range(40)]
    plain, others = ([firsts[at] for at in range(40) if at // 4 % 2 == kind] for kind in (0, 1))
    assert set(plain) == {(0,)}
    assert all(len(first) == 2 and first[0] == 0 and not tokenizer.is_silent(first[1]) for first in others)
    assert len(set(others)) > 15
    no_begin = msgspec.structs.replace(decoding, bos=None, eos=(7, 8))
    assert first_tokens(no_begin, tokenizer, 0, seed=1) == (7,)
    assert first_tokens(no_begin, tokenizer, 4, seed=1) == firsts[4][1:]
    bare = msgspec.structs.replace(decoding, bos=None, eos=())
    assert len(first_tokens(bare, tokenizer, 0, seed=1)) == 1


def test_text_of_its_own_is_split_too(bundle: Bundle) -> None:
    """Without a file both workloads get texts of the model's own, none of them twice."""
    chosen, held, fed = text_workloads(bundle, count=2, length=16, threads=1)
    assert chosen.requests == fed.requests == written(bundle, count=4, length=16, threads=1)[::2]
    assert not set(chosen.requests) & set(held.requests)


def test_more_texts_calibrate_and_do_not_check(bundle: Bundle, tmp_path: Path) -> None:
    """What is held out stays so; of a file as of written text, which is then kept and not written again."""
    path = tmp_path / "text.py"
    path.write_text(SOURCE)
    for calibration in (None, path):
        options: dict[str, Any] = {"count": 2, "length": 16, "more": 2, "threads": 1, "work": tmp_path}
        chosen, held, fed = text_workloads(bundle, calibration, **options)
        assert [len(each.requests) for each in (chosen, held, fed)] == [2, 2, 6]
        assert set(chosen.requests) <= set(fed.requests)
        assert not set(held.requests) & set(fed.requests)
        assert fed.rows == chosen.rows
    (kept,) = tmp_path.glob("texts-*.npy")
    np.save(kept, np.load(kept)[::-1])
    again, *_ = text_workloads(bundle, None, **options)
    assert again.requests == tuple(tuple(map(int, text)) for text in np.load(kept)[::4])
