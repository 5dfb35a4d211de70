"""Exported decoders answer like transformers, in every family and both dialects, however the text is fed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from edgekit.bundle.manifest import Manifest
from edgekit.export.language.families import LANGUAGE_FAMILIES
from tests.export.language import tiny
from tests.export.language.runner import Runner

pytestmark = pytest.mark.torch

TOLERANCE = 1e-4  # of the largest logit
LENGTH = 48  # three windows
TOKENS: list[int] = np.random.default_rng(0).integers(3, tiny.VOCAB, LENGTH).tolist()

Parties = tuple[Any, Runner]


@pytest.fixture(params=["ort", "std"])
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=tiny.CASES)
def parties(
    request: pytest.FixtureRequest,
    dialect: str,
    model_of: Callable[[str], tuple[Any, Path]],
    export_of: Callable[[str, str], tuple[Path, Manifest]],
) -> Parties:
    """The transformers model, and a fresh runner of its export."""
    folder, manifest = export_of(request.param, dialect)
    return model_of(request.param)[0], Runner(folder, manifest)


def close(logits: np.ndarray, wanted: np.ndarray) -> bool:
    return logits.shape == wanted.shape and float(np.abs(logits - wanted).max()) < TOLERANCE * np.abs(wanted).max()


def test_every_family_has_a_case() -> None:
    """The cases cover the table of families; gemma3 is gemma3_text under other names and has its own test."""
    assert {case.split("-")[0] for case in tiny.CASES} | {"gemma3"} == set(LANGUAGE_FAMILIES)


def test_one_call_past_the_window_equals_transformers(parties: Parties) -> None:
    """A whole text of three windows, in one call."""
    model, runner = parties
    assert close(runner.forward(TOKENS), tiny.reference(model, TOKENS))


def test_chunks_past_the_window_equal_transformers(parties: Parties) -> None:
    """The same text in chunks of every kind: long, short, single tokens, across the window's edge."""
    model, runner = parties
    wanted, start = tiny.reference(model, TOKENS), 0
    for size in (5, 1, 9, 1, 1, 14, 17):
        logits = runner.forward(TOKENS[start : start + size])
        runner.keep()
        assert close(logits, wanted[start : start + size])
        start += size
    assert start == LENGTH


def test_rolling_back_leaves_no_trace(parties: Parties) -> None:
    """Tokens that were committed and taken back change nothing after them."""
    model, runner = parties
    runner.forward(TOKENS[:20])
    runner.keep()
    runner.forward([7, 8, 9, 10, 11, 12])
    runner.keep()
    runner.rollback(20)
    assert close(runner.forward(TOKENS[20:]), tiny.reference(model, TOKENS)[20:])


def test_every_path_of_a_tree_equals_its_plain_text(parties: Parties) -> None:
    """A draft tree's nodes are scored as if each path alone had been written; an accepted path goes on from there."""
    model, runner = parties
    drafts, parents = [11, 12, 13, 14, 15, 16, 17], [-1, 0, 0, 1, 2, 2, 5]
    prefix = TOKENS[:21]
    runner.forward(prefix)
    runner.keep()
    logits = runner.forward(drafts, parents)
    for node in range(len(drafts)):
        path = path_to(node, parents)
        wanted = tiny.reference(model, prefix + [drafts[i] for i in path])[-1]
        assert close(logits[node], wanted), f"node {node}"
    path = path_to(6, parents)
    runner.keep(path)
    text = prefix + [drafts[i] for i in path]
    assert close(runner.forward([5, 6]), tiny.reference(model, [*text, 5, 6])[-2:])


def test_only_the_rows_asked_for_are_answered(parties: Parties) -> None:
    """`rows` picks positions of the call, in the order asked."""
    model, runner = parties
    wanted = tiny.reference(model, TOKENS[:10])
    assert close(runner.forward(TOKENS[:10], rows=[9, 2]), wanted[[9, 2]])


@pytest.mark.parametrize("case", [case for case in tiny.CASES if "sliding_window" in tiny.CASES[case][1]])
def test_the_window_is_in_the_bias(case: str, export_of: Callable[[str, str], tuple[Path, Manifest]]) -> None:
    """Without the window the same graph gives other logits past it, the same before it: the cases above can fail."""
    folder, manifest = export_of(case, "ort")
    right, blind = Runner(folder, manifest), Runner(folder, manifest)
    assert right.decoding.sliding_window == tiny.WINDOW
    blind.window = None
    with_window, without = right.forward(TOKENS), blind.forward(TOKENS)
    assert close(with_window[: tiny.WINDOW], without[: tiny.WINDOW])
    assert not close(with_window[tiny.WINDOW :], without[tiny.WINDOW :])


def test_standard_dialect_takes_ragged_batches(
    model_of: Callable[[str], tuple[Any, Path]], export_of: Callable[[str, str], tuple[Path, Manifest]]
) -> None:
    """Two texts at different lengths share one call of the `std` dialect."""
    model, _ = model_of("llama")
    folder, manifest = export_of("llama", "std")
    texts, committed, capacity = [TOKENS[:12], TOKENS[20:28]], [9, 5], 16
    singles = [Runner(folder, manifest, capacity) for _ in texts]
    feeds: dict[str, np.ndarray] = {}
    for text, length, runner in zip(texts, committed, singles, strict=True):
        runner.forward(text[:length])
        runner.keep()
    for name in singles[0].buffers:
        feeds[f"past.{name}"] = np.concatenate([runner.buffers[name].numpy() for runner in singles])
    new = np.array([text[length:] for text, length in zip(texts, committed, strict=True)], np.int64)
    start = np.array(committed, np.int64)
    positions = start[:, None] + np.arange(3)
    hidden = np.arange(capacity) > positions[:, :, None]
    feeds |= {
        "input_ids": new,
        "position_ids": positions,
        "write_indices": start,
        "rows": np.arange(3),
        "attention_bias": np.where(hidden, np.finfo(np.float32).min, np.float32(0))[:, None],
    }
    session = ort.InferenceSession(folder / manifest.parts["decoder"].graph, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], feeds)
    for text, answer in zip(texts, logits, strict=True):
        assert close(answer, tiny.reference(model, text)[-3:])


def path_to(node: int, parents: list[int]) -> list[int]:
    """Nodes from the root of the tree to `node`."""
    path: list[int] = []
    while node >= 0:
        path.insert(0, node)
        node = parents[node]
    return path
