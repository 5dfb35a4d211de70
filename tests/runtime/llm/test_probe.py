"""The probe tells engines that round from graphs whose rows depend on what is computed beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.errors import BadRequest
from edgekit.runtime.backends import open_session
from edgekit.runtime.llm.prefix import PrefixStore
from edgekit.runtime.llm.probe import Invariance, classify, filler
from edgekit.runtime.llm.tree import TokenTree
from edgekit.runtime.llm.verifier import LocalVerifier
from tests.runtime.llm.fake_lm import VOCAB, FakeLM, logits_after

TEXT = (3, 1, 4, 1, 5, 9, 2, 6)
EXACT = Invariance("exact", 0.0, 0.0, 1)
DIALECTS = pytest.mark.parametrize("dialect", ["ort", "std"])


class OffLM(FakeLM):
    """The fake model on an engine whose logits are off by `off(the ids of the run)`."""

    def __init__(self, off: Callable[[np.ndarray], float], dialect: str = "ort", **options: Any) -> None:
        super().__init__(dialect, **options)
        self.off = off

    def answer(self, feeds):
        results = super().answer(feeds)
        results["logits"] = results["logits"] + np.float32(self.off(feeds["input_ids"][0]))
        return results


class NoisyLM(FakeLM):
    """Every logit of every run is a little off, never twice alike."""

    def __init__(self) -> None:
        super().__init__()
        self.random = np.random.default_rng(3)

    def answer(self, feeds):
        results = super().answer(feeds)
        noise = self.random.normal(scale=1e-5, size=results["logits"].shape)
        return results | {"logits": results["logits"] + noise.astype(np.float32)}


@DIALECTS
def test_an_engine_that_always_computes_alike_is_exact(dialect):
    """The same bits in every run: nothing to fill up, and nothing to refuse."""
    found = classify(FakeLM(dialect).verifier())
    assert found == EXACT
    assert found.exact() == 1


@DIALECTS
@pytest.mark.parametrize(
    ("granule", "off"),
    [
        (2, lambda ids: 2e-5 * (len(ids) == 1)),
        (2, lambda ids: 2e-5 * (len(ids) % 2)),
        (2, lambda ids: 2e-5 * (len(ids) == 5)),
        (4, lambda ids: 2e-5 * (len(ids) == 2)),
        (4, lambda ids: 2e-5 * (len(ids) % 4 > 0)),
        (8, lambda ids: 2e-5 * (len(ids) < 5)),
    ],
)
def test_runs_that_are_filled_up_can_be_exact(dialect, granule, off):
    """The smallest granule that takes the odd sizes out of use; how far rows would be without it is said."""
    found = classify(OffLM(off, dialect).verifier())
    assert (found.kind, found.granule) == ("padded", granule)
    assert found.exact() == granule
    assert found.margin == pytest.approx(2e-5, rel=0.05)
    assert found.prompt <= found.margin * 1.05


@DIALECTS
def test_an_engine_that_rounds_by_the_number_of_rows(dialect):
    """Kernels chosen by size: the margin is the largest difference, and long prompts have one of their own."""
    found = classify(OffLM(lambda ids: 1e-5 * len(ids), dialect).verifier())
    assert found.kind == "rounding"
    assert found.margin == pytest.approx(15e-5, rel=0.05)
    assert found.prompt == pytest.approx((256 - 16) * 1e-5, rel=0.05)
    found.check()


@pytest.mark.parametrize("size", [8, 16])
def test_a_threshold_that_no_filling_takes_away_is_rounding(size):
    """Where runs of eight and of sixteen differ there is no exact mode, and who asks for it is told why."""
    found = classify(OffLM(lambda ids: 1e-4 * (len(ids) == size)).verifier())
    assert (found.kind, found.granule) == ("rounding", 0)
    assert found.margin == pytest.approx(1e-4, rel=0.05)
    with pytest.raises(BadRequest, match=r"no exact mode"):
        found.exact()


def test_prompts_that_differ_do_not_spoil_small_runs():
    """Kernels for long runs are another matter: exact among drafts, with the difference of a prompt beside it."""
    found = classify(OffLM(lambda ids: 1e-3 * (len(ids) > 30)).verifier())
    assert (found.kind, found.margin) == ("exact", 0.0)
    assert found.prompt == pytest.approx(1e-3, rel=0.05)


def test_an_engine_that_never_computes_twice_alike_rounds():
    """Sums in no fixed order differ between equal runs too: noise of that size is not the drafts' doing."""
    found = classify(NoisyLM().verifier())
    assert found.kind == "rounding"
    assert 5e-6 < found.margin < 1e-4
    found.check()


@DIALECTS
@pytest.mark.parametrize(
    "off",
    [
        lambda ids: 0.01 * ids.max(),  # one scale per tensor
        lambda ids: 1e-5 * ids.sum(),
        lambda ids: 0.3 * (ids[1:] == 0).any(),  # a special token with large activations
        lambda ids: 0.3 * (len(ids) > 1 and ids[-1] == VOCAB - 1),
    ],
)
def test_a_graph_whose_rows_depend_on_their_mates_is_refused(dialect, off):
    """The drafts beside a row change it in a run of the same size: such a graph cannot verify, and is told so."""
    found = classify(OffLM(off, dialect).verifier())
    assert found.kind == "dependent"
    assert found.margin > 1e-5
    with pytest.raises(BadRequest, match=r"cannot verify drafts.*row by row"):
        found.check()
    with pytest.raises(BadRequest, match="cannot verify drafts"):
        found.exact()


