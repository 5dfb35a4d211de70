"""`edgekit run` on the shipped image model, and the verbs that need no bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import Run, only_json


def test_a_picture_comes_with_its_recipe(edgekit: Run, image_bundle: Path, tmp_path: Path) -> None:
    """The PNG has the size the bundle promises and says in its metadata how it was made."""
    target = tmp_path / "apple.png"
    done = edgekit("run", image_bundle, "--prompt", "red apple", "-o", target, "--seed", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(target)
    with Image.open(target) as picture:
        assert picture.size == (128, 128)
        told = json.loads(picture.text["edgekit"])  # type: ignore[attr-defined]
    assert told["prompt"] == "red apple"
    assert told["seed"] == 3


def test_a_batch_writes_one_file_per_picture(edgekit: Run, image_bundle: Path, tmp_path: Path) -> None:
    """Picture 0 of a batch is the picture made alone, to the last level of the engine's rounding; 1 is another."""
    alone, batch = tmp_path / "alone.png", tmp_path / "batch.png"
    base = ("run", image_bundle, "--prompt", "pizza", "--steps", 1)
    assert edgekit(*base, "-o", alone).returncode == 0
    done = edgekit(*base, "-o", batch, "--batch", 2, "--json")
    assert [Path(file).name for file in only_json(done)["files"]] == ["batch-0.png", "batch-1.png"]
    paths = (alone, tmp_path / "batch-0.png", tmp_path / "batch-1.png")
    one, same, other = (np.asarray(Image.open(path)).astype(int) for path in paths)
    assert abs(one - same).max() <= 1
    assert abs(one - other).max() > 50


CASES = {
    "illegal steps": (("--steps", 50), 2, "1, 2, 4, 8"),
    "text option": (("--temperature", 0.5), 2, "--temperature"),
    "odd size": (("--width", 33), 2, "32"),
    "bad seed mode": (("--seed-mode", "dice"), 2, "dice"),
    "missing picture": (("--image", "no-such.png"), 2, "no-such.png"),
    "guidance out of range": (("--guidance", 1000), 2, "guidance"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_few_step_contract_is_enforced(edgekit: Run, image_bundle: Path, tmp_path: Path, case: str) -> None:
    """What the model was not distilled for is refused with the legal values, and no file appears."""
    args, code, word = CASES[case]
    done = edgekit("run", image_bundle, "--prompt", "sun", "-o", tmp_path / "x.png", *args)
    assert done.returncode == code, done.stderr
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x.png").exists()


def test_inspect_shows_the_recipe(edgekit: Run, image_bundle: Path) -> None:
    """Stages, sampler, legal steps and guidance are there to read."""
    shown = edgekit("inspect", image_bundle).stdout
    for word in ("flow_stochastic", "1, 2, 4, 8", "w_embedding", "upscaler", "gate"):
        assert word in shown


def test_doctor_tells_versions_and_devices(edgekit: Run) -> None:
    """A healthy environment: exit code 0, the engine, its devices, no problems."""
    facts = only_json(edgekit("doctor", "--json"))
    assert facts["engine"].startswith("onnxruntime")
    assert "cpu" in facts["devices"]
    assert facts["problems"] == []
    assert "packages" in edgekit("doctor").stdout


def test_doctor_opens_a_bundle(edgekit: Run, image_bundle: Path) -> None:
    """`--bundle` opens every graph on the device and says where it landed."""
    graphs = only_json(edgekit("doctor", "--bundle", image_bundle, "--json"))["graphs"]
    assert graphs
    assert all("cpu" in where for where in graphs.values())


@pytest.mark.parametrize("verb", ["export", "run", "inspect", "doctor", "demo"])
def test_every_verb_explains_itself(edgekit: Run, verb: str) -> None:
    """`--help` of every verb answers with exit code 0 and names --json."""
    done = edgekit(verb, "--help")
    assert done.returncode == 0
    assert "--json" in done.stdout


def test_version_and_no_arguments(edgekit: Run) -> None:
    """`--version` prints it; no verb at all prints the help and is a usage error."""
    assert edgekit("--version").stdout.startswith("edgekit ")
    nothing = edgekit()
    assert nothing.returncode == 2
    assert "export" in nothing.stdout + nothing.stderr
