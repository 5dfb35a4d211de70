"""The export as a whole: contract, plan, provenance, progress, and a bundle that seals and reads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.bundle.manifest import AxisRange
from edgekit.bundle.store import new_bundle, read_bundle
from edgekit.export.language.export import DIALECTS, export_language, plan_language
from edgekit.export.language.weights import Checkpoint
from edgekit.quant.precision import PRECISIONS
from tests.export.language import tiny

pytestmark = pytest.mark.torch

Models = Callable[[str], tuple[Any, Path]]

HEAD = {
    "ort": ["input_ids", "position_ids", "seqlens_k", "total_sequence_length", "rows"],
    "std": ["input_ids", "position_ids", "write_indices", "rows"],
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("case", "biases"),
    [
        ("llama", ["attention_bias"]),
        ("mistral", ["attention_bias_sliding"]),
        ("gemma2", ["attention_bias", "attention_bias_sliding"]),
    ],
)
def test_the_graph_has_the_contracts_signature(
    case: str, biases: list[str], dialect: str, export_of: Callable[[str, str], tuple[Path, Any]]
) -> None:
    """Inputs and outputs are the contract's, in its order; a bias is there when some layer needs it."""
    _, manifest = export_of(case, dialect)
    part = manifest.parts["decoder"]
    caches = [f"{i}.{kind}" for i in range(3) for kind in ("key", "value")]
    assert [spec.name for spec in part.inputs] == [*HEAD[dialect], *biases, *(f"past.{name}" for name in caches)]
    assert [spec.name for spec in part.outputs] == ["logits", *(f"present.{name}" for name in caches)]
    shapes = {spec.name: spec.shape for spec in (*part.inputs, *part.outputs)}
    wide = (1, 1, "seq", "total") if dialect == "ort" else ("batch", 1, "seq", "capacity")
    assert {shapes[name] for name in biases} == {wide}
    assert shapes["logits"] == ("batch", "rows", tiny.VOCAB)
    assert shapes["rows"] == ("rows",)
    if dialect == "ort":
        assert shapes["total_sequence_length"] == ()


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sealed_bundle_reads_back(precision: str, dialect: Any, tmp_path: Path, model_of: Models) -> None:
    """Every precision in every dialect seals into a bundle that passes its own full check."""
    target = tmp_path / "model.bundle"
    with new_bundle(target) as draft:
        draft.seal(export_language(model_of("qwen3")[1], draft.root, precision=precision, dialect=dialect))
    manifest = read_bundle(target).manifest
    assert manifest.decoding is not None
    assert (manifest.task, manifest.family, manifest.decoding.dialect) == ("text-generation", "qwen3", dialect)
    assert manifest.decoding.sliding_window == tiny.WINDOW
    assert manifest.decoding.context_length == 128
    assert (manifest.decoding.eos, manifest.decoding.bos) == ((2,), 1)
    assert manifest.parts["decoder"].precision == manifest.precision.requested == precision
    assert manifest.axes["batch"] == (AxisRange(1, 1) if dialect == "ort" else AxisRange())


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_plan_is_what_is_made(
    precision: str, dialect: Any, tmp_path: Path, model_of: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan reads no weight, and its shapes, parameters and bytes are those of the export."""
    model, source = model_of("llama")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "read", lambda self, name: pytest.fail(f"read {name}"))
        plan = plan_language(source, precision, dialect)
    manifest = export_language(source, tmp_path, precision=precision, dialect=dialect)
    made, (part,) = manifest.parts["decoder"], plan.parts
    assert (part.inputs, part.outputs, part.parameters) == (made.inputs, made.outputs, made.parameters)
    assert made.parameters == sum(parameter.numel() for parameter in model.parameters())
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert plan.disk_bytes == pytest.approx(sum(file.stat().st_size for file in files), rel=0.1)
    assert plan.peak_bytes > part.bytes


def test_longrope_is_noted_in_plan_and_manifest(tmp_path: Path, model_of: Models) -> None:
    """A context that ends early says so before and after."""
    source = model_of("phi3-longrope")[1]
    manifest = export_language(source, tmp_path)
    assert manifest.decoding is not None
    assert manifest.decoding.context_length == 64
    assert "64 of 128" in manifest.notes["export"]
    assert "64 of 128" in plan_language(source).notes[0]


def test_same_source_same_bytes(tmp_path: Path, model_of: Models) -> None:
    """An export is a function of its source: graph, data and manifest repeat; other weights, other fingerprint."""
    _, source = model_of("llama")
    first, second = (export_language(source, tmp_path / name, precision="int4") for name in "ab")
    assert first == second
    for file in ("decoder.onnx", "decoder.onnx.data"):
        a, b = ((tmp_path / name / "graphs" / file).read_bytes() for name in "ab")
        assert a == b
    other = export_language(model_of("llama-tied")[1], tmp_path / "c", precision="int4")
    assert other.provenance.source_sha256 != first.provenance.source_sha256


def test_progress_reaches_the_end(tmp_path: Path, model_of: Models) -> None:
    """Every stage reports shares that rise to 1."""
    seen: dict[str, list[float]] = {}
    export_language(
        model_of("llama")[1], tmp_path, progress=lambda stage, share: seen.setdefault(stage, []).append(share)
    )
    assert set(seen) == {"reading", "writing"}
    for shares in seen.values():
        assert shares == sorted(shares)
        assert shares[-1] == 1.0


def test_layers_with_one_rope_share_its_table(tmp_path: Path, model_of: Models) -> None:
    """Gemma 3 has two ropes over three layers: two tables each of cosine and sine, of context rows."""
    import onnx

    export_language(model_of("gemma3_text")[1], tmp_path)
    model = onnx.load(str(tmp_path / "graphs" / "decoder.onnx"), load_external_data=False)
    tables = {weight.name: tuple(weight.dims) for weight in model.graph.initializer if weight.name.startswith("rope")}
    assert tables == dict.fromkeys(("rope.0.cos", "rope.0.sin", "rope.1.cos", "rope.1.sin"), (128, 8))


@pytest.mark.parametrize("case", ["llama", "gemma2", "gpt2"])
def test_standard_dialect_is_standard(case: str, export_of: Callable[[str, str], tuple[Path, Any]]) -> None:
    """The `std` graph passes ONNX's own checker and uses no other operator set."""
    import onnx

    folder, manifest = export_of(case, "std")
    graph = folder / manifest.parts["decoder"].graph
    onnx.checker.check_model(str(graph))
    assert {entry.domain for entry in onnx.load(str(graph), load_external_data=False).opset_import} == {""}


def test_export_needs_no_torch(tmp_path: Path, model_of: Models) -> None:
    """A fresh interpreter without torch, transformers or safetensors makes the same bytes."""
    _, source = model_of("llama")
    export_language(source, tmp_path / "here")
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'safetensors', 'onnxruntime', 'onnxscript'): sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "from edgekit.export.language.export import export_language\n"
        f"export_language(Path({str(source)!r}), Path({str(tmp_path / 'there')!r}))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    here, there = ((tmp_path / name / "graphs" / "decoder.onnx.data").read_bytes() for name in ("here", "there"))
    assert here == there


def test_rotary_width_that_the_engine_cannot_rotate(tmp_path: Path) -> None:
    """GroupQueryAttention's limit on the rotary width is refused by name in `ort`; `std` exports the same model."""
    from edgekit.errors import UnsupportedModel
    from tests.export.language.runner import Runner
    from tests.export.language.test_decoder_parity import TOKENS, close

    model = tiny.make_model("llama", head_dim=24)
    source = tiny.save_model(model, tmp_path / "source")
    with pytest.raises(UnsupportedModel, match="24 rotary channels"):
        export_language(source, tmp_path / "ort")
    manifest = export_language(source, tmp_path / "std", dialect="std")
    assert close(Runner(tmp_path / "std", manifest).forward(TOKENS), tiny.reference(model, TOKENS))


def test_config_is_left_as_it_was(tmp_path: Path, model_of: Models) -> None:
    """Exporting writes nothing into the source folder."""
    _, source = model_of("phi3")
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    export_language(source, tmp_path)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    assert json.loads(before["config.json"])["model_type"] == "phi3"
    assert np.isfinite(plan_language(source).peak_bytes)