def test_dependence_on_the_later_half_alone_is_found():
    """A graph that minds the last draft only after certain first ones: some runs keep those and change the last."""
    first, last = np.array(filler(31, VOCAB)[24:]), filler(39, VOCAB)[38]
    lm = OffLM(lambda ids: 0.1 * (len(ids) == 16 and (ids[1:8] == first).all() and ids[-1] != last))
    assert classify(lm.verifier()).kind == "dependent"


def test_several_texts_are_compared():
    """A difference that the first text does not show is found in another."""
    (rare, *_) = set(filler(24, VOCAB, 2)) - set(filler(39, VOCAB, 0)) - set(filler(39, VOCAB, 1))
    found = classify(OffLM(lambda ids: 1e-4 * (len(ids) == 1 and ids[0] == rare)).verifier())
    assert (found.kind, found.granule) == ("padded", 2)


def test_lone_rows_further_on_are_compared_too():
    """Ordinary decoding goes on from its own lone rows: one that is off there is found though the first one agrees."""
    late = filler(26, VOCAB)[25]
    assert late != filler(24, VOCAB)[23]
    found = classify(OffLM(lambda ids: 1e-4 * (len(ids) == 1 and ids[0] == late)).verifier())
    assert found.kind == "padded"
    assert found.margin == pytest.approx(1e-4, rel=0.05)


@DIALECTS
@pytest.mark.parametrize("context", [1, 2, 3, 4, 7, 17, 31, 32, 40, 63, 64])
def test_small_contexts_are_probed_too(dialect, context):
    """A model that holds few tokens is run within them, and is told apart as far as they go."""
    assert classify(FakeLM(dialect, context=context).verifier()) == EXACT
    if context >= 4:
        assert classify(OffLM(lambda ids: ids.sum(), dialect, context=context).verifier()).kind == "dependent"


def test_the_verifier_is_left_as_it_was():
    """Its cache, its granule and its prefix store are as before; other granules are probed on a twin."""
    store, lm = PrefixStore(1 << 20), OffLM(lambda ids: 7.0 * (len(ids) == 1))
    session = lm.session()
    verifier = LocalVerifier(session, lm.decoding, granule=2, prefixes=store)
    verifier.score(TEXT, TokenTree.chain(TEXT[-1]))
    verifier.keep((0,))
    looked_up = store.stats
    assert classify(verifier).kind == "padded"
    assert store.stats == looked_up
    assert verifier.cached == TEXT
    assert verifier.granule == 2
    assert verifier.prefixes is store
    runs = session.runs
    tokens = (*TEXT, 7)
    np.testing.assert_array_equal(verifier.score(tokens, TokenTree.chain(7)).logits[0], logits_after(tokens))
    assert session.runs == runs + 1


def test_filler_is_a_fixed_text_of_the_vocabulary():
    """The same ids every time, all of them valid, and another text by its salt."""
    assert filler(300, 7) == filler(300, 7)
    assert set(filler(300, 7)) <= set(range(7))
    assert filler(20, 50_000)[:10] == filler(10, 50_000)
    assert len({filler(20, 50_000, salt) for salt in range(6)}) == 6
    assert filler(0, 7) == ()


# ------------------------------------------------------------------------------------------------ on a real engine


@pytest.fixture(scope="module")
def verifier_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], LocalVerifier]:
    """(precision, dialect) -> a verifier on a tiny model's export; `dynamic` quantizes whole tensors as they come."""
    pytest.importorskip("torch")
    tiny = pytest.importorskip("tests.export.language.tiny")
    from onnxruntime.quantization import quantize_dynamic

    from edgekit.export.language.export import export_language

    root = tmp_path_factory.mktemp("probe")
    source = tiny.save_model(tiny.make_model("llama-tied"), root / "source")

    def get(precision: str, dialect: Any) -> LocalVerifier:
        folder = root / f"{precision}-{dialect}"
        manifest = export_language(
            source, folder, precision="fp32" if precision == "dynamic" else precision, dialect=dialect
        )
        assert manifest.decoding is not None
        graph = Path(folder / manifest.parts["decoder"].graph)
        if precision == "dynamic":
            options = {"DefaultTensorType": 1}  # float32, for values whose type onnx cannot infer
            whole, graph = graph, folder / "dynamic.onnx"
            quantize_dynamic(whole, graph, op_types_to_quantize=["MatMul"], extra_options=options)
        return LocalVerifier(open_session(graph, threads=1), manifest.decoding)

    return get


def change(verifier: LocalVerifier) -> float:
    """How far the row of the text's last token moves with the drafts after it, over all single drafts."""
    rows = [verifier.score(TEXT, TokenTree.chain(TEXT[-1], (draft,))).logits[0].copy() for draft in range(90)]
    return float(np.ptp(np.stack(rows), axis=0).max())


@pytest.mark.torch
@DIALECTS
@pytest.mark.parametrize("precision", ["fp32", "int8", "int8-row", "int4"])
def test_exports_can_verify(precision, dialect, verifier_of):
    """As edgekit writes them, rows differ by rounding at most, and no draft moves the row before it."""
    verifier = verifier_of(precision, dialect)
    found = classify(verifier)
    found.check()
    most = 1e-3 if precision == "fp32" else 0.2  # where activations are rounded to 8 bits, the last bit can tip one
    assert found.margin < most
    assert found.prompt < most
    assert change(verifier) == 0


@pytest.mark.torch
@DIALECTS
def test_per_tensor_dynamic_quantization_is_refused(dialect, verifier_of):
    """The same model with DynamicQuantizeLinear: a wrong draft moves the row before it by far more than rounding."""
    verifier = verifier_of("dynamic", dialect)
    assert change(verifier) > 0.01
    found = classify(verifier)
    assert found.kind == "dependent"
    assert found.margin > 0.01
    with pytest.raises(BadRequest, match="DynamicQuantizeLinear"):
        found.check()
