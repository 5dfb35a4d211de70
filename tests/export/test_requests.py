"""Export requests: which of them are the same work, which cannot be meant, and what they need installed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit import __version__
from edgekit.bundle.store import read_bundle
from edgekit.errors import BadRequest, MemoryLimit, MissingPackage, UsageError
from edgekit.export import build
from edgekit.export.build import DIALECTS, ExportRequest, LoraFile

ROOT = Path(__file__).resolve().parents[2]
DRAFT = ROOT / "models" / "pycode-draft"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source and some LoRA files, small enough to hash a thousand times."""
    root = tmp_path_factory.mktemp("requests")
    for name, content in {"a/config.json": "{}", "b/config.json": "{ }", "a/w": "1", "b/w": "1"}.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(content)
    for name in ("one", "two"):
        (root / f"{name}.safetensors").write_text(name)
    (root / "copy-of-one.safetensors").write_text("one")
    return root


LORAS = st.lists(
    st.tuples(st.sampled_from(["one", "two", "copy-of-one"]), st.sampled_from([0.0, 0.5, 1.0])), max_size=2
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "source": st.sampled_from(["a", "b"]),
    "device": st.sampled_from(list(DIALECTS)),
    "precision": st.sampled_from(["fp32", "int4"]),
    "family": st.sampled_from([None, "sd", "flux"]),
    "steps": st.sampled_from([None, 1, 4]),
    "loras": LORAS,
    "tiny_vae": st.sampled_from([None, "a", "b"]),
    "ip_adapter": st.sampled_from([None, "one", "two"]),
}
IDLE = {
    "target": st.sampled_from(["x", "y"]),
    "max_memory": st.sampled_from([None, 10**9]),
    "overwrite": st.booleans(),
    "task": st.sampled_from([None, "text-generation"]),
}


def request(folder: Path, values: dict[str, Any]) -> ExportRequest:
    """A request from drawn values; paths are below the folder."""
    paths: dict[str, Path | None] = {"source": folder / values["source"], "target": folder / values["target"]}
    paths["tiny_vae"] = folder / values["tiny_vae"] if values["tiny_vae"] else None
    paths["ip_adapter"] = folder / f"{values['ip_adapter']}.safetensors" if values["ip_adapter"] else None
    loras = tuple(LoraFile(folder / f"{name}.safetensors", scale) for name, scale in values["loras"])
    return ExportRequest(**{**values, **paths, "loras": loras})


def meaning(values: dict[str, Any]) -> tuple[Any, ...]:
    """What decides the content: a LoRA counts by its bytes."""
    loras = [(name.removeprefix("copy-of-"), scale) for name, scale in values["loras"]]
    return (*(values[name] for name in FIELDS if name != "loras"), tuple(loras))


@settings(max_examples=150, deadline=None)
@given(
    one=st.fixed_dictionaries({**FIELDS, **IDLE}), other=st.fixed_dictionaries({**FIELDS, **IDLE}), same=st.booleans()
)
def test_the_fingerprint_is_what_decides_the_content(
    folder: Path, one: dict[str, Any], other: dict[str, Any], same: bool
) -> None:
    """Two requests have one fingerprint exactly if they mean the same content; target, cap and --force do not count."""
    if same:
        other = {**other, **{name: one[name] for name in FIELDS}}
    prints = [request(folder, values).fingerprint() for values in (one, other)]
    assert (prints[0] == prints[1]) == (meaning(one) == meaning(other))
    assert len(prints[0]) == 64


