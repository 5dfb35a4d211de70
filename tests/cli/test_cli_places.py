"""Where bundles, prompts and options may come from: zips, odd folders, other working directories, the environment."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edgekit.bundle.store import pack_zip, read_bundle
from tests.cli.conftest import MODELS, ROOT, Run, command, only_json

PROMPT = "def add(a, b):\n    return"
RUN = ("--prompt", PROMPT, "--max-new-tokens", 6)
ODD = "with spaces, ümlaut & 🙂 'quotes'"


@pytest.fixture(scope="module")
def expected(edgekit: Run, text_bundle: Path) -> str:
    """What the bundle in its own folder says."""
    done = edgekit("run", text_bundle, *RUN)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def zipped(text_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle as one file."""
    target = tmp_path_factory.mktemp("zip") / "draft.zip"
    pack_zip(read_bundle(text_bundle), target)
    return target


def test_a_zip_runs_like_its_folder(edgekit: Run, zipped: Path, expected: str, tmp_path: Path) -> None:
    """Run, inspect and doctor take the archive; it is unpacked once, into the cache that was asked for."""
    env = {"EDGEKIT_CACHE": str(tmp_path / "cache")}
    assert edgekit("run", zipped, *RUN, env=env).stdout == expected
    kept = [path.stat().st_mtime_ns for path in sorted((tmp_path / "cache").rglob("*.data"))]
    assert len(kept) == 1
    assert only_json(edgekit("inspect", zipped, "--json", env=env))["manifest"]["task"] == "text-generation"
    assert only_json(edgekit("doctor", "--bundle", zipped, "--json", env=env))["graphs"]
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "cache").rglob("*.data"))] == kept


def test_two_runs_share_an_empty_cache(zipped: Path, expected: str, tmp_path: Path) -> None:
    """Three first runs of the same zip at once all answer, and one copy is left in the cache."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "EDGEKIT_CACHE": str(tmp_path / "cache")}
    pipe = subprocess.PIPE
    runs = [
        subprocess.Popen(command("run", zipped, *RUN), stdout=pipe, stderr=pipe, text=True, env=env) for _ in range(3)
    ]
    for run in runs:
        out, err = run.communicate(timeout=120)
        assert (run.returncode, out) == (0, expected), err
    assert len(list((tmp_path / "cache" / "bundles").iterdir())) == 1


def test_a_cache_that_cannot_be_made_is_told(edgekit: Run, zipped: Path, tmp_path: Path) -> None:
    """A file where the cache folder should be: exit code 2 and its name, no traceback."""
    (tmp_path / "cache").touch()
    done = edgekit("run", zipped, *RUN, env={"EDGEKIT_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 2
    assert "cache" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_read_only_bundle_runs(edgekit: Run, text_bundle: Path, expected: str, tmp_path: Path) -> None:
    """Nothing is ever written into a bundle: folders and files without write permission, equal before and after."""
    copy = tmp_path / "fixed.bundle"
    shutil.copytree(text_bundle, copy)
    for path in (*copy.rglob("*"), copy):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    try:
        assert edgekit("run", copy, *RUN).stdout == expected
        assert edgekit("inspect", copy).returncode == 0
        assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
    finally:
        for path in (copy, *copy.rglob("*")):
            path.chmod(0o755)


def test_odd_names_and_relative_paths_work_throughout(edgekit: Run, expected: str, tmp_path: Path) -> None:
    """Export, inspect and run from another directory, by relative names with blanks, quotes, umlauts and an emoji."""
    here = tmp_path / ODD
    (here / "sub").mkdir(parents=True)
    shutil.copytree(MODELS / "pycode-draft", here / f"model {ODD}")
    made = edgekit("export", f"../model {ODD}", "-o", f"{ODD}.bundle", cwd=here / "sub")
    assert made.returncode == 0, made.stderr
    assert only_json(edgekit("inspect", f"{ODD}.bundle", "--json", cwd=here / "sub"))["bundle"] == f"{ODD}.bundle"
    done = edgekit("run", f"sub/{ODD}.bundle", *RUN, "-o", f"{ODD}.txt", cwd=here)
    assert done.returncode == 0, done.stderr
    assert (here / f"{ODD}.txt").read_text() + "\n" == expected


def test_a_link_to_a_bundle_runs_and_is_exported_through(edgekit: Run, text_bundle: Path, tmp_path: Path) -> None:
    """A link stands for its bundle: it runs, it is found up to date, and it is still a link afterwards."""
    link = tmp_path / "link.bundle"
    link.symlink_to(text_bundle, target_is_directory=True)
    assert edgekit("run", link, *RUN).returncode == 0
    assert only_json(edgekit("export", MODELS / "pycode-draft", "-o", link, "--json"))["state"] == "up to date"
    assert link.is_symlink()


def test_device_auto_says_what_it_took(edgekit: Run, text_bundle: Path) -> None:
    """`--device auto` names the device on stderr; --quiet keeps it to itself; the text is text."""
    done = edgekit("run", text_bundle, *RUN, "--device", "auto")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("device: ")
    assert done.stdout.strip()
    assert edgekit("run", text_bundle, *RUN, "--device", "auto", "--quiet").stderr == ""


def test_one_thread_or_two_is_the_same_text(edgekit: Run, text_bundle: Path, expected: str) -> None:
    """The engine's threads decide how fast an fp32 text comes, not which."""
    assert [edgekit("run", text_bundle, *RUN, "--threads", count).stdout for count in (1, 2)] == [expected] * 2


