"""Two streams and a terminal: pipes that close early, narrow encodings, progress bars, Ctrl-C as it is typed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgekit.bundle.store import read_bundle
from tests.cli.conftest import MODELS, ROOT, Run, command, only_json
from tests.cli.pseudo_terminal import CTRL_C, Terminal

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes and terminals of Unix")

PROMPT = "def add(a, b):\n    return"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.mark.parametrize("verb", ["run", "inspect", "inspect --json", "doctor"])
def test_a_reader_that_goes_away_is_no_error(text_bundle: Path, verb: str) -> None:
    """`edgekit ... | head -c 1`: exit code 0 and not a word on stderr."""
    name, *options = verb.split()
    args: tuple[object, ...] = (name, *options) if name == "doctor" else (name, text_bundle, *options)
    if name == "run":
        args += ("--prompt", PROMPT, "--max-new-tokens", 400, "--temperature", 1.0)
    pipe = subprocess.PIPE
    with subprocess.Popen(command(*args), stdout=pipe, stderr=pipe, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if name == "run":
            process.stdout.read(1)
        process.stdout.close()
        words = process.stderr.read()
        assert process.wait(60) == 0, words
    assert words == b""


@pytest.mark.parametrize("verb", ["inspect", "doctor"])
def test_tables_survive_a_terminal_of_few_characters(edgekit: Run, text_bundle: Path, verb: str) -> None:
    """In a plain ASCII locale boxes become dashes and what cannot be shown a question mark; no traceback."""
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = edgekit(verb, *([text_bundle] if verb == "inspect" else []), env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


@pytest.mark.parametrize(("redirect", "code"), [(">&-", 0), ("<&-", 0), ("2>&-", 0)])
def test_a_stream_the_shell_closed_is_no_crash(text_bundle: Path, redirect: str, code: int) -> None:
    """With any one of the three streams closed a run with a prompt of its own works."""
    words = " ".join(f"'{word}'" for word in command("run", text_bundle, "--prompt", "import", "--max-new-tokens", 2))
    done = subprocess.run(
        f"{words} {redirect}", shell=True, capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_a_prompt_from_a_closed_stream_is_refused(text_bundle: Path) -> None:
    """`--prompt -` with nothing to read from: exit code 2 in words."""
    words = " ".join(f"'{word}'" for word in command("run", text_bundle, "--prompt", "-"))
    done = subprocess.run(f"{words} <&-", shell=True, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 2
    assert "standard input is closed" in done.stderr


PROMPTS = {
    "accents and emoji": "# Grüße, 東京 🙂‍↔️\n",
    "a NUL": "a\0b",
    "line breaks": "a\r\nb\rc\n\n\n",
    "only blanks": "   \t",
    "markup": "[bold]no[/bold] {braces} %s \\n",
    "a special token": "<|endoftext|>import",
    "right to left": "שלום עולם",
}


@pytest.mark.parametrize("case", PROMPTS)
def test_any_unicode_prompt_is_the_same_text_from_anywhere(text_bundle: Path, tmp_path: Path, case: str) -> None:
    """From a file and through the pipe, a mark of byte order before it or not, the model reads the same tokens."""
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbf" + PROMPTS[case].encode())
    base = ("run", text_bundle, "--max-new-tokens", 2, "--json")
    args = [command(*base, "--prompt-file", file), command(*base, "--prompt", "-")]
    sent = [None, PROMPTS[case].encode()]
    done = [
        subprocess.run(a, input=s, capture_output=True, env=ENVIRONMENT, check=False)
        for a, s in zip(args, sent, strict=True)
    ]
    told = [only_json(subprocess.CompletedProcess("", d.returncode, d.stdout.decode(), "")) for d in done]
    assert told[0]["prompt_tokens"] == told[1]["prompt_tokens"] != []
    assert told[0]["text"] == told[1]["text"]


def test_nothing_of_progress_is_seen_through_a_pipe(edgekit: Run, tmp_path: Path) -> None:
    """Not on a terminal: an export says one line on stderr when it is done, with no control characters."""
    done = edgekit("export", MODELS / "pycode-draft", "-o", tmp_path / "x.bundle")
    assert done.returncode == 0
    assert done.stdout == ""
    assert re.fullmatch(r"\S+x\.bundle written: text-generation, family llama, [\d.]+ MB\n", done.stderr)


def test_progress_on_a_terminal_shows_time_left_and_clears(tmp_path: Path) -> None:
    """A bar with a time on the terminal, erased at the end; what stays is the one line; stdout holds nothing."""
    out = tmp_path / "stdout"
    terminal = Terminal(("export", MODELS / "pycode", "-o", tmp_path / "x.bundle"), stdout=out)
    assert terminal.finish() == 0
    assert out.read_bytes() == b""
    assert re.search(r"\d:\d\d:\d\d", ESCAPE.sub("", terminal.screen))
    assert "━" in terminal.screen
    assert "\x1b[?25h" in terminal.screen  # the cursor is shown again
    last = terminal.screen.rstrip().rpartition("\x1b[2K")[2]
    assert " written: text-generation" in ESCAPE.sub("", last)
    assert "━" not in last


@pytest.mark.parametrize("option", ["--quiet", "--json"])
def test_quiet_and_json_draw_nothing_on_a_terminal(tmp_path: Path, option: str) -> None:
    """Even on a terminal: no bar, no note; with --json the object alone."""
    terminal = Terminal(("export", MODELS / "pycode-draft", "-o", tmp_path / "x.bundle", option))
    assert terminal.finish() == 0
    assert "\x1b" not in terminal.screen
    assert terminal.screen.startswith("{") if option == "--json" else terminal.screen == ""


def parts(folder: Path) -> list[Path]:
    """Files of a bundle that is being written."""
    return [path for path in folder.rglob("*") if path.is_file()]


MOMENTS = {
    "when the draft appears": lambda folder: any(folder.iterdir()),
    "when the first file appears": lambda folder: bool(parts(folder)),
    "while the weights are written": lambda folder: any(path.suffix == ".data" for path in parts(folder)),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_on_a_terminal_leaves_nothing(tmp_path: Path, moment: str) -> None:
    """Typed at three moments of an export: 130, one line, the cursor back, and no file (or it was done before)."""
    folder = tmp_path / "out"
    folder.mkdir()
    terminal = Terminal(("export", MODELS / "pycode", "-o", folder / "x.bundle"))
    terminal.read_until(lambda: MOMENTS[moment](folder))
    terminal.press(CTRL_C)
    code = terminal.finish()
    assert "Traceback" not in terminal.screen
    left = [path.name for path in folder.iterdir()]
    assert code in (0, 130, -signal.SIGINT)
    assert ("interrupted" in terminal.screen) == (code == 130)
    assert left in ([], ["x.bundle"])
    if left or code == 0:  # pressed when the bundle had just appeared: it is whole
        read_bundle(folder / "x.bundle")


def test_ctrl_c_while_text_streams(text_bundle: Path) -> None:
    """Typed when the first words are there: what was shown stays, then one line, 130."""
    terminal = Terminal(("run", text_bundle, "--prompt", PROMPT, "--max-new-tokens", 900, "--temperature", 1.5))
    terminal.read_until(lambda: len(terminal.screen.replace("^C", "")) > 20)
    terminal.press(CTRL_C)
    assert terminal.finish() == 130
    assert "interrupted" in terminal.screen
    assert "Traceback" not in terminal.screen


def test_text_streams_as_it_is_made(text_bundle: Path) -> None:
    """The first words are on the pipe while the command still runs."""
    args = command("run", text_bundle, "--prompt", PROMPT, "--max-new-tokens", 900, "--temperature", 1.5)
    with subprocess.Popen(args, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        assert process.poll() is None
        process.kill()
