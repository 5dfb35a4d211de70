"""What Python costs per decoded token: everything but ONNX Runtime's own run call, by section.

A random checkpoint of Qwen2.5-0.5B's shape (24 layers, 2 KV heads of 64, vocabulary 151,936) is exported at int4 and
decoded; the engine's run call is timed apart, and what is left is ours. Samplers are timed on rows of that vocabulary.

    python benchmarks/decode_overhead.py [--tokens 64] [--rounds 5] [--threads 2] [--no-spinning]
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import interleaved, record, summary

from edgekit.bundle.manifest import Decoding
from edgekit.export.language.export import export_language
from edgekit.runtime.backends import open_session
from edgekit.runtime.llm.accept import own_draw
from edgekit.runtime.llm.drafters import NoDraft
from edgekit.runtime.llm.generate import generate
from edgekit.runtime.llm.probs import Sampling
from edgekit.runtime.llm.verifier import LocalVerifier

VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS = 151936, 896, 4864, 24, 14, 2
CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SAMPLERS = {
    "greedy": Sampling(),
    "temperature 0.8, top-p 0.95": Sampling(temperature=0.8, top_p=0.95),
    "temperature 0.8, top-k 50, top-p 0.95": Sampling(temperature=0.8, top_k=50, top_p=0.95),
    "temperature 1": Sampling(temperature=1.0),
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint."""
    width = KV_HEADS * HIDDEN // HEADS
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        found |= {at + f"{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        for name, rows in (("q", HIDDEN), ("k", width), ("v", width)):
            found |= {at + f"self_attn.{name}_proj.weight": (rows, HIDDEN), at + f"self_attn.{name}_proj.bias": (rows,)}
        found |= {at + "self_attn.o_proj.weight": (HIDDEN, HIDDEN), at + "mlp.down_proj.weight": (HIDDEN, FFN)}
        found |= {at + f"mlp.{name}_proj.weight": (FFN, HIDDEN) for name in ("gate", "up")}
    return found


def write_checkpoint(folder: Path) -> None:
    """A checkpoint in bfloat16, random numbers repeated, streamed to disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer_config.json").write_text("{}")
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    noise = (np.random.default_rng(0).normal(size=1 << 20) * 0.02).astype(np.float32)
    block = (noise.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    header, at = {}, 0
    for name, shape in shapes().items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        while at > 0:
            at -= out.write(block[: min(at, len(block))])


class Clock:
    """Wraps callables and adds up their wall time, less that of wrapped callables inside them."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._inside = [0.0]

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                self.spent[name] += took - self._inside.pop()
                self._inside[-1] += took

        return timed


class TimedEngine:
    """The engine of a session, its run call on the clock."""

    def __init__(self, engine: Any, clock: Clock) -> None:
        self._engine = engine
        self.run_with_iobinding = clock.wrap("engine", engine.run_with_iobinding)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def decode(session: Any, decoding: Decoding, sampling: Sampling, tokens: int, sections: bool) -> dict[str, float]:
    """Milliseconds per token of each section of one decode, after the prefill; `loop` is what no other claims.

    Without `sections` only the engine and the whole are timed: the clock's own cost is then one pair of readings.
    """
    clock = Clock()
    engine = session._engine
    session._engine = TimedEngine(engine, clock)
    verifier = LocalVerifier(session, decoding)
    session._engine = engine
    drafter, accept = NoDraft(), partial(own_draw, draw=sampling)
    if sections:
        verifier.score = clock.wrap("score: feeds and cache", verifier.score)  # type: ignore[method-assign]
        verifier.keep = clock.wrap("keep", verifier.keep)  # type: ignore[method-assign]
        verifier._kv.binding.run = clock.wrap("binding", verifier._kv.binding.run)  # type: ignore[method-assign]
        accept = clock.wrap("sample and accept", accept)  # type: ignore[assignment]
    steps = generate(
        list(range(100, 164)), drafter=drafter, verifier=verifier, accept=accept, max_new_tokens=tokens + 1
    )
    next(steps)
    clock.spent.clear()
    start = time.perf_counter()
    count = sum(len(step.tokens) for step in steps)
    whole = time.perf_counter() - start
    ms = {name: 1e3 * spent / count for name, spent in clock.spent.items()}
    ms["loop"] = 1e3 * whole / count - sum(ms.values())
    ms["overhead"] = 1e3 * whole / count - ms["engine"]
    return ms


def decode_rows(args: argparse.Namespace, session: Any, decoding: Decoding) -> list[dict[str, Any]]:
    """Overhead of whole decodes, samplers in turn, then the same by section."""
    rows = []
    names = list(SAMPLERS)[:2]
    for sections in (False, True):
        found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in names}
        for turn in range(args.rounds + 1):
            for name in names:
                for part, ms in decode(session, decoding, SAMPLERS[name], args.tokens, sections).items():
                    if turn:
                        found[name][part].append(ms)
        for name in names:
            parts = found[name] if sections else {part: found[name][part] for part in ("overhead", "engine")}
            common = {"what": "decode", "sampling": name, "profiled": sections, "unit": "ms/token"}
            rows += [{**common, "part": part, **summary(values)} for part, values in parts.items()]
    return rows


def sampling_rows(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of one draw on rows of the vocabulary: flat as random weights give, peaked as trained ones do."""
    random = np.random.default_rng(0)
    zipf = -1.3 * np.log(np.arange(1, VOCAB + 1)) + random.normal(size=VOCAB) * 0.3
    kinds = {"flat": random.normal(size=VOCAB), "peaked": random.permutation(zipf)}
    rows = []
    for kind, values in kinds.items():
        logits = values.astype(np.float32)
        times = interleaved({name: partial(draw, logits, (0,) * 9) for name, draw in SAMPLERS.items()}, rounds, 5)
        rows += [
            {"what": "draw", "row": kind, "sampling": name, "unit": "ms", **summary(ms)} for name, ms in times.items()
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-spinning", dest="spinning", action="store_false", help="let waiting threads sleep")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source, staging = Path(temporary) / "source", Path(temporary) / "export"
        write_checkpoint(source)
        staging.mkdir()
        manifest = export_language(source, staging, precision="int4")
        assert manifest.decoding is not None
        session = open_session(
            staging / manifest.parts["decoder"].graph, "cpu", threads=args.threads, spinning=args.spinning
        )
        rows = decode_rows(args, session, manifest.decoding)
    rows += sampling_rows(100)
    record("decode_overhead", [{**row, "threads": args.threads, "spinning": args.spinning} for row in rows])


if __name__ == "__main__":
    main()
