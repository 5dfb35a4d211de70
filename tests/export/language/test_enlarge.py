"""`benchmarks/enlarge.py`: a larger model that says the same."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edgekit.export.language.config import Config
from edgekit.export.language.export import export_language
from edgekit.export.language.families import read_spec
from edgekit.export.language.weights import Checkpoint
from tests.export.language import tiny
from tests.export.language.runner import Runner

pytestmark = pytest.mark.torch

ROOT = Path(__file__).resolve().parents[3]
DRAFT = ROOT / "models" / "pycode-draft"
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}
TOKENS = [5, 17, 80, 3, 41, 5, 17, 62, 11, 29, 80, 3]


def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("enlarge", ROOT / "benchmarks" / "enlarge.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["enlarge"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


enlarge = script()


@pytest.fixture(scope="module", params=["shipped", "tied", "untied"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """Source, the model four times as wide and twice as deep, and the number of parameters it was promised."""
    root = tmp_path_factory.mktemp(request.param)
    source = DRAFT
    if request.param != "shipped":
        model = tiny.make_model("llama-tied", tie_word_embeddings=request.param == "tied", **WIDE)
        source = tiny.save_model(model, root / "source")
    layers = 2 * read_spec(Config.load(source)).layers + 1
    return source, root / "target", enlarge.enlarge(source, root / "target", times=4, layers=layers)


def logits(source: Path, folder: Path, precision: str) -> tuple[Any, Any]:
    """Logits of the export in one call, and its manifest."""
    manifest = export_language(source, folder, precision=precision)
    return Runner(folder, manifest).forward(TOKENS), manifest


def test_the_larger_model_says_the_same(pair: tuple[Path, Path, int], tmp_path: Path) -> None:
    """Through a float32 export of each, logits are equal to 1e-4 of the largest."""
    source, target, _ = pair
    (wanted, small), (found, large) = (logits(model, tmp_path / model.name, "fp32") for model in (source, target))
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert large.decoding.vocab_size == small.decoding.vocab_size
    assert large.decoding.kv.heads == 4 * small.decoding.kv.heads
    assert large.decoding.kv.layers == 2 * small.decoding.kv.layers + 1


@pytest.mark.parametrize("precision", ["int4", "int4-128", "int8-row"])
def test_quantized_alike_they_say_the_same(pair: tuple[Path, Path, int], precision: str, tmp_path: Path) -> None:
    """Idle channels share no block with real ones, nor set the scale of a row: both take the same tokens."""
    source, target, _ = pair
    wanted, found = (logits(model, tmp_path / model.name, precision)[0] for model in (source, target))
    np.testing.assert_array_equal(found.argmax(-1), wanted.argmax(-1))
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()


def test_the_parameters_are_those_promised(pair: tuple[Path, Path, int], tmp_path: Path) -> None:
    """The number returned is that of the configuration's shapes, of the file, and of the exported graph."""
    source, target, promised = pair
    spec = read_spec(Config.load(target))
    qkv, inner = sum(spec.qkv_sizes), spec.qkv_sizes[0]
    layer = spec.hidden * (qkv + inner + 3 * spec.ffn + 2)
    tables = 1 if spec.tied else 2
    assert promised == spec.layers * layer + spec.hidden * (tables * spec.vocab + 1)
    assert promised == sum(math.prod(entry.shape) for entry in Checkpoint(target).entries.values())
    assert promised == export_language(target, tmp_path).parts["decoder"].parameters
    assert promised > 4 * sum(math.prod(entry.shape) for entry in Checkpoint(source).entries.values())


def test_the_shipped_model_becomes_the_size_that_is_told() -> None:
    """The 308 M parameters of the script's own page are what its defaults make of models/pycode."""
    source = ROOT / "models" / "pycode"
    plan = enlarge.Plan(json.loads((source / "config.json").read_text()), 4, 12)
    count = sum(math.prod(part.shape(plan)) for part in enlarge.parts(Checkpoint(source), plan))
    assert round(count / 1e6) == 308
    assert "308 M parameters" in enlarge.__doc__


def test_idle_parts_are_noise_and_write_nothing(pair: tuple[Path, Path, int]) -> None:
    """What would write the residual stream is zero beside the real block; everything else that is idle is not."""
    source, target, _ = pair
    small, large = Checkpoint(source), Checkpoint(target)
    depth = read_spec(Config.load(source)).layers
    places = {layer * (2 * depth + 1) // depth: layer for layer in range(depth)}
    for name in large.entries:
        head, layers, tail = name.partition("layers.")
        number, _, slot = tail.partition(".")
        silent = any(part in name for part in ("o_proj", "down_proj", "embed_tokens"))
        found = large.read(name).astype(np.float32)
        if found.ndim == 1:
            continue
        real = not layers or int(number) in places
        origin = name if not layers else f"{head}layers.{places.get(int(number), 0)}.{slot}"
        kept = small.read(origin).astype(np.float32) if real else np.zeros((0, 0), np.float32)
        np.testing.assert_array_equal(found[: kept.shape[0], : kept.shape[1]], kept)
        idle = found.copy()
        idle[: kept.shape[0], : kept.shape[1]] = 0
        assert idle.any() != silent, name


def test_the_seed_decides_the_noise(tmp_path: Path) -> None:
    """Equal seeds give equal files; another seed gives other idle weights."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        enlarge.enlarge(DRAFT, tmp_path / name, layers=3, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, int], str]] = {
    "times": ("llama-tied", WIDE, {"times": 2}, "times is 2; it must be a power of four"),
    "no times": ("llama-tied", WIDE, {"times": 0}, "times is 0; it must be a power of four"),
    "layers": ("llama-tied", WIDE, {"layers": 1}, "layers is 1; the model has 2 already"),
    "width": ("llama-tied", {**WIDE, "hidden_size": 96}, {}, "hidden_size is 96; it must be a multiple of 128"),
    "heads": ("llama-tied", {**WIDE, "head_dim": 16}, {}, "heads x head_dim is 64; it must be a multiple of 128"),
    "ffn": ("llama-tied", {**WIDE, "intermediate_size": 160}, {}, "ffn is 160; it must be a multiple of 128"),
    "biases": ("llama", WIDE, {}, "only a llama without biases"),
    "family": ("qwen2", WIDE, {}, "only a llama without biases"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_enlarged_is_refused(case: str, tmp_path: Path) -> None:
    """A model or a factor that would not come out exact is refused by name, and no folder is made."""
    kind, changes, options, words = REFUSED[case]
    source = tiny.save_model(tiny.make_model(kind, **changes), tmp_path / "source")
    with pytest.raises(ValueError, match=words):
        enlarge.enlarge(source, tmp_path / "target", **options)
    assert not (tmp_path / "target").exists()


def test_a_folder_that_exists_is_not_written_to(tmp_path: Path) -> None:
    """The target is made by the script, never added to."""
    (tmp_path / "target").mkdir()
    with pytest.raises(FileExistsError):
        enlarge.enlarge(DRAFT, tmp_path / "target")
    assert list((tmp_path / "target").iterdir()) == []
