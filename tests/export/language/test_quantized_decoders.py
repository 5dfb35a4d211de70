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
from edgekit.export.language.export import export_language, plan_language
from edgekit.export.language.store import CACHE_LINE
from edgekit.quant.precision import PRECISIONS
from tests.export.language import tiny
from tests.export.language.runner import Runner
from tests.export.language.test_decoder_parity import TOKENS, close

pytestmark = pytest.mark.torch

Models = Callable[[str], tuple[Any, Path]]
BLOCKED = [name for name, row in PRECISIONS.items() if row.block]
EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}  # the engine's own fusion multiplies in float32


def dequantized(model: Any, precision: str, dialect: str = "ort") -> Any:
    """Every matrix replaced by what its codes mean; of the embedding `std` keeps the float16 rounding."""
    row = PRECISIONS[precision]
    table = PRECISIONS[row.table or precision] if dialect == "ort" else row
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            embedding = name.endswith(("embed_tokens.weight", "wte.weight"))
            if embedding and dialect == "std":
                parameter.copy_(parameter.half())
            elif parameter.dim() == 2 and not name.endswith("wpe.weight"):
                # Conv1D stores (in, out): codes run along the input axis.
                input_major = ".c_" in name
                weight = parameter.T if input_major else parameter
                packing = table if embedding or name == "lm_head.weight" else row
                meant = torch.from_numpy(packing.unpack(packing.pack(weight.numpy()), weight.shape[1]))
                parameter.copy_(meant.T if input_major else meant)
    return model


def float_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in blocks multiply float32 activations, so that nothing but the codes tells an export from its twin."""
    for name, row in PRECISIONS.items():
        if row.block:
            monkeypatch.setitem(PRECISIONS, name, replace(row, accuracy_level=1))


@pytest.mark.parametrize("dialect", ["ort", "std"])
@pytest.mark.parametrize("precision", BLOCKED)
@pytest.mark.parametrize("case", ["llama", "phi3", "gemma3_text", "gpt2"])
def test_logits_are_those_of_the_dequantized_model(
    case: str, precision: str, dialect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With float32 activations the export equals the model whose weights are the unpacked codes, to rounding."""
    float_activations(monkeypatch)
    model = tiny.make_model(case, tie_word_embeddings=False)
    source = tiny.save_model(model, tmp_path / "source")
    manifest = export_language(source, tmp_path / "out", precision=precision, dialect=dialect)
    logits = Runner(tmp_path / "out", manifest, settings=EXACT).forward(TOKENS)
    assert close(logits, tiny.reference(dequantized(model, precision, dialect), TOKENS))


@pytest.mark.parametrize("dialect", ["ort", "std"])
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_integer_products_round_each_token_by_itself(
    case: str, dialect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8-row equals a twin that rounds every token to 127ths of its largest activation before each matrix.

    The twin counts in float64. A code that lies between two others may fall either way in the export's float32, which
    moves a token and those after it by as much as the rounding itself: so half of the tokens are equal, all are near.
    """
    float_activations(monkeypatch)
    model = tiny.make_model(case, tie_word_embeddings=False)
    source = tiny.save_model(model, tmp_path / "source")
    manifest = export_language(source, tmp_path / "out", precision="int8-row", dialect=dialect)
    logits = Runner(tmp_path / "out", manifest, settings=EXACT).forward(TOKENS)
    twin = dequantized(model, "int8-row", dialect).double()
    plain = tiny.reference(twin, TOKENS)
    for name, module in twin.named_modules():
        matrix = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        if matrix and (dialect == "std" or name != "lm_head"):
            module.register_forward_pre_hook(round_rows)
    rounded = tiny.reference(twin, TOKENS)
    errors, without = (np.abs(logits - other).max(-1) / np.abs(other).max() for other in (rounded, plain))
    assert np.median(errors) < 1e-5
    assert errors.max() < 2e-2
    assert without.min() > 1e-3


def round_rows(_module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Activations as their codes mean them: 255 levels, one step per token."""
    step = given[0].abs().amax(-1, keepdim=True) / 127
    return (torch.round(given[0] / step) * step, *given[1:])


@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.05), ("int8-row", 0.1), ("int4", 0.4), ("int4-128", 0.6)])
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


