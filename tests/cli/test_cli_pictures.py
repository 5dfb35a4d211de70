"""`edgekit run` on a picture bundle of a few kilobytes: files, options, refusals, the bar of its steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import helper
from PIL import Image

from edgekit.bundle.manifest import Manifest
from edgekit.bundle.recipe import Grid
from edgekit.runtime.diffusion.image import read_png_metadata
from edgekit.runtime.diffusion.tables import compile_tables
from tests.bundle import tiny
from tests.cli.conftest import Run, only_json
from tests.cli.pseudo_terminal import Terminal


def network() -> onnx.ModelProto:
    """Half the sample, plus the mean of the text and a thousandth of the time: nothing that saturates a picture."""
    nodes = [
        helper.make_node("ReduceMean", ["encoder_hidden_states"], ["text"], keepdims=0),
        helper.make_node("ReduceMean", ["timestep"], ["time"], keepdims=0),
        helper.make_node("Mul", ["time", "thousandth"], ["share"]),
        helper.make_node("Mul", ["sample", "half"], ["halved"]),
        helper.make_node("Add", ["halved", "text"], ["told"]),
        helper.make_node("Add", ["told", "share"], ["out_sample"]),
    ]
    latent = ("batch", 4, "height", "width")
    text = ("batch", tiny.LENGTH, tiny.HIDDEN)
    inputs: list[tiny.Info] = [("sample", "float32", latent), ("timestep", "float32", ("batch",))]
    inputs.append(("encoder_hidden_states", "float32", text))
    weights = {"thousandth": np.float32(1e-3), "half": np.float32(0.5)}
    return tiny.model(nodes, inputs, [("out_sample", "float32", latent)], weights)


def upsampling_decoder() -> onnx.ModelProto:
    """Four latent channels to three colours, eight pixels for one."""
    node = helper.make_node("ConvTranspose", ["latent_sample", "kernel"], ["sample"], strides=[8, 8])
    kernel = np.linspace(-0.05, 0.05, 4 * 3 * 64, dtype=np.float32).reshape(4, 3, 8, 8)
    latent: list[tiny.Info] = [("latent_sample", "float32", ("batch", 4, "height", "width"))]
    sample: list[tiny.Info] = [("sample", "float32", ("batch", 3, "rows", "columns"))]
    return tiny.model([node], latent, sample, {"kernel": kernel})


def draft(root: Path) -> Manifest:
    """The tiny picture bundle, with a grid to step on and networks that draw something."""
    manifest = tiny.image_draft(root)
    for name, graph in (("unet", network()), ("vae_decoder", upsampling_decoder())):
        (root / f"graphs/{name}.onnx.data").unlink()
        tiny.save(graph, root / f"graphs/{name}.onnx")
    assert manifest.recipe is not None
    (stage,) = manifest.recipe.stages
    sampler = msgspec.structs.replace(stage.sampler, grid=Grid("lcm"))
    recipe = msgspec.structs.replace(manifest.recipe, stages=(msgspec.structs.replace(stage, sampler=sampler),))
    parts = {name: tiny.part(root, name) for name in manifest.parts}
    return msgspec.structs.replace(manifest, recipe=recipe, tables=compile_tables(recipe), parts=parts)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture bundle that runs in a moment: 64 x 64 pixels in one, two or four steps."""
    target = tmp_path_factory.mktemp("pictures") / "tiny.bundle"
    tiny.write(target, draft)
    return target


def pixels(path: Path) -> bytes:
    """The picture, without what the file says about it."""
    with Image.open(path) as picture:
        return picture.convert("RGB").tobytes()


