"""`edgekit export`, `inspect`, `run` on a language model, as a user types them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from edgekit.bundle.store import read_bundle
from tests.cli.conftest import MODELS, ROOT, Run, command, only_json

PROMPT = "def add(a, b):\n    return"


def test_export_again_finds_its_work_done(edgekit: Run, text_bundle: Path) -> None:
    """The same request on the same source is answered from what is there."""
    before = (text_bundle / "edgekit.json").stat().st_mtime_ns
    done = edgekit("export", MODELS / "pycode-draft", "-o", text_bundle, "--json")
    assert only_json(done)["state"] == "up to date"
    assert (text_bundle / "edgekit.json").stat().st_mtime_ns == before


def test_export_does_not_replace_a_different_bundle_unasked(edgekit: Run, text_bundle: Path) -> None:
    """Another precision under the same name needs --force."""
    done = edgekit("export", MODELS / "pycode-draft", "-o", text_bundle, "--precision", "fp16")
    assert done.returncode == 2
    assert "--force" in done.stderr


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_every_precision_exports_and_runs(edgekit: Run, tmp_path: Path, precision: str) -> None:
    """Each precision makes a bundle that says so, and that completes text."""
    target = tmp_path / "small.bundle"
    done = edgekit("export", MODELS / "pycode-draft", "-o", target, "--precision", precision, "--json")
    assert only_json(done)["precision"] == precision
    ran = edgekit("run", target, "--prompt", PROMPT, "--max-new-tokens", 4, "--json")
    assert only_json(ran)["tokens"], ran.stderr


def test_dry_run_says_what_it_costs_and_writes_nothing(edgekit: Run, tmp_path: Path) -> None:
    """`--dry-run` names parts, disk and memory; the folder stays empty."""
    done = edgekit("export", MODELS / "pycode-draft", "-o", tmp_path / "x.bundle", "--dry-run", "--json")
    plan = only_json(done)["plan"]
    assert plan["disk_bytes"] > 0
    assert plan["peak_bytes"] > 0
    assert [part["name"] for part in plan["parts"]] == ["decoder"]
    assert list(tmp_path.iterdir()) == []


def test_a_memory_cap_below_the_need_is_refused_before_work(edgekit: Run, tmp_path: Path) -> None:
    """`--max-memory` is hard: exit code 4, a message with both figures, nothing written."""
    done = edgekit("export", MODELS / "pycode", "-o", tmp_path / "x.bundle", "--max-memory", "20MB")
    assert done.returncode == 4
    assert "20.0 MB" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_inspect_shows_and_verifies(edgekit: Run, text_bundle: Path) -> None:
    """`inspect` prints parts, decoding and provenance for people, and the manifest for programs."""
    shown = edgekit("inspect", text_bundle)
    assert shown.returncode == 0
    for word in ("every hash verified", "decoder", "KV cache", "source sha256", "fp32"):
        assert word in shown.stdout
    assert only_json(edgekit("inspect", text_bundle, "--json"))["manifest"]["task"] == "text-generation"


def test_text_goes_to_stdout_and_is_the_same_streamed_or_whole(edgekit: Run, text_bundle: Path) -> None:
    """The streamed text equals the text of --json, and nothing else is on stdout."""
    whole = only_json(edgekit("run", text_bundle, "--prompt", PROMPT, "--max-new-tokens", 24, "--json"))
    streamed = edgekit("run", text_bundle, "--prompt", PROMPT, "--max-new-tokens", 24, "--stats")
    assert streamed.stdout == whole["text"] + "\n"
    assert "tokens" in streamed.stderr


def test_the_prompt_can_come_from_a_file_or_standard_input(edgekit: Run, text_bundle: Path, tmp_path: Path) -> None:
    """`--prompt-file` and `--prompt -` read the same prompt as `--prompt`."""
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    base = ("run", text_bundle, "--max-new-tokens", 8)
    told = edgekit(*base, "--prompt", PROMPT).stdout
    assert edgekit(*base, "--prompt-file", file).stdout == told
    assert edgekit(*base, "--prompt", "-", input=PROMPT).stdout == told


def test_the_same_seed_gives_the_same_sample(edgekit: Run, text_bundle: Path) -> None:
    """Sampling is a function of the seed, also when the seed comes from the environment."""
    base = ("run", text_bundle, "--prompt", PROMPT, "--max-new-tokens", 24, "--temperature", 1.0)
    seven = edgekit(*base, "--seed", 7).stdout
    assert edgekit(*base, env={"EDGEKIT_RUN_SEED": "7"}).stdout == seven
    assert edgekit(*base, "--seed", 8).stdout != seven


def test_a_stop_string_ends_the_text_before_it(edgekit: Run, text_bundle: Path) -> None:
    """The stop string and what follows never appear."""
    free = only_json(edgekit("run", text_bundle, "--prompt", PROMPT, "--max-new-tokens", 24, "--json"))["text"]
    stop = free[3:5]
    cut = only_json(edgekit("run", text_bundle, "--prompt", PROMPT, "--max-new-tokens", 24, "--stop", stop, "--json"))
    assert cut["text"] == free[: free.index(stop)]
    assert cut["finish_reason"] == "stop"


CASES = {
    "no prompt": (("--max-new-tokens", 4), 2, "--prompt"),
    "negative temperature": (("--prompt", "x", "--temperature", -1), 2, "temperature"),
    "top-p over one": (("--prompt", "x", "--top-p", 1.5), 2, "top_p"),
    "image option": (("--prompt", "x", "--steps", 4), 2, "--steps"),
    "unknown device": (("--prompt", "x", "--device", "npu"), 4, "npu"),
    "absent device": (("--prompt", "x", "--device", "cuda"), 4, "cuda"),
    "no chat template": (("--prompt", "x", "--chat"), 2, "chat template"),
    "unknown flag": (("--prompt", "x", "--bogus"), 2, "bogus"),
    "missing prompt file": (("--prompt-file", "no/such/file"), 2, "no/such/file"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_request_is_refused_in_words(edgekit: Run, text_bundle: Path, case: str) -> None:
    """Each mistake has its exit code and a message that names it; no traceback."""
    args, code, word = CASES[case]
    done = edgekit("run", text_bundle, *args)
    assert done.returncode == code, done.stderr
    assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_bundle_is_refused_by_every_verb(edgekit: Run, text_bundle: Path, tmp_path: Path) -> None:
    """One flipped byte in the weights: exit code 5 from run and inspect, as text and as JSON."""
    import shutil

    broken = tmp_path / "broken.bundle"
    shutil.copytree(text_bundle, broken)
    weights = next((broken / "graphs").glob("*.data"))
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2] ^= 1
    weights.write_bytes(bytes(raw))
    for verb in (("inspect", broken), ("run", broken, "--prompt", "x")):
        done = edgekit(*verb)
        assert done.returncode == 5
        assert "sha256" in done.stderr
    told = edgekit("inspect", broken, "--json")
    assert only_json(told)["error"]["kind"] == "WrongHash"


def test_what_is_no_model_folder_is_refused(edgekit: Run, tmp_path: Path) -> None:
    """A missing folder, an empty one, and one with an unknown model: exit code 2 and nothing written."""
    empty, unknown = tmp_path / "empty", tmp_path / "unknown"
    empty.mkdir()
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model_type": "perceiver"}')
    for source, word in ((tmp_path / "none", "not a folder"), (empty, "config.json"), (unknown, "perceiver")):
        done = edgekit("export", source, "-o", tmp_path / "x.bundle")
        assert done.returncode == 2, done.stderr
        assert word in done.stderr
    assert not (tmp_path / "x.bundle").exists()


def interrupt(args: tuple[object, ...], *, after: float, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Start a command, press Ctrl-C after a while, and wait for it."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command(*args), stdout=pipe, stderr=pipe, text=True, env=env, cwd=cwd) as process:
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(args, process.returncode, out, err)


def test_ctrl_c_ends_a_run_cleanly(text_bundle: Path, tmp_path: Path) -> None:
    """Interrupted while it writes: exit code 130, one line, no traceback."""
    args = ("run", text_bundle, "--prompt", PROMPT, "--max-new-tokens", 100_000, "--temperature", 1.5)
    process = subprocess.Popen(
        command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}, cwd=ROOT
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("after", [0.7, 1.1])
def test_ctrl_c_in_an_export_leaves_nothing(tmp_path: Path, after: float) -> None:
    """Interrupted at different moments: exit code 130 (or it was already done), and no half bundle beside it."""
    done = interrupt(("export", MODELS / "pycode", "-o", tmp_path / "x.bundle"), after=after, cwd=tmp_path)
    assert done.returncode in (0, 130, -signal.SIGINT), done.stderr  # the last: before Python itself had started
    assert "Traceback" not in done.stderr
    left = [path.name for path in tmp_path.iterdir()]
    assert left in ([], ["x.bundle"])
    if left or done.returncode == 0:  # pressed when the bundle had just appeared: it is whole
        assert read_bundle(tmp_path / "x.bundle").manifest.task == "text-generation"