def test_the_text_options_do_what_they_say(edgekit: Run, text_bundle: Path) -> None:
    """Keeping one token is greedy, by top-k, by a tiny top-p or by min-p 1, at any temperature."""
    base = ("run", text_bundle, "--prompt", PROMPT, "--max-new-tokens", 12)
    greedy = edgekit(*base, "--temperature", 0).stdout
    for only_the_best in (("--top-k", 1), ("--top-p", 1e-6), ("--min-p", 1)):
        assert edgekit(*base, "--temperature", 2, "--seed", 5, *only_the_best).stdout == greedy


ENVIRONMENT: dict[str, tuple[tuple[str, ...], dict[str, str], tuple[str, ...], Any]] = {
    "inspect --no-verify": (("inspect", "BUNDLE", "--json"), {"EDGEKIT_INSPECT_VERIFY": "0"}, ("verified",), False),
    "inspect --json": (("inspect", "BUNDLE"), {"EDGEKIT_INSPECT_JSON": "1"}, ("verified",), True),
    "doctor": (("doctor",), {"EDGEKIT_DOCTOR_JSON": "1"}, ("problems",), []),
    "doctor --device": (
        ("doctor", "--bundle", "BUNDLE", "--json"),
        {"EDGEKIT_DOCTOR_DEVICE": "npu"},
        ("error", "kind"),
        "UnknownDevice",
    ),
    "export --dry-run": (
        ("export", "SOURCE", "--json"),
        {
            "EDGEKIT_EXPORT_OUTPUT": "x.bundle",
            "EDGEKIT_EXPORT_DRY_RUN": "1",
            "EDGEKIT_EXPORT_PRECISION": "int4",
        },
        ("plan", "precision"),
        "int4",
    ),
    "export --task": (
        ("export", "SOURCE", "-o", "x.bundle", "--json"),
        {"EDGEKIT_EXPORT_TASK": "text-to-image"},
        ("error", "kind"),
        "BadRequest",
    ),
    "demo": (("demo",), {"EDGEKIT_DEMO_MODELS": "none", "EDGEKIT_DEMO_JSON": "1"}, ("error", "kind"), "BadRequest"),
    "run": (
        ("run", "BUNDLE", "--json"),
        {"EDGEKIT_RUN_PROMPT": PROMPT, "EDGEKIT_RUN_MAX_NEW_TOKENS": "2", "EDGEKIT_RUN_STOP": "~~"},
        ("finish_reason",),
        "length",
    ),
}


@pytest.mark.parametrize("case", ENVIRONMENT)
def test_options_come_from_the_environment(edgekit: Run, text_bundle: Path, tmp_path: Path, case: str) -> None:
    """EDGEKIT_VERB_OPTION is the option, in every verb."""
    args, env, path, wanted = ENVIRONMENT[case]
    places = {"BUNDLE": str(text_bundle), "SOURCE": str(MODELS / "pycode-draft")}
    value: Any = only_json(edgekit(*(places.get(word, word) for word in args), env=env, cwd=tmp_path))
    for key in path:
        value = value[key]
    assert value == wanted


def test_the_command_line_goes_before_the_environment(edgekit: Run, text_bundle: Path) -> None:
    """What is typed wins over what is set."""
    env = {"EDGEKIT_RUN_MAX_NEW_TOKENS": "9", "EDGEKIT_RUN_SEED": "none"}
    done = edgekit("run", text_bundle, "--prompt", PROMPT, "--max-new-tokens", 2, "--seed", 1, "--json", env=env)
    assert len(only_json(done)["tokens"]) == 2


SHAPES: dict[str, tuple[tuple[str, ...], dict[str, type]]] = {
    "export": (
        ("export", "SOURCE", "-o", "x.bundle"),
        {
            "bundle": str,
            "state": str,
            "task": str,
            "family": str,
            "parts": list,
            "precision": str,
            "stored": dict,
            "reason": str,
            "bytes": int,
        },
    ),
    "export --dry-run": (("export", "SOURCE", "-o", "x.bundle", "--dry-run"), {"plan": dict}),
    "run": (
        ("run", "BUNDLE", "--prompt", "x", "--max-new-tokens", "2"),
        {
            "task": str,
            "text": str,
            "tokens": list,
            "finish_reason": str,
            "prompt_tokens": list,
            "stats": dict,
            "spans": list,
            "seed": int,
            "mean_logprob": type(None),
        },
    ),
    "inspect": (("inspect", "BUNDLE"), {"bundle": str, "verified": bool, "manifest": dict}),
    "doctor": (
        ("doctor",),
        {
            "edgekit": str,
            "python": str,
            "system": str,
            "engine": str,
            "devices": list,
            "packages": dict,
            "problems": list,
        },
    ),
}


@pytest.mark.parametrize("verb", SHAPES)
def test_the_object_of_a_verb_keeps_its_shape(edgekit: Run, text_bundle: Path, tmp_path: Path, verb: str) -> None:
    """Keys and types of schema version 1: a program that reads them today reads them tomorrow."""
    args, shape = SHAPES[verb]
    places = {"BUNDLE": str(text_bundle), "SOURCE": str(MODELS / "pycode-draft")}
    done = edgekit(*(places.get(word, word) for word in args), "--json", cwd=tmp_path)
    told = only_json(done)
    assert {key: type(value) for key, value in told.items() if key != "schema_version"} == shape
    assert done.stderr == ""
