"""From `edgekit export FOLDER` to a bundle: recognised by content, planned without weights, refused with what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from edgekit.bundle.store import read_bundle
from edgekit.errors import BadRequest, BadSource, MemoryLimit, MissingPackage, UnknownFamily, UnsupportedModel
from edgekit.export import build
from edgekit.export.build import ExportRequest, LoraFile
from edgekit.export.sources import read_source
from tests.export.onnx_folder.folders import (
    DECODERS,
    FOLDERS,
    PIPELINES,
    adopt,
    configure,
    copied,
    edit,
    fix,
    rename,
)

ROOT = Path(__file__).resolve().parents[3]
NO_TORCH = """
import sys
for name in ("torch", "transformers", "diffusers", "optimum", "safetensors"):
    sys.modules[name] = None
from pathlib import Path
from edgekit.export.build import ExportRequest, export
export(ExportRequest(Path(sys.argv[1]), Path(sys.argv[2])), lambda what, share: None)
"""


@pytest.mark.parametrize("name", [*PIPELINES, *DECODERS])
def test_a_ready_made_folder_is_recognised_by_its_graphs(name: str) -> None:
    """*.onnx where safetensors would be; what kind of model it is says the index file, as ever."""
    source = read_source(FOLDERS / name)
    assert source.weights == "onnx"
    assert source.kind == ("language" if name in DECODERS else "diffusion")


def test_weights_beside_the_graphs_go_before_them(tmp_path: Path) -> None:
    """Many pages ship both: the weights are the original, so they are what is exported."""
    for name, file in (("llama", "model.safetensors"), ("lcm", "unet/diffusion_pytorch_model.safetensors")):
        folder = copied(name, tmp_path)
        (folder / file).write_bytes(b"")
        assert read_source(folder).weights == "torch"
    assert read_source(FOLDERS / "lcm").config("vae") == read_source(FOLDERS / "lcm").config("vae_decoder")


@pytest.mark.parametrize("name", ["sdxl-turbo", "qwen2"])
def test_no_torch_is_imported(tmp_path: Path, name: str) -> None:
    """With torch and its companions out of reach, the bundle is made all the same."""
    command = [sys.executable, "-c", NO_TORCH, str(FOLDERS / name), str(tmp_path / "x.bundle")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read_bundle(tmp_path / "x.bundle").manifest.parts


@pytest.mark.parametrize("name", ["sdxl-turbo", "lcm", "llama"])
def test_the_plan_is_what_is_made(tmp_path: Path, name: str) -> None:
    """Signatures to the letter, bytes within a tenth, and a peak above them; nothing is loaded for it."""
    planned = build.plan(ExportRequest(FOLDERS / name, tmp_path / "x.bundle"))
    bundle = adopt(FOLDERS / name, tmp_path / "x.bundle")
    parts = bundle.manifest.parts
    assert {part.name: (part.inputs, part.outputs) for part in planned.parts} == {
        part: (made.inputs, made.outputs) for part, made in parts.items()
    }
    made = sum(file.bytes for file in bundle.manifest.files if file.path.startswith("graphs/"))
    assert abs(sum(part.bytes for part in planned.parts) - made) < made / 10
    assert planned.peak_bytes > planned.disk_bytes
    assert (planned.family, planned.task) == (bundle.manifest.family, bundle.manifest.task)
    assert "ready-made" in " ".join(planned.notes)


def test_progress_only_moves_forward_to_the_end(tmp_path: Path) -> None:
    """A bar fed with these shares never jumps back and ends full, and says which part it is at."""
    for name, part in (("sdxl-turbo", "text_encoder_2: proving"), ("llama", "decoder: writing")):
        seen: list[tuple[str, float]] = []
        request = ExportRequest(FOLDERS / name, tmp_path / name)
        build.export(request, lambda what, share, seen=seen: seen.append((what, share)))
        shares = [share for _, share in seen]
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(1.0)
        assert part in [what for what, _ in seen]


def test_an_equal_request_finds_its_work_done(tmp_path: Path) -> None:
    """As for every export: the bundle is left alone, and another device is another request."""
    first = adopt(FOLDERS / "qwen2", tmp_path / "x.bundle")
    again = adopt(FOLDERS / "qwen2", tmp_path / "x.bundle")
    assert first.digest == again.digest
    assert adopt(FOLDERS / "qwen2", tmp_path / "trt.bundle", device="trt").manifest.decoding.dialect == "concat"


# ------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("llama", {"precision": "int8"}, "adopted as they are.*safetensors"),
        ("lcm", {"precision": "auto"}, "adopted as they are"),
        ("lcm", {"loras": (LoraFile(FOLDERS / "make.py"),)}, "--lora folds into weights by their names"),
        ("lcm", {"ip_adapter": FOLDERS / "make.py"}, "--ip-adapter adds layers to a UNet.*safetensors"),
        ("sd-turbo", {"tiny_vae": FOLDERS / "lcm" / "vae_decoder"}, "--tiny-vae is traced from its weights"),
        ("llama", {"steps": 4}, "--steps is a few-step"),
        ("llama", {"family": "lcm"}, "--family chooses an image family"),
        ("llama", {"task": "text-to-image"}, "text-generation model"),
    ],
)
def test_options_that_need_weights_are_refused(tmp_path: Path, name: str, options: dict, words: str) -> None:
    """A graph is taken as it is; the message names the folder that the option needs."""
    with pytest.raises(BadRequest, match=words):
        build.plan(ExportRequest(FOLDERS / name, tmp_path / "x.bundle", **options))


def test_a_memory_cap_below_the_need_is_refused(tmp_path: Path) -> None:
    """Before anything is loaded."""
    with pytest.raises(MemoryLimit, match="needs about"):
        adopt(FOLDERS / "lcm", tmp_path / "x.bundle", max_memory=10**6)
    assert not (tmp_path / "x.bundle").exists()


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof runs in ONNX Runtime, so an export machine needs it too; torch it does not."""
    monkeypatch.setattr(build, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(MissingPackage, match=r"ready-made.*onnxruntime.*edgekit\[cpu,export\]"):
        build.plan(ExportRequest(FOLDERS / "lcm", tmp_path / "x.bundle"))


# ------------------------------------------------------------------------------------------------- folders


def drop(folder: Path, *files: str) -> None:
    for file in files:
        (folder / file).unlink()


def nameless(folder: Path) -> None:
    """A model_index.json as the first ONNX pages had it."""
    names = ("unet", "vae_decoder", "text_encoder")
    configure(folder / "model_index.json", **{name: ["diffusers", "OnnxRuntimeModel"] for name in names})


def inpainting(folder: Path) -> None:
    """The configs of a pipeline whose UNet sees the mask and the masked picture beside the sample."""
    configure(folder / "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    configure(folder / "unet" / "config.json", in_channels=9)


def old_encoder(model: onnx.ModelProto) -> None:
    """An encoder that draws from its distribution inside."""
    model.graph.output[0].name = "latent_sample"
    for node in model.graph.node:
        for place, name in enumerate(node.output):
            node.output[place] = "mean" if name == "latent_parameters" else name
    model.graph.node.append(helper.make_node("RandomNormalLike", ["mean"], ["noise"]))
    model.graph.node.append(helper.make_node("Add", ["mean", "noise"], ["latent_sample"]))


def merged(model: onnx.ModelProto) -> None:
    """A decoder whose first run and later ones are branches of one graph."""
    model.graph.input.append(helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, (1,)))


def cacheless(model: onnx.ModelProto) -> None:
    """An export without past: every token would cost the whole text."""
    kept = [value for value in model.graph.input if "past" not in value.name]
    del model.graph.input[:]
    model.graph.input.extend(kept)


def silent(model: onnx.ModelProto) -> None:
    """A decoder that takes a cache and gives none."""
    kept = [value for value in model.graph.output if value.name != "present.0.value"]
    del model.graph.output[:]
    model.graph.output.extend(kept)


REFUSED = {  # folder, what is done to it -> error, words of the message
    "a part is missing": (
        "lcm",
        lambda f: drop(f, "vae_encoder/model.onnx"),
        BadSource,
        r"no graph for vae_encoder: vae_encoder/model\.onnx is missing \(there are text_encoder, unet, vae_decoder\)",
    ),
    "a config is missing": ("lcm", lambda f: drop(f, "unet/config.json"), BadSource, r"unet.config\.json is missing"),
    "no scheduler of a family": (
        "sd-turbo",
        lambda f: configure(f / "scheduler" / "scheduler_config.json", timestep_spacing="leading"),
        UnknownFamily,
        "no family exports",
    ),
    "no configs at all": (
        "lcm",
        nameless,
        UnsupportedModel,
        "text_encoder.* OnnxRuntimeModel.*optimum-cli export onnx",
    ),
    "a network that is no UNet of Stable Diffusion": (
        "sd-turbo",
        lambda f: configure(f / "model_index.json", unet=["diffusers", "UNetMotionModel"]),
        UnsupportedModel,
        r"denoises by UNetMotionModel.*UNet2DConditionModel are adopted.*safetensors",
    ),
    "in-painting": (
        "lcm",
        inpainting,
        UnsupportedModel,
        r"unet.model\.onnx is for in-painting.*not adopted from ready-made graphs.*safetensors",
    ),
    "a graph that is cut off": (
        "lcm",
        lambda f: (f / "unet" / "model.onnx").write_bytes((f / "unet" / "model.onnx").read_bytes()[:60_000]),
        BadSource,
        r"unet.model\.onnx is no ONNX graph that can be adopted: a field of .* \(truncated\?\)\. Is the download comp",
    ),
    "a graph of no bytes": (
        "llama",
        lambda f: (f / "model.onnx").write_bytes(b""),
        BadSource,
        r"adopted: is empty, so it holds no graph\. Is the download complete",
    ),
    "an encoder that draws": (
        "lcm",
        lambda f: edit(f / "vae_encoder" / "model.onnx", old_encoder),
        UnsupportedModel,
        "RandomNormalLike.*no seed reaches it",
    ),
    "fewer layers than exported": (
        "sdxl-turbo",
        lambda f: configure(f / "text_encoder" / "config.json", num_hidden_layers=3),
        BadSource,
        "the model has 3 layers",
    ),
    "an input nobody feeds": (
        "sd-turbo",
        lambda f: edit(f / "unet" / "model.onnx", rename("encoder_hidden_states", "image_embeds")),
        UnsupportedModel,
        "takes image_embeds, which no recipe feeds unet",
    ),
    "no cache": ("llama", lambda f: edit(f / "model.onnx", cacheless), UnsupportedModel, "text-generation-with-past"),
    "a cache that does not grow": (
        "llama",
        lambda f: edit(f / "model.onnx", silent),
        UnsupportedModel,
        "present.0.value",
    ),
    "two decoders in one": ("llama", lambda f: edit(f / "model.onnx", merged), UnsupportedModel, "use_cache_branch"),
    "a config of more layers": (
        "llama",
        lambda f: configure(f / "config.json", num_hidden_layers=3),
        BadSource,
        "4 cache inputs .* 3 layers",
    ),
    "a config of other heads": (
        "llama",
        lambda f: configure(f / "config.json", num_key_value_heads=4),
        BadSource,
        "past_key_values.0.key is .*where config.json makes it",
    ),
    "a config of another vocabulary": (
        "llama",
        lambda f: configure(f / "config.json", vocab_size=61),
        BadSource,
        "logits is .*60.*61",
    ),
    "one token at a time": (
        "llama",
        lambda f: edit(f / "model.onnx", fix("input_ids", None, 1)),
        BadSource,
        "exported with dynamic axes",
    ),
    "two bases of rotation": (
        "llama",
        lambda f: configure(f / "config.json", rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
        BadSource,
        r"rope_theta 500000.0 in rope_parameters and 10000.0 beside.*export again",
    ),
    "no context length": (
        "llama",
        lambda f: configure(f / "config.json", max_position_embeddings=None),
        BadSource,
        "max_position_embeddings",
    ),
    "no model type": ("llama", lambda f: configure(f / "config.json", model_type=None), BadSource, "no model_type"),
    "no tokenizer": ("llama", lambda f: drop(f, "tokenizer.json"), BadSource, "tokenizer.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_folders_that_are_no_model_say_what_is_wrong(tmp_path: Path, case: str) -> None:
    """Each by its own error and in words, with exit code 2, and no bundle is left behind."""
    name, spoil, error, words = REFUSED[case]
    folder = copied(name, tmp_path)
    spoil(folder)
    with pytest.raises(error, match=words) as caught:
        adopt(folder, tmp_path / "x.bundle")
    assert caught.value.exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_the_command_answers_with_json(tmp_path: Path) -> None:
    """The verb, as a user types it, exit code and all."""
    command = [
        sys.executable,
        "-m",
        "edgekit.cli",
        "export",
        str(FOLDERS / "llama"),
        "-o",
        str(tmp_path / "b"),
        "--json",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["task"] == "text-generation"
    copied("llama", tmp_path)
    (tmp_path / "llama" / "config.json").unlink()
    done = subprocess.run(
        [*command[:4], str(tmp_path / "llama"), *command[5:]], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 2
