"""After any sequence of drafts, accepts, rollbacks, forks and fetches the cache is what a fresh start computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.runtime.backends import Array, open_session
from edgekit.runtime.llm import kv
from edgekit.runtime.llm.prefix import PrefixStore
from edgekit.runtime.llm.tree import TokenTree
from edgekit.runtime.llm.verifier import LocalVerifier

pytest.importorskip("torch")
tiny = pytest.importorskip("tests.export.language.tiny")

FIRST = 8  # slots: small, so that short texts outgrow the buffers several times
LONGEST = 60  # tokens of a text here: over three windows
ROOM = 40  # tokens in the prefix store, so that it evicts
TOLERANCE = 1e-5  # of the largest value: float32 sums in another order


class FarSession:
    """A session whose buffers the host can only copy, as those of a GPU."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.device, self.inputs, self.outputs = session.device, session.inputs, session.outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return self._session.run(feeds)

    def bind(self) -> Any:
        binding = self._session.bind()
        read = binding.read
        binding.live, binding.read = False, lambda name: read(name).copy()
        return binding


@dataclass
class Line:
    """One text and the verifier that remembers it."""

    verifier: LocalVerifier
    tokens: tuple[int, ...]


class Model:
    """One exported decoder, its verifiers, and what a fresh start says."""

    def __init__(self, folder: Path, manifest: Any, far: bool) -> None:
        session = open_session(folder / manifest.parts["decoder"].graph, threads=1)
        self.session = FarSession(session) if far else session
        self.decoding = manifest.decoding
        layout = self.decoding.kv
        self.slot = 2 * layout.layers * layout.heads * layout.head_dim * np.dtype(layout.dtype).itemsize

    def verifier(self, **options: Any) -> LocalVerifier:
        return LocalVerifier(self.session, self.decoding, **options)

    def scratch(self, tokens: tuple[int, ...], exact: bool) -> tuple[Array, Array]:
        """Keys and values of all but the last token, and the logits after it."""
        fresh = self.verifier(granule=2 if exact else 1)
        logits = fresh.score(tokens, TokenTree.chain(tokens[-1])).logits.copy()
        return fresh._kv.snapshot(0, len(tokens) - 1), logits


@pytest.fixture(scope="module", autouse=True)
def _small_buffers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv, "FIRST_CAPACITY", FIRST)
        yield


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """(case, dialect) -> its Model, exported once."""
    from edgekit.export.language.export import export_language

    made: dict[tuple[str, str], Any] = {}

    def get(case: str, dialect: str, far: bool = False) -> Model:
        if (case, dialect) not in made:
            source = tiny.save_model(tiny.make_model(case), tmp_path_factory.mktemp(case))
            folder = tmp_path_factory.mktemp(f"{case}-{dialect}")
            made[case, dialect] = folder, export_language(source, folder, dialect=dialect)
        return Model(*made[case, dialect], far)

    return get


TOKENS = st.integers(3, tiny.VOCAB - 1)
MODELS = pytest.mark.parametrize(
    ("case", "dialect"), [(case, dialect) for case in ("llama-tied", "gemma3_text") for dialect in ("ort", "std")]
)
STRESS = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def trees(draw: st.DrawFn, root: int, chain: bool) -> TokenTree:
    """Up to eight nodes: a chain, or hanging from any mix of earlier ones."""
    drafts = draw(st.lists(TOKENS, max_size=7))
    if chain:
        return TokenTree.chain(root, drafts)
    tokens, parents = [root], [-1]
    for token in drafts:
        parent = draw(st.integers(0, len(tokens) - 1))
        if (parent, token) not in zip(parents, tokens, strict=True):
            tokens.append(token)
            parents.append(parent)
    return TokenTree(tuple(tokens), tuple(parents))


@st.composite
def paths(draw: st.DrawFn, tree: TokenTree) -> list[int]:
    """A way from the root, that ends anywhere."""
    path = [0]
    while children := [node for node in range(len(tree)) if tree.parents[node] == path[-1]]:
        if draw(st.integers(0, 3)) == 0:
            break
        path.append(draw(st.sampled_from(children)))
    return path