def test_without_a_name_the_picture_is_out_png_here(edgekit: Run, pictures: Path, tmp_path: Path) -> None:
    """One picture of the bundle's size in the working directory; its name on stdout and nothing on stderr."""
    done = edgekit("run", pictures, "--prompt", "red apple", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "out.png\n", "")
    with Image.open(tmp_path / "out.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (64, 64))
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_the_object_tells_files_recipe_and_times(edgekit: Run, pictures: Path, tmp_path: Path) -> None:
    """--json names every file, and its metadata is what the files themselves say."""
    target = tmp_path / "a b.é.png"
    args = ("run", pictures, "--prompt", "grüner Apfel 🙂", "-o", target, "--batch", 3, "--seed", 6, "--json")
    told = only_json(edgekit(*args))
    assert [Path(file).name for file in told["files"]] == [f"a b.é-{number}.png" for number in range(3)]
    assert told["task"] == "text-to-image"
    assert set(told) == {"schema_version", "task", "files", "metadata", "stats"}
    for file in told["files"]:
        written: dict[str, Any] = read_png_metadata(file)
        assert written["prompt"] == "grüner Apfel 🙂"
        assert {**written, "image": None} == {**told["metadata"], "image": None}


def test_a_picture_is_a_function_of_seed_steps_and_prompt(edgekit: Run, pictures: Path, tmp_path: Path) -> None:
    """The same request twice is the same picture; another seed, step count or prompt is another."""
    base = {"--prompt": "red", "--seed": 1, "--steps": 2}
    requests = [base, base, {**base, "--seed": 2}, {**base, "--steps": 4}, {**base, "--prompt": "green"}]
    made = []
    for number, request in enumerate(requests):
        file = tmp_path / f"{number}.png"
        words = [word for pair in request.items() for word in pair]
        assert edgekit("run", pictures, "-o", file, *words).returncode == 0
        made.append(pixels(file))
    assert made[0] == made[1]
    assert len(set(made)) == 4


REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "a TIFF": (("-o", "x.tiff"), ".png, .webp"),
    "two prompts": (("--prompt-file", "none.txt"), "exactly one"),
    "sound": (("--seconds", 3), "no sound"),
    "no mask here": (("--mask", "none.png"), "none.png"),
    "no array here": (("--input", "a"), "NAME=FILE"),
    "a folder": (("-o", "."), "is a folder"),
    "no such folder": (("-o", "none/x.png"), "make it first"),
    "a text option": (("--top-k", 3), "--top-k"),
    "a conversation": (("--chat",), "--chat"),
    "a stop string": (("--stop", "x"), "--stop"),
    "steps it was not made for": (("--steps", 3), "1, 2, 4"),
    "a negative prompt without guidance": (("--negative", "green"), "negative"),
    "strength without a picture": (("--strength", 0.5), "image"),
    "no picture": (("--image", "x.txt"), "x.txt"),
    "an endless batch": (("--batch", 10**8), "batch"),
    "a negative seed": (("--seed", -1), "seed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_picture_request_leaves_no_file(edgekit: Run, pictures: Path, tmp_path: Path, case: str) -> None:
    """Exit code 2, the option named, and the folder as it was."""
    (tmp_path / "x.txt").write_text("no picture")
    args, word = REFUSED[case]
    told = only_json(edgekit("run", pictures, "--prompt", "red", *args, "--json", cwd=tmp_path))["error"]
    assert told["exit_code"] == 2
    assert word in told["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def test_a_finished_picture_replaces_the_old_one_whole(edgekit: Run, pictures: Path, tmp_path: Path) -> None:
    """A file of that name is replaced, through a link too, and a refused request leaves it alone."""
    target = tmp_path / "x.png"
    target.write_bytes(b"old")
    assert edgekit("run", pictures, "--prompt", "red", "-o", target, "--steps", 3).returncode == 2
    assert target.read_bytes() == b"old"
    assert edgekit("run", pictures, "--prompt", "red", "-o", target).returncode == 0
    with Image.open(target) as picture:
        assert picture.size == (64, 64)


def test_the_bar_of_the_steps_is_for_terminals(pictures: Path, tmp_path: Path) -> None:
    """On a terminal the steps are counted and the bar is gone at the end; the file's name goes to stdout."""
    out, target = tmp_path / "stdout", tmp_path / "x.png"
    terminal = Terminal(("run", pictures, "--prompt", "red", "-o", target, "--stats"), stdout=out)
    assert terminal.finish() == 0
    assert out.read_text() == f"{target}\n"
    assert "base 2/2" in terminal.screen
    assert "━" not in terminal.screen.rpartition("\x1b[2K")[2]
    assert "seconds" in terminal.screen.rpartition("\x1b[2K")[2]


def test_doctor_judges_the_device_it_is_asked_about(edgekit: Run, pictures: Path) -> None:
    """A device the engine does not list is a problem with exit code 4; `auto` and `cpu` are none."""
    absent = edgekit("doctor", "--device", "npu", "--json")
    assert absent.returncode == 4
    assert "npu" in " ".join(json.loads(absent.stdout)["problems"])
    assert "npu" in edgekit("doctor", "--device", "npu").stderr
    for args in (("--device", "auto"), ("--device", "auto", "--bundle", pictures)):
        assert edgekit("doctor", *args).returncode == 0


def test_previews_and_a_contact_sheet_lie_beside_the_pictures(edgekit: Run, pictures: Path, tmp_path: Path) -> None:
    """One preview per step and one sheet of the batch, each named after the output; the JSON lists them."""
    base = ("run", pictures, "--prompt", "red", "--steps", 2, "--batch", 3, "-o", "x.png")
    told = only_json(edgekit(*base, "--preview", "--grid", "--json", cwd=tmp_path))
    stage = json.loads((pictures / "edgekit.json").read_text())["recipe"]["stages"][0]["name"]
    assert told["files"] == ["x-0.png", "x-1.png", "x-2.png", "x-grid.png"]
    assert told["previews"] == [f"x-{stage}-1.png", f"x-{stage}-2.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(told["files"] + told["previews"])
    with Image.open(tmp_path / "x-0.png") as one, Image.open(tmp_path / "x-grid.png") as sheet:
        assert sheet.size == (2 * one.width + 2, 2 * one.height + 2)
        assert np.array_equal(np.asarray(sheet)[: one.height, : one.width], np.asarray(one))


def test_a_prompt_is_asked_for_where_one_is_taken(edgekit: Run, pictures: Path, tmp_path: Path) -> None:
    """A bundle with a text encoder needs a prompt, and says how to give one."""
    told = only_json(edgekit("run", pictures, "--json", cwd=tmp_path))["error"]
    assert (told["exit_code"], "--prompt TEXT" in told["message"]) == (2, True)
