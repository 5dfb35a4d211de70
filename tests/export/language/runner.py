"""A numpy runner of exported decoders for these tests: one sequence, an in-place KV buffer, trees, rollback.

It knows the graph contract and nothing of the runtime under edgekit/runtime, so that the two check each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edgekit.bundle.manifest import Manifest


class Runner:
    """`forward` appends tokens after the committed ones; `keep` decides which of them stay."""

    def __init__(
        self, folder: Path, manifest: Manifest, capacity: int = 64, settings: Mapping[str, str] | None = None
    ) -> None:
        assert manifest.decoding is not None
        self.decoding = manifest.decoding
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        for key, value in (settings or {}).items():
            options.add_session_config_entry(key, value)
        graph = folder / manifest.parts["decoder"].graph
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_inputs()]
        kv = self.decoding.kv
        shape = (1, kv.heads, capacity, kv.head_dim)
        self.capacity, self.dtype = capacity, np.dtype(kv.dtype)
        self.buffers = {
            f"{layer}.{kind}": ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, self.dtype))
            for layer in range(kv.layers)
            for kind in ("key", "value")
        }
        self.window = self.decoding.sliding_window
        self.positions = np.zeros(0, np.int64)  # of the committed slots
        self.pending = np.zeros(0, np.int64)  # of the slots written by the last forward

    def forward(
        self, tokens: Sequence[int], parents: Sequence[int] | None = None, rows: Sequence[int] | None = None
    ) -> np.ndarray:
        """Logits (rows, vocab). parents[j] is the token that j hangs from, -1 the last committed one."""
        count, past = len(tokens), len(self.positions)
        parents = list(range(-1, count - 1)) if parents is None else list(parents)
        depth, sees = np.zeros(count, np.int64), np.eye(count, dtype=bool)
        for node, parent in enumerate(parents):
            if parent >= 0:
                depth[node], sees[node] = depth[parent] + 1, sees[node] | sees[parent]
        self.pending = past + depth
        feeds = {
            "input_ids": np.asarray(tokens, np.int64)[None],
            "position_ids": self.pending[None],
            "seqlens_k": np.array([past + count - 1], np.int32),
            "total_sequence_length": np.array(past + count, np.int32),
            "write_indices": np.array([past], np.int64),
            "rows": np.asarray(range(count) if rows is None else rows, np.int64),
            "attention_bias": self._bias(sees, None),
            "attention_bias_sliding": self._bias(sees, self.window),
        }
        return self._run({name: value for name, value in feeds.items() if name in self.names})

    def keep(self, path: Sequence[int] | None = None) -> None:
        """Commit the given tokens of the last forward, all by default; the others are forgotten."""
        path = range(len(self.pending)) if path is None else path
        past, chosen = len(self.positions), np.asarray(path, np.int64)
        for buffer in self.buffers.values():
            view = buffer.numpy()
            view[:, :, past : past + len(chosen)] = view[:, :, past + chosen]
        self.positions = np.concatenate([self.positions, self.pending[chosen]])

    def rollback(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.positions = self.positions[:length]

    def _bias(self, sees: np.ndarray, window: int | None) -> np.ndarray:
        """0 where visible, the lowest number where hidden; the window counts positions, not slots."""
        past, count = len(self.positions), len(sees)
        visible = np.concatenate([np.ones((count, past), bool), sees], axis=1)
        if window is not None:
            slots = np.concatenate([self.positions, self.pending])
            visible &= self.pending[:, None] - slots[None] < window
        width = past + count if self.decoding.dialect == "ort" else self.capacity
        bias = np.full((1, 1, count, width), np.finfo(self.dtype).min, self.dtype)
        bias[0, 0, :, : past + count][visible] = 0
        return bias

    def _run(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        binding = self.session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        binding.bind_output("logits")
        for name, buffer in self.buffers.items():
            binding.bind_ortvalue_input(f"past.{name}", buffer)
            binding.bind_ortvalue_output(f"present.{name}", buffer)
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()[0]