def act(data: st.DataObject, model: Model, lines: list[Line], store: PrefixStore, exact: bool) -> None:
    """One random thing that may happen to one of the texts."""
    line = data.draw(st.sampled_from(lines))
    match data.draw(st.sampled_from(["draft", "draft", "draft", "forget", "edit", "fork", "remember", "fresh"])):
        case "draft":
            tree = data.draw(trees(line.tokens[-1], exact)).pruned(7, LONGEST - len(line.tokens))
            if len(line.tokens) + len(tree) < LONGEST:
                line.verifier.score(line.tokens, tree)
                path = data.draw(paths(tree))
                line.verifier.keep(path)
                line.tokens += (*(tree.tokens[node] for node in path[1:]), data.draw(TOKENS))
        case "forget":
            line.verifier.rollback(data.draw(st.integers(0, len(line.tokens))))
        case "edit":
            other = data.draw(st.sampled_from(lines)).tokens
            line.tokens = (*other[: data.draw(st.integers(0, len(other)))], *data.draw(st.lists(TOKENS, min_size=1)))
        case "fork" if len(lines) < 4:
            lines.append(Line(line.verifier.fork(), line.tokens))
        case "remember":
            line.verifier.remember()
        case "fresh":
            line.verifier = model.verifier(
                granule=2 if exact else 1, prefixes=store, chunk=data.draw(st.sampled_from([3, 512]))
            )


def run(data: st.DataObject, model: Model, exact: bool) -> None:
    """Random acts on texts that fork; then every one of them against a fresh start."""
    store = PrefixStore(ROOM * model.slot)
    start = tuple(data.draw(st.lists(TOKENS, min_size=1, max_size=40)))
    lines = [Line(model.verifier(granule=2 if exact else 1, prefixes=store), start)]
    for _ in range(data.draw(st.integers(3, 20))):
        act(data, model, lines, store, exact)
    assert store.bytes <= ROOM * model.slot
    for line in lines:
        logits = line.verifier.score(line.tokens, TokenTree.chain(line.tokens[-1])).logits
        cached = line.verifier._kv.snapshot(0, len(line.tokens) - 1)
        for found, right in zip((cached, logits), model.scratch(line.tokens, exact), strict=True):
            tolerance = 0 if exact else TOLERANCE * float(np.abs(right).max(initial=0))
            np.testing.assert_allclose(found, right, rtol=0, atol=tolerance)


@MODELS
@STRESS
@given(data=st.data())
def test_any_sequence_of_trees_leaves_the_cache_of_a_fresh_start(model_of, case, dialect, data):
    """Branching drafts, rollbacks to anywhere, forks that both go on, fetches and growth: equal up to rounding."""
    run(data, model_of(case, dialect), exact=False)


@MODELS
@STRESS
@given(data=st.data())
def test_any_sequence_of_chains_is_bit_equal_to_a_fresh_start(model_of, case, dialect, data):
    """With chains and never a lone row the cache and the next logits are the same bits, stored prefixes included."""
    run(data, model_of(case, dialect), exact=True)


@pytest.mark.parametrize("dialect", ["ort", "std"])
def test_no_way_of_cutting_a_text_into_runs_changes_a_bit(model_of, dialect):
    """Attention takes query rows in tiles of 2 * head_dim: a run must not end in a tile of one row either."""
    model = model_of("llama-tied", dialect)
    text = tuple(np.random.default_rng(0).integers(3, tiny.VOCAB, 4 * model.decoding.kv.head_dim + 3).tolist())
    right = model.scratch(text, exact=True)[0]
    for chunk in range(1, len(text)):
        verifier = model.verifier(granule=2, chunk=chunk)
        verifier.score(text, TokenTree.chain(text[-1]))
        np.testing.assert_array_equal(verifier._kv.snapshot(0, len(text) - 1), right, err_msg=f"{chunk} tokens a run")


@STRESS
@given(data=st.data())
def test_buffers_out_of_reach_are_right_as_well(model_of, data):
    """On a device whose memory the host only copies, the same sequences leave the same cache."""
    run(data, model_of("gemma3_text", "ort", far=True), exact=False)
