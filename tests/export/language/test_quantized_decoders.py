"""Quantized decoders compute exactly what their stored codes mean, and stay near the model they came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgekit.errors import UnsupportedModel
from edgekit.export.language.export import export_language
from edgekit.quant.precision import PRECISIONS
from tests.export.language import tiny
from tests.export.language.runner import Runner
from tests.export.language.test_decoder_parity import TOKENS, close

pytestmark = pytest.mark.torch

Models = Callable[[str], tuple[Any, Path]]
EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}  # the engine's own fusion multiplies in float32


def dequantized(model: Any, precision: str) -> Any:
    """Every matrix replaced by what its codes mean, the embedding by its float16 rounding."""
    row = PRECISIONS[precision]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("embed_tokens.weight", "wte.weight")):
                parameter.copy_(parameter.half())
            elif parameter.dim() == 2 and not name.endswith("wpe.weight"):
                # Conv1D stores (in, out): codes run along the input axis.
                input_major = ".c_" in name
                weight = parameter.T if input_major else parameter
                meant = torch.from_numpy(row.unpack(row.pack(weight.numpy()), weight.shape[1]))
                parameter.copy_(meant.T if input_major else meant)
    return model


@pytest.mark.parametrize("dialect", ["ort", "std"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("case", ["llama", "phi3", "gemma3_text", "gpt2"])
def test_logits_are_those_of_the_dequantized_model(
    case: str, precision: str, dialect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With float32 activations the export equals the model whose weights are the unpacked codes, to rounding."""
    monkeypatch.setitem(PRECISIONS, precision, replace(PRECISIONS[precision], accuracy_level=1))
    model = tiny.make_model(case, tie_word_embeddings=False)
    source = tiny.save_model(model, tmp_path / "source")
    manifest = export_language(source, tmp_path / "out", precision=precision, dialect=dialect)
    logits = Runner(tmp_path / "out", manifest, settings=EXACT).forward(TOKENS)
    assert close(logits, tiny.reference(dequantized(model, precision), TOKENS))


@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.05), ("int4", 0.4)])
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_quantized_logits_stay_near_the_floats(
    case: str, precision: str, bound: float, tmp_path: Path, model_of: Models
) -> None:
    """As shipped, with int8 activations: fewer bits, more error, within bounds that random weights allow."""
    model, source = model_of(case)
    manifest = export_language(source, tmp_path, precision=precision)
    wanted = tiny.reference(model, TOKENS)
    error = np.abs(Runner(tmp_path, manifest).forward(TOKENS) - wanted).max() / np.abs(wanted).max()
    assert 1e-4 < error < bound


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_widths_beside_the_block(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix whose input width is no multiple of 32 is exact in `ort` and refused by name in `std`."""
    monkeypatch.setitem(PRECISIONS, precision, replace(PRECISIONS[precision], accuracy_level=1))
    model = tiny.make_model("llama", intermediate_size=81)
    source = tiny.save_model(model, tmp_path / "source")
    manifest = export_language(source, tmp_path / "out", precision=precision)
    wanted = tiny.reference(dequantized(model, precision), TOKENS)
    assert close(Runner(tmp_path / "out", manifest).forward(TOKENS), wanted)
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.mlp\.out: 81 inputs"):
        export_language(source, tmp_path / "std", precision=precision, dialect="std")


@pytest.mark.parametrize("dialect", ["ort", "std"])
def test_everything_but_norms_and_embedding_is_quantized(dialect: Any, tmp_path: Path, model_of: Models) -> None:
    """Matrices are codes, the head's too where it is tied; the embedding is float16, norms and biases are float32."""
    import onnx

    export_language(model_of("llama-tied")[1], tmp_path, precision="int4", dialect=dialect)
    model = onnx.load(str(tmp_path / "graphs" / "decoder.onnx"), load_external_data=False)
    types = {weight.name: onnx.TensorProto.DataType.Name(weight.data_type) for weight in model.graph.initializer}
    codes = {name for name in types if name.endswith(".codes")}
    assert len(codes) == 3 * 4 + 1
    assert {types[name] for name in codes} == {"UINT8" if dialect == "ort" else "INT4"}
    assert types["embedding"] == "FLOAT16"
    assert {types[name] for name in types if "norm" in name} == {"FLOAT"}
    wide = {weight.name for weight in model.graph.initializer if len(weight.dims) == 2 and weight.data_type == 1}
    assert all(name.endswith((".scales", "cos", "sin")) for name in wide)
