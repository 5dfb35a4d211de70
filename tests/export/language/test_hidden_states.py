"""`hidden.k` is the residual stream after k layers, as transformers has it, at the rows asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
import pytest
import torch

from edgekit.bundle.manifest import Manifest, TensorSpec
from edgekit.bundle.store import new_bundle, read_bundle
from edgekit.bundle.validate import check_manifest
from edgekit.errors import BadManifest, BadRequest
from edgekit.export.language.export import export_language, plan_language
from tests.export.language import tiny
from tests.export.language.test_decoder_parity import TOKENS, close

pytestmark = pytest.mark.torch

Models = Callable[[str], tuple[Any, Path]]
LAYERS = 3


def answers(folder: Path, manifest: Manifest, tokens: list[int], rows: list[int]) -> dict[str, np.ndarray]:
    """Every output of one first call on an empty cache."""
    assert manifest.decoding is not None
    kv, part, count = manifest.decoding.kv, manifest.parts["decoder"], len(tokens)
    session = ort.InferenceSession(folder / part.graph, providers=["CPUExecutionProvider"])
    ids = np.arange(count)
    capacity = count if manifest.decoding.dialect == "ort" else 64
    feeds: dict[str, Any] = {
        "input_ids": np.array([tokens]),
        "position_ids": ids[None],
        "seqlens_k": np.array([count - 1], np.int32),
        "total_sequence_length": np.array(count, np.int32),
        "write_indices": np.array([0]),
        "rows": np.array(rows),
    }
    for name, window in (("attention_bias", None), ("attention_bias_sliding", manifest.decoding.sliding_window)):
        slots = np.arange(capacity)
        seen = slots <= ids[:, None]
        if window is not None:
            seen &= ids[:, None] - slots < window
        feeds[name] = np.where(seen, 0, np.finfo(kv.dtype).min).astype(kv.dtype)[None, None]
    for cache in (f"past.{layer}.{half}" for layer in range(kv.layers) for half in ("key", "value")):
        feeds[cache] = np.zeros((1, kv.heads, 64, kv.head_dim), kv.dtype)
    wanted = [spec.name for spec in part.outputs]
    named = {spec.name for spec in part.inputs}
    values = session.run(wanted, {name: value for name, value in feeds.items() if name in named})
    return dict(zip(wanted, values, strict=True))


def streams(model: Any, tokens: list[int]) -> list[np.ndarray]:
    """transformers' residual stream after 1, 2, ... layers; of the last it only shows the norm, so a hook reads it."""
    last: list[np.ndarray] = []
    norm = model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm
    handle = norm.register_forward_pre_hook(lambda _module, given: last.append(given[0][0].numpy()))
    with torch.no_grad():
        states = model(torch.tensor([tokens]), use_cache=False, output_hidden_states=True).hidden_states
    handle.remove()
    return [*(state[0].numpy() for state in states[1:-1]), last[0]]


@pytest.mark.parametrize("dialect", ["ort", "std"])
@pytest.mark.parametrize("case", ["llama", "qwen3", "olmo2", "gemma2", "gemma3_text", "granite", "gpt2"])
def test_hidden_states_are_transformers_own(case: str, dialect: Any, tmp_path: Path, model_of: Models) -> None:
    """After every layer, the last before its norm; and the logits are those of an export without them."""
    model, source = model_of(case)
    manifest = export_language(source, tmp_path, dialect=dialect, hidden=(1, 2, 3))
    rows = [0, 20, 47]
    given = answers(tmp_path, manifest, TOKENS, rows)
    for k, wanted in enumerate(streams(model, TOKENS), start=1):
        assert close(given[f"hidden.{k}"][0], wanted[rows]), f"after {k} layers"
    assert close(given["logits"][0], tiny.reference(model, TOKENS)[rows])


def test_hidden_states_are_outputs_of_the_part(tmp_path: Path, model_of: Models) -> None:
    """Asked for in any order and twice, they stand once each, in order, between logits and cache, also in the plan."""
    source = model_of("llama")[1]
    with new_bundle(tmp_path / "b") as draft:
        draft.seal(export_language(source, draft.root, precision="int4", hidden=(3, 1, 3)))
    outputs = read_bundle(tmp_path / "b").manifest.parts["decoder"].outputs
    assert [spec.name for spec in outputs[:4]] == ["logits", "hidden.1", "hidden.3", "present.0.key"]
    assert outputs[1] == TensorSpec("hidden.1", "float32", ("batch", "rows", 64))
    assert plan_language(source, "int4", "ort", (1, 3)).parts[0].outputs == outputs


def test_hidden_states_of_a_half_precision_model_are_float32(tmp_path: Path, model_of: Models) -> None:
    """Whoever reads them needs to know one type: fp16 streams are cast."""
    model, source = model_of("llama")
    manifest = export_language(source, tmp_path, precision="fp16", hidden=(2, 3))
    given = answers(tmp_path, manifest, TOKENS[:16], list(range(16)))
    for k in (2, 3):
        wanted = streams(model, TOKENS[:16])[k - 1]
        assert given[f"hidden.{k}"].dtype == np.float32
        assert np.abs(given[f"hidden.{k}"][0] - wanted).max() < 2e-2 * np.abs(wanted).max()


@pytest.mark.parametrize("k", [0, LAYERS + 1, -1])
def test_layers_that_are_not_there_are_refused(k: int, model_of: Models) -> None:
    """A layer outside 1 to the layer count is a bad request that says what there is."""
    with pytest.raises(BadRequest, match=f"after layer {k}: the model has layers 1 to 3"):
        plan_language(model_of("llama")[1], hidden=(1, k))


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("hidden.9", "float32", ("batch", "rows", 64)),
        ("hidden.x", "float32", ("batch", "rows", 64)),
        ("hidden.1", "float16", ("batch", "rows", 64)),
        ("hidden.1", "float32", ("batch", 64)),
    ],
)
def test_a_manifest_with_another_hidden_state_is_refused(
    name: str, dtype: Any, shape: Any, tmp_path: Path, model_of: Models
) -> None:
    """A hidden state of no layer, of another type or without rows contradicts the decoding block."""
    with new_bundle(tmp_path / "b") as draft:
        sealed = draft.seal(export_language(model_of("llama")[1], draft.root, hidden=(1,)))
    part = sealed.parts["decoder"]
    outputs = tuple(TensorSpec(name, dtype, shape) if spec.name == "hidden.1" else spec for spec in part.outputs)
    wrong = msgspec.structs.replace(part, outputs=outputs)
    check_manifest(sealed)
    with pytest.raises(BadManifest, match="hidden"):
        check_manifest(msgspec.structs.replace(sealed, parts={"decoder": wrong}))