@pytest.mark.parametrize("precision", BLOCKED)
def test_widths_beside_the_block(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix whose input width is no multiple of the block is exact in `ort` and refused by name in `std`."""
    float_activations(monkeypatch)
    model = tiny.make_model("llama", intermediate_size=81 if "-" not in precision else 162)
    source = tiny.save_model(model, tmp_path / "source")
    manifest = export_language(source, tmp_path / "out", precision=precision)
    wanted = tiny.reference(dequantized(model, precision), TOKENS)
    assert close(Runner(tmp_path / "out", manifest).forward(TOKENS), wanted)
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.mlp\.out: (81|162) inputs"):
        export_language(source, tmp_path / "std", precision=precision, dialect="std")


@pytest.mark.parametrize("dialect", ["ort", "std"])
def test_everything_but_norms_and_embedding_is_quantized(dialect: Any, tmp_path: Path, model_of: Models) -> None:
    """Matrices are codes, the head's too where tied; norms are float32, the embedding codes, or float16 in `std`."""
    import onnx

    export_language(model_of("llama-tied")[1], tmp_path, precision="int4", dialect=dialect)
    model = onnx.load(str(tmp_path / "graphs" / "decoder.onnx"), load_external_data=False)
    types = {weight.name: onnx.TensorProto.DataType.Name(weight.data_type) for weight in model.graph.initializer}
    codes = {name for name in types if name.endswith(".codes")}
    assert len(codes) == 3 * 4 + (2 if dialect == "ort" else 1)
    assert {types[name] for name in codes} == {"UINT8" if dialect == "ort" else "INT4"}
    assert types.get("embedding") == (None if dialect == "ort" else "FLOAT16")
    assert {types[name] for name in types if "norm" in name} == {"FLOAT"}
    wide = {weight.name for weight in model.graph.initializer if len(weight.dims) == 2 and weight.data_type == 1}
    assert all(name.endswith((".scales", "cos", "sin")) for name in wide)


@pytest.mark.parametrize("precision", ["int8", "int8-row", "int4", "int4-128"])
def test_a_tied_table_lies_on_disk_once(precision: str, tmp_path: Path, model_of: Models) -> None:
    """Embedding and head are two initializers over one range of the data file, with one initializer of scales."""
    import onnx

    source = model_of("llama-tied")[1]
    export_language(source, tmp_path, precision=precision)
    model = onnx.load(str(tmp_path / "graphs" / "decoder.onnx"), load_external_data=False)
    weights = {weight.name: weight for weight in model.graph.initializer}
    places = [
        {entry.key: entry.value for entry in weights[f"{name}.codes"].external_data} for name in ("embedding", "head")
    ]
    assert places[0] == places[1]
    assert "location" in places[0]
    (gather,) = (node for node in model.graph.node if node.op_type == "GatherBlockQuantized")
    (head,) = (node for node in model.graph.node if node.op_type == "MatMulNBits" and "head.codes" in node.input)
    assert gather.input[2] == head.input[2] == "head.scales"
    row = PRECISIONS[PRECISIONS[precision].table or precision]
    codes = tiny.VOCAB * max(64, row.block) * (4 if row.code_bits == 4 else 8) // 8
    assert int(places[0]["length"]) == codes
    untied = tiny.save_model(tiny.make_model("llama-tied", tie_word_embeddings=False), tmp_path / "untied")
    export_language(untied, tmp_path / "twice", precision=precision)
    once, twice = ((tmp_path / place / "graphs" / "decoder.onnx.data").stat().st_size for place in (".", "twice"))
    table = codes + tiny.VOCAB * 4 * -(-64 // row.block)
    assert table <= twice - once < table + 2 * CACHE_LINE
    planned = plan_language(source, precision).parts[0].bytes
    assert plan_language(untied, precision).parts[0].bytes - planned == table


@pytest.mark.parametrize("precision", BLOCKED)
@pytest.mark.parametrize("hidden", [96, 160])
def test_gathered_rows_have_the_models_width(
    precision: str, hidden: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the hidden width is no multiple of the block, the padding of the embedding's last block is cut off."""
    float_activations(monkeypatch)
    model = tiny.make_model("llama-tied", hidden_size=hidden, head_dim=16)
    source = tiny.save_model(model, tmp_path / "source")
    manifest = export_language(source, tmp_path / "out", precision=precision)
    logits = Runner(tmp_path / "out", manifest).forward(TOKENS)
    assert close(logits, tiny.reference(dequantized(model, precision), TOKENS))


def test_a_token_of_zeros_stays_zero(tmp_path: Path) -> None:
    """A row whose activations are all zero has scale zero, and integer products make zeros of it."""
    model = tiny.make_model("llama-tied")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 0
    source = tiny.save_model(model, tmp_path / "source")
    manifest = export_language(source, tmp_path / "out", precision="int8-row")
    logits = Runner(tmp_path / "out", manifest).forward([7])
    np.testing.assert_array_equal(logits, np.zeros_like(logits))


@pytest.mark.parametrize("precision", ["int8-row", "int4-128"])
def test_a_row_does_not_depend_on_its_batch_mates(precision: str, tmp_path: Path) -> None:
    """A token ten times the size of the others leaves the logits of those before it bit for bit as they were."""
    model = tiny.make_model("llama-tied")
    with torch.no_grad():
        model.model.embed_tokens.weight[5] *= 10
    source = tiny.save_model(model, tmp_path / "source")
    manifest = export_language(source, tmp_path / "out", precision=precision)
    calm, wild = (Runner(tmp_path / "out", manifest).forward([11, 12, 13, last]) for last in (14, 5))
    np.testing.assert_array_equal(calm[:3], wild[:3])
    assert (calm[3] != wild[3]).any()
