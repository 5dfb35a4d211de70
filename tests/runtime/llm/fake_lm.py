"""A language model in a few lines of Python that checks what it is fed.

Each cache slot remembers the token and position it was written with. A row's logits are a fixed random function of the
tokens it sees, ordered by position; any mistake in masks, positions, slots or rows raises or changes the logits.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edgekit.bundle.manifest import Decoding, KVCacheLayout, TensorSpec
from edgekit.runtime.backends import Array
from edgekit.runtime.backends.fake import FakeSession
from edgekit.runtime.llm.verifier import LocalVerifier

VOCAB = 12
TOKEN, POSITION = 0, 1  # what the two elements of a fake key hold, one added so that an unwritten slot is 0


def logits_after(tokens: Sequence[int], window: int | None = None) -> Array:
    """The fake model itself: float32 (VOCAB,), of the whole text and, if it has a window, again of the text's end."""
    seen = [bytes(tokens), bytes(tokens[-window:]) if window else b""]
    return sum(np.random.default_rng(zlib.crc32(part)).normal(size=VOCAB) for part in seen).astype(np.float32)


class FakeLM:
    """The answer function of a FakeSession, for every dialect, with or without a sliding layer."""

    def __init__(self, dialect: str = "ort", window: int | None = None, context: int = 600, dtype: str = "float32"):
        self.dialect, self.window, self.dtype = dialect, window, dtype
        self.decoding = Decoding(
            part="decoder",
            dialect=dialect,
            context_length=context,
            vocab_size=VOCAB,
            kv=KVCacheLayout(layers=1, heads=1, head_dim=2, dtype=dtype),
            eos=(0,),
            sliding_window=window,
        )

    def session(self, *, live: bool = True) -> FakeSession:
        ids = [TensorSpec(name, "int64", (1, "seq")) for name in ("input_ids", "position_ids")]
        if self.dialect == "ort":
            place = [TensorSpec("seqlens_k", "int32", (1,)), TensorSpec("total_sequence_length", "int32", ())]
        elif self.dialect == "std":
            place = [TensorSpec("write_indices", "int64", (1,))]
        else:
            place = [TensorSpec("attention_mask", "int64", (1, "total"))]
        names = ["attention_bias"] + (["attention_bias_sliding"] if self.window else [])
        names = [] if self.dialect == "concat" else names
        biases = [TensorSpec(name, self.dtype, (1, 1, "seq", "total")) for name in names]
        sides = ("key", "value")
        kv = [TensorSpec(f"past.0.{side}", self.dtype, (1, 1, "capacity", 2)) for side in sides]
        present = [TensorSpec(f"present.0.{side}", self.dtype, (1, 1, "capacity", 2)) for side in sides]
        rows = TensorSpec("rows", "int64", ("rows",))
        logits = TensorSpec("logits", "float32", (1, "rows", VOCAB))
        return FakeSession(self.answer, [*ids, *place, rows, *biases, *kv], [logits, *present], live=live)

    def verifier(self, *, live: bool = True, chunk: int = 512) -> LocalVerifier:
        return LocalVerifier(self.session(live=live), self.decoding, chunk=chunk)

    def answer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        if self.dialect == "concat":
            return self._behind(feeds)
        ids, positions = feeds["input_ids"][0], feeds["position_ids"][0]
        keys = feeds["past.0.key"].copy()
        count, capacity = len(ids), keys.shape[2]
        if self.dialect == "ort":
            total = int(feeds["total_sequence_length"])
            assert feeds["seqlens_k"][0] == total - 1
            start, width = total - count, total
            if start == 0:  # GroupQueryAttention's own trap: a first prompt's positions count from 0, whatever is fed
                positions = np.arange(count)
        else:
            start, width = int(feeds["write_indices"][0]), capacity
        keys[0, 0, start : start + count] = np.stack([ids, positions], axis=-1) + 1
        bias = _visible(feeds["attention_bias"], (1, 1, count, width))
        sliding = _visible(feeds["attention_bias_sliding"], (1, 1, count, width)) if self.window else None
        out = []
        for row in feeds["rows"]:
            text = self._text(keys[0, 0], bias[row])
            assert len(text) == positions[row] + 1
            if sliding is not None:
                assert self._text(keys[0, 0], sliding[row], len(text)) == text[-self.window :]
            out.append(logits_after(text, self.window))
        return {"logits": np.stack(out)[None], "present.0.key": keys, "present.0.value": keys}

    def _behind(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """New keys behind the old ones; every row sees all slots up to its own, and the window is the graph's own."""
        ids, positions, past = feeds["input_ids"][0], feeds["position_ids"][0], feeds["past.0.key"]
        keys = np.concatenate([past, (np.stack([ids, positions], axis=-1) + 1)[None, None].astype(past.dtype)], axis=2)
        total, start = keys.shape[2], past.shape[2]
        np.testing.assert_array_equal(feeds["attention_mask"], np.ones((1, total), np.int64))
        every = np.ones(total, bool)
        texts = [self._text(keys[0, 0, : start + row + 1], every[: start + row + 1]) for row in feeds["rows"]]
        logits = np.stack([logits_after(text, self.window) for text in texts])[None]
        return {"logits": logits, "present.0.key": keys, "present.0.value": keys}

    def _text(self, slots: Array, visible: Array, length: int | None = None) -> list[int]:
        """The visible tokens by position: each position once, without gaps, up to `length`."""
        seen = slots[: len(visible)][visible].astype(int) - 1
        seen = seen[np.argsort(seen[:, POSITION])]
        end = len(seen) if length is None else length
        assert seen[:, POSITION].tolist() == list(range(end - len(seen), end))
        return seen[:, TOKEN].tolist()


def _visible(bias: Array, shape: tuple[int, ...]) -> Array:
    """Rows of booleans; a bias holds 0 or the lowest finite number and nothing else."""
    assert bias.shape == shape
    assert np.isin(bias, (0, np.finfo(bias.dtype).min)).all()
    return bias[0, 0] == 0


def greedy_text(prompt: Sequence[int], count: int, window: int | None = None, ends: Sequence[int] = ()) -> list[int]:
    """What the fake model says greedily, computed without any of edgekit."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and (len(tokens) == len(prompt) or tokens[-1] not in ends):
        tokens.append(int(logits_after(tokens, window).argmax()))
    return tokens[len(prompt) :]


class FakeBundle:
    """A folder and a manifest, as a pipeline wants them."""

    def __init__(self, root: Path, manifest: object) -> None:
        self.root, self.manifest = root, manifest
