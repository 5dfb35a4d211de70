"""What goes wrong on the command line ends in one line (or one object) and the exit code the manual promises."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from edgekit.cli import terminal
from edgekit.errors import BadRequest
from tests.cli.conftest import MODELS, ROOT, Run, command, only_json

SHORT = ("--prompt", "import os", "--max-new-tokens", 3)


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One line on stderr with these words, nothing on stdout, the exit code."""
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr


OUTPUTS = {
    "a missing folder": ("none/x.txt", "make it first"),
    "a folder": ("folder", "is a folder"),
    "below a file": ("file/x.txt", "not a folder"),
    "a name too long": ("n" * 300, "too long"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_an_output_that_cannot_be_written_is_refused(
    edgekit: Run, text_bundle: Path, tmp_path: Path, case: str
) -> None:
    """`run -o` into a place that is none: exit code 2, a message with the place, and the folder as it was."""
    name, word = OUTPUTS[case]
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    refused(edgekit("run", text_bundle, *SHORT, "-o", tmp_path / name), 2, word, str(tmp_path))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_hopeless_output_is_refused_before_the_work(edgekit: Run, tmp_path: Path) -> None:
    """The place of the result is looked at before the bundle is: here there is not even a bundle."""
    done = edgekit("run", tmp_path / "none.bundle", *SHORT, "-o", tmp_path / "none" / "x.txt", "--json")
    assert only_json(done)["error"]["kind"] == "BadRequest"
    assert "make it first" in only_json(done)["error"]["message"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else_is_refused(edgekit: Run, text_bundle: Path, tmp_path: Path) -> None:
    """A folder without write permission: exit code 2 and no traceback."""
    tmp_path.chmod(0o555)
    refused(edgekit("run", text_bundle, *SHORT, "-o", tmp_path / "x.txt"), 2, "cannot be written to")


def test_a_written_text_is_the_text(edgekit: Run, text_bundle: Path, tmp_path: Path) -> None:
    """`-o` writes what --json reports, byte for byte in UTF-8, over what was there, and stdout stays free."""
    target = tmp_path / "text.txt"
    target.write_text("old " * 1000)
    done = edgekit("run", text_bundle, *SHORT, "-o", target)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    told = only_json(edgekit("run", text_bundle, *SHORT, "--json"))
    assert target.read_bytes() == told["text"].encode()
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


TARGETS = {
    "below a file": ("file/x.bundle", "file"),
    "a file": ("file", "is not a bundle"),
    "a folder that is no bundle": ("folder", "is not a bundle"),
    "the source itself": ("model", "is not a bundle"),
    "inside the source": ("model/x.bundle", "inside its source"),
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("case", TARGETS)
def test_a_target_that_cannot_be_meant_is_refused(edgekit: Run, tmp_path: Path, case: str, force: bool) -> None:
    """`export -o` onto a file, a folder with other things in it, or into its own source: refused, --force or not."""
    name, word = TARGETS[case]
    shutil.copytree(MODELS / "pycode-draft", tmp_path / "model")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    done = edgekit("export", tmp_path / "model", "-o", tmp_path / name, *(["--force"] if force else []))
    refused(done, 2, word)
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_folders_above_a_target_are_made(edgekit: Run, tmp_path: Path) -> None:
    """`export -o` several folders deep makes them, and leaves nothing else in them."""
    done = edgekit("export", MODELS / "pycode-draft", "-o", tmp_path / "a" / "b" / "x.bundle", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["x.bundle"]


def test_a_full_disk_ends_an_export_in_one_line(tmp_path: Path) -> None:
    """Where no file may pass a megabyte, the weights do not fit: exit code 1, no traceback, no bundle, no draft."""

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    args = command("export", MODELS / "pycode-draft", "-o", tmp_path / "x.bundle", "--json")
    done = subprocess.run(
        args,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=small_files,
    )
    assert done.returncode == 1, done.stderr
    assert "Is the disk full?" in only_json(done)["error"]["message"]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("verb", ["inspect", "run"])
def test_a_full_disk_behind_stdout_is_a_failure(text_bundle: Path, verb: str) -> None:
    """Output that could not be written is never a success: exit code 1, one line."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command(verb, text_bundle, *(SHORT if verb == "run" else ())),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


JSON_FAILURES = {
    "no such bundle": (("inspect", "none.bundle"), 5, "MissingFile"),
    "no such source": (("export", "none", "-o", "x.bundle"), 2, "BadSource"),
    "no such model folder": (("demo", "--models", "none", "-o", "out"), 2, "BadRequest"),
    "no such device": (("export", "none", "-o", "x.bundle", "--device", "npu"), 4, "UnknownDevice"),
    "no such bundle to open": (("doctor", "--bundle", "none.bundle"), 5, "MissingFile"),
    "no such option": (("inspect", "x", "--bogus"), 2, "UsageError"),
    "no argument": (("export",), 2, "UsageError"),
    "not a number": (("run", "x", "--threads", "many"), 2, "UsageError"),
    "two prompts": (("run", "x", "--prompt", "a", "--prompt-file", "b"), 2, "BadRequest"),
    "no size": (("export", "none", "-o", "x", "--max-memory", "lots"), 2, "BadRequest"),
    "no LoRA": (("export", "none", "-o", "x", "--lora", "none.safetensors:0.5"), 2, "BadRequest"),
}


@pytest.mark.parametrize("case", JSON_FAILURES)
def test_a_failure_with_json_is_one_object(edgekit: Run, tmp_path: Path, case: str) -> None:
    """Whoever reads --json gets an object with kind, message and exit code, also for a line that does not parse."""
    args, code, kind = JSON_FAILURES[case]
    done = edgekit(*args, "--json", cwd=tmp_path)
    told = only_json(done)
    assert set(told) == {"schema_version", "error"}
    assert (told["error"]["kind"], told["error"]["exit_code"], done.returncode) == (kind, code, code)
    assert told["error"]["message"]
    assert done.stderr == ""


@pytest.mark.parametrize(("value", "as_json"), [("1", True), ("true", True), ("0", False)])
def test_json_from_the_environment_covers_what_does_not_parse(edgekit: Run, value: str, as_json: bool) -> None:
    """EDGEKIT_RUN_JSON decides the form of a parse error as the option does."""
    done = edgekit("run", "x", "--threads", "many", env={"EDGEKIT_RUN_JSON": value})
    assert done.returncode == 2
    assert done.stdout.startswith("{") == as_json
    assert ("Usage:" in done.stderr) != as_json


PROMPTS = {
    "half a surrogate": (("--prompt", b"\xff\xfe"), "Unicode"),
    "not UTF-8 from a file": (("--prompt-file", "bad.txt"), "cannot read the prompt"),
    "a folder": (("--prompt-file", "."), "cannot read the prompt"),
    "longer than the context": (("--prompt-file", "long.txt"), "context is 1024"),
    "two prompts": (("--prompt", "x", "--prompt-file", "long.txt"), "exactly one"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_a_prompt_that_cannot_be_read_is_refused(text_bundle: Path, tmp_path: Path, case: str) -> None:
    """Bytes that are no text, and text that does not fit: exit code 2 with the reason."""
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "long.txt").write_text("spam " * 3000)
    args, word = PROMPTS[case]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command("run", text_bundle), *args], capture_output=True, env=env, cwd=tmp_path, check=False
    )
    refused(subprocess.CompletedProcess(args, done.returncode, done.stdout.decode(), done.stderr.decode()), 2, word)


def test_a_prompt_from_standard_input_that_is_no_text_is_refused(text_bundle: Path) -> None:
    """Latin-1 through the pipe is told from UTF-8, whatever the locale says."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0"}
    args = command("run", text_bundle, "--prompt", "-")
    done = subprocess.run(args, input="café".encode("latin-1"), capture_output=True, env=env, check=False)
    assert done.returncode == 2
    assert b"cannot read the prompt" in done.stderr


def test_a_broken_bundle_fails_alike_in_every_verb(edgekit: Run, text_bundle: Path, tmp_path: Path) -> None:
    """A manifest with one brace too few: run, inspect and doctor all end with 5 and name the file."""
    broken = tmp_path / "broken.bundle"
    shutil.copytree(text_bundle, broken)
    manifest = broken / "edgekit.json"
    manifest.write_text(manifest.read_text()[:-2])
    for args in (("run", broken, *SHORT), ("inspect", broken), ("doctor", "--bundle", broken)):
        told = only_json(edgekit(*args, "--json"))["error"]
        assert (told["kind"], told["exit_code"]) == ("BadManifest", 5)
        assert "edgekit.json" in told["message"]


SIZES = {"300MB": 300_000_000, "8GiB": 8 * 2**30, "1.5 gb": 1_500_000_000, "12": 12, "0B": 0, "2kib": 2048}


@pytest.mark.parametrize("text", SIZES)
def test_sizes_are_read_as_written(text: str) -> None:
    """Decimal and binary units, any case, with or without a space."""
    assert terminal.parse_bytes(text) == SIZES[text]


@pytest.mark.parametrize("text", ["", "MB", "-1GB", "1e9", "1,5GB", "nan", "inf", "3TB", "9" * 400 + "GB", "1 2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    """Signs, exponents, commas and absurd figures are refused, not guessed at."""
    with pytest.raises(BadRequest):
        terminal.parse_bytes(text)


@pytest.mark.parametrize("number", ["EACCES", "EROFS", "ENOTDIR", "ENAMETOOLONG", "ENOSPC", "EIO", "EFBIG", "EDQUOT"])
def test_the_systems_refusals_keep_their_kind(number: str) -> None:
    """A path that cannot be used is a usage error that names it; a disk that fails is a failure, and says so."""
    import errno

    code = getattr(errno, number)
    told = terminal.translated(OSError(code, os.strerror(code), "some/file"))
    disk = number in ("ENOSPC", "EIO", "EFBIG", "EDQUOT")
    assert told.exit_code == (1 if disk else 2)
    assert "some/file" in str(told)
    assert ("disk" in str(told)) == disk


def test_the_failure_object_is_json() -> None:
    """Messages may hold quotes, line breaks and any script; the object stays one."""
    message = 'a "quoted"\nline 🙂'
    assert json.loads(json.dumps(terminal.failure("X", message, 3)))["error"]["message"] == message