def test_another_version_of_edgekit_is_another_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle of an older exporter is not taken for up to date."""
    asked = ExportRequest(folder / "a", folder / "x")
    before = asked.fingerprint()
    assert asked.fingerprint() == before
    monkeypatch.setattr(build, "__version__", __version__ + "1")
    assert asked.fingerprint() != before


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_that_is_no_number_is_refused(folder: Path, scale: float) -> None:
    """A LoRA folded in at NaN would spoil every weight."""
    with pytest.raises(BadRequest, match="scale"):
        ExportRequest(folder / "a", folder / "x", loras=(LoraFile(folder / "one.safetensors", scale),))


def test_a_lora_must_be_a_file(folder: Path) -> None:
    """A folder or nothing at all is refused before any work, by name."""
    for path in (folder, folder / "none.safetensors"):
        with pytest.raises(BadRequest, match="no such file"):
            ExportRequest(folder / "a", folder / "x", loras=(LoraFile(path),))


def quiet(_what: str, _fraction: float) -> None:
    """Progress nobody looks at."""


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "precision": ({"precision": "int3"}, UsageError, "int3"),
    "family": ({"family": "sd"}, UsageError, "--family"),
    "task": ({"task": "super-resolution"}, UsageError, "text-generation"),
    "steps": ({"steps": 4}, UsageError, "--steps"),
    "memory": ({"max_memory": 1000}, MemoryLimit, "0.0 MB"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_meant_is_refused_without_a_trace(tmp_path: Path, case: str) -> None:
    """A wrong option is refused by `export` in words, and neither the bundle's folder nor the one above appears."""
    change, error, words = WRONG[case]
    asked = replace(ExportRequest(DRAFT, tmp_path / "deep" / "x.bundle"), **change)
    with pytest.raises(error, match=words):
        build.export(asked, quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_inside_its_own_source_is_refused(tmp_path: Path) -> None:
    """It would change the source it was made of; a link does not hide that."""
    source = tmp_path / "model"
    source.mkdir()
    for file in DRAFT.iterdir():
        (source / file.name).symlink_to(file)
    (tmp_path / "link").symlink_to(source)
    for target in (source / "x.bundle", tmp_path / "link" / "a" / "x.bundle"):
        with pytest.raises(BadRequest, match="inside its source"):
            build.export(ExportRequest(source, target, overwrite=True), quiet)
    assert not any(path.is_dir() for path in source.iterdir())
    build.export(ExportRequest(source, tmp_path / "model.bundle"), quiet)


def test_what_stands_at_the_target_decides(tmp_path: Path) -> None:
    """A bundle of another request needs overwrite; what is no bundle is never replaced; a broken one is made anew."""
    target = tmp_path / "x.bundle"
    asked = ExportRequest(DRAFT, target)
    made = build.export(asked, quiet)
    assert build.export(asked, quiet) == made
    other = replace(asked, precision="int8")
    with pytest.raises(BadRequest, match="--force"):
        build.export(other, quiet)
    assert read_bundle(target).manifest == made
    assert build.export(replace(other, overwrite=True), quiet).precision.requested == "int8"
    (target / "graphs" / "decoder.onnx").unlink()
    assert build.current(other) is None
    assert build.export(replace(other, overwrite=True), quiet).precision.requested == "int8"
    (tmp_path / "notes").mkdir()
    with pytest.raises(BadRequest, match="not a bundle"):
        build.export(replace(asked, target=tmp_path / "notes", overwrite=True), quiet)


@pytest.mark.parametrize(("kind", "extra"), [("language", "export"), ("diffusion", "torch")])
def test_every_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, extra: str
) -> None:
    """MissingPackage lists what is not there, no more, and how to get it."""
    (tmp_path / ("config.json" if kind == "language" else "model_index.json")).write_text("{}")
    names = build.NEEDS[kind][1]
    for gone in (names[:1], names[-2:], names):
        monkeypatch.setattr(build, "find_spec", lambda name, gone=gone: None if name in gone else object())
        with pytest.raises(MissingPackage) as caught:
            build.plan(ExportRequest(tmp_path, tmp_path / "x"))
        assert f"needs {', '.join(gone)};" in str(caught.value)
        assert f"edgekit[{extra}]" in str(caught.value)


@pytest.mark.parametrize(
    ("gone", "index", "extra"), [("onnx_ir", "config.json", "export"), ("torch", "model_index.json", "torch")]
)
def test_the_command_says_which_extra_is_missing(tmp_path: Path, gone: str, index: str, extra: str) -> None:
    """In an interpreter that cannot import the package: exit code 4, the extra's name, no traceback."""
    source = DRAFT if index == "config.json" else tmp_path
    if source is tmp_path:
        (tmp_path / index).write_text('{"_class_name": "StableDiffusionPipeline"}')
    script = f"""
import sys
sys.modules[{gone!r}] = None
sys.argv = ["edgekit", "export", {str(source)!r}, "-o", {str(tmp_path / "x.bundle")!r}]
from edgekit.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 4, done.stderr
    assert f"edgekit[{extra}]" in done.stderr
    assert gone in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x.bundle").exists()


def test_a_small_decoder_is_a_folder_with_a_config(folder: Path) -> None:
    """Anything else is refused when the request is made, and so is one for a model that decodes nothing."""
    with pytest.raises(BadRequest, match="AutoencoderTiny"):
        ExportRequest(source=folder / "a", target=folder / "x", tiny_vae=folder)
    with pytest.raises(BadRequest, match="--tiny-vae"):
        build.plan(ExportRequest(source=DRAFT, target=folder / "x", tiny_vae=folder / "a"))


def test_an_image_prompts_adapter_is_a_file(folder: Path) -> None:
    """A missing one is refused when the request is made, and any for a model that sees no picture."""
    with pytest.raises(BadRequest, match=r"--ip-adapter .*no such file"):
        ExportRequest(source=folder / "a", target=folder / "x", ip_adapter=folder)
    asked = ExportRequest(source=DRAFT, target=folder / "x", ip_adapter=folder / "one.safetensors")
    with pytest.raises(BadRequest, match="--ip-adapter goes into an image model"):
        build.plan(asked)


def test_the_image_encoder_beside_an_adapter_counts(folder: Path, tmp_path: Path) -> None:
    """Another encoder there makes another bundle."""
    (tmp_path / "ip.safetensors").write_bytes(b"weights")
    asked = ExportRequest(source=folder / "a", target=folder / "x", ip_adapter=tmp_path / "ip.safetensors")
    prints = [asked.fingerprint()]
    (tmp_path / "image_encoder").mkdir()
    for side in (224, 336):
        (tmp_path / "image_encoder" / "config.json").write_text(f'{{"image_size": {side}}}')
        prints.append(asked.fingerprint())
    assert len(set(prints)) == 3
