"""`edgekit run --draft` and `edgekit pair`, as a user types them: the same text, other figures, clear refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import MODELS, Run, only_json
from tests.cli.pseudo_terminal import Terminal

PROMPT = "def read_json(path):\n    with open(path) as f:\n        return json.load(f)\n\n\ndef read_json(path):\n"
LENGTH = 40


@pytest.fixture(scope="module")
def target(edgekit: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped target, exported by the real command."""
    path = tmp_path_factory.mktemp("bundles") / "target.bundle"
    done = edgekit("export", MODELS / "pycode", "-o", path)
    assert done.returncode == 0, done.stderr
    return path


def run(edgekit: Run, target: Path, *options: object, prompt: str = PROMPT):
    return edgekit("run", target, "--prompt", prompt, "--max-new-tokens", LENGTH, *options)


@pytest.mark.parametrize("draft", ["auto", "corpus", "model"])
def test_the_same_text_with_every_drafter(edgekit: Run, target: Path, text_bundle: Path, tmp_path: Path, draft):
    """`--draft` changes the figures and not one token, greedy and drawn."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.py").write_text("import json\n\n" + PROMPT)
    name = {"corpus": f"corpus:{tmp_path / 'texts'}", "model": str(text_bundle)}.get(draft, draft)
    how = ("--json", "--exact", "--temperature", 0.8, "--seed", 3)
    plain, helped = (only_json(run(edgekit, target, *how, *drafts)) for drafts in ((), ("--draft", name)))
    assert helped["tokens"] == plain["tokens"]
    assert plain["stats"]["speculation"] is None
    told = helped["stats"]["speculation"]
    assert told["tokens"] == len(plain["tokens"]) - 1
    assert told["lossless"] is True


def test_a_fixed_number_of_drafts(edgekit: Run, target: Path, text_bundle: Path) -> None:
    """`num_speculative_tokens` alone is kept to, as in vLLM; every figure of the step is told."""
    config = json.dumps({"model": str(text_bundle), "method": "model", "num_speculative_tokens": 3})
    done = only_json(run(edgekit, target, "--json", "--draft", "auto", "--speculative-config", config))
    told = done["stats"]["speculation"]
    assert told["drafter"] == "model"
    assert told["rows_per_token"] >= 1
    assert told["changes"] == []
    assert [row["depth"] for row in told["acceptance"]] == [1, 2, 3]
    assert told["tokens_per_verify"] == pytest.approx(told["tokens"] / told["steps"])


def test_stats_say_what_the_controller_did(edgekit: Run, target: Path) -> None:
    """`--stats` on stderr: acceptance, rows, times, the measured curve; the text alone on stdout."""
    plain, helped = run(edgekit, target), run(edgekit, target, "--draft", "ngram", "--stats")
    assert helped.stdout == plain.stdout
    for words in ("drafter: ngram", "acceptance by depth", "tokens per verification", "rows per token", "T(n) / T(1)"):
        assert words in helped.stderr


def test_drafts_are_coloured_on_a_terminal(target: Path, text_bundle: Path) -> None:
    """`--show-drafts` colours the tokens that drafts guessed, and counts tokens by origin."""
    config = json.dumps({"num_speculative_tokens": 3})
    options = ("--draft", text_bundle, "--speculative-config", config, "--show-drafts")
    terminal = Terminal(("run", target, "--prompt", PROMPT, "--max-new-tokens", 20, *options))
    assert terminal.finish() == 0
    assert "\x1b[36m" in terminal.screen
    assert "tokens by origin" in terminal.screen


def test_a_pipe_gets_no_colours(edgekit: Run, target: Path, text_bundle: Path) -> None:
    """Piped, the text is the plain one, with `--show-drafts` too."""
    plain = run(edgekit, target)
    shown = run(edgekit, target, "--draft", text_bundle, "--show-drafts")
    assert shown.stdout == plain.stdout
    assert "tokens by origin" in shown.stderr


def test_copies_are_attributed(edgekit: Run, target: Path, tmp_path: Path) -> None:
    """Tokens copied from a document are named with the document and the place, on stderr and in the object."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.py").write_text("import json\n\n" + run(edgekit, target).stdout)
    options = ("--draft", f"corpus:{tmp_path / 'texts'}", "--speculative-config", '{"num_speculative_tokens": 6}')
    shown = run(edgekit, target, *options, "--show-drafts")
    assert "stand in a.py from its token" in shown.stderr
    told = only_json(run(edgekit, target, *options, "--json"))
    assert {span["document"] for span in told["spans"]} == {"a.py"}
    assert sum(span["end"] - span["start"] for span in told["spans"]) > LENGTH // 2


def test_prompts_are_kept_between_runs(edgekit: Run, target: Path, tmp_path: Path) -> None:
    """`--prefix-cache` spares the second run its prompt, and refuses the cache of another model."""
    cache = tmp_path / "prompts.cache"
    first = only_json(run(edgekit, target, "--json", "--prefix-cache", cache))
    again = only_json(run(edgekit, target, "--json", "--prefix-cache", cache))
    assert first["stats"]["reused_tokens"] == 0
    assert again["stats"]["prefill_tokens"] == 1
    assert again["tokens"] == first["tokens"]
    other = tmp_path / "other.bundle"
    assert edgekit("export", MODELS / "pycode", "-o", other, "--precision", "int8").returncode == 0
    refused = run(edgekit, other, "--prefix-cache", cache)
    assert refused.returncode == 2
    assert "decoder" in refused.stderr


def test_the_likeliest_of_several(edgekit: Run, target: Path) -> None:
    """`--best-of` gives the text of one of the seeds, the one whose mean log-probability is largest."""
    best = only_json(run(edgekit, target, "--json", "--best-of", 3, "--temperature", 1.0, "--seed", 5))
    alone = only_json(run(edgekit, target, "--json", "--temperature", 1.0, "--seed", best["seed"]))
    assert best["seed"] in (5, 6, 7)
    assert best["tokens"] == alone["tokens"]
    assert best["mean_logprob"] < 0
    assert run(edgekit, target, "--best-of", 3).returncode == 2


REFUSED = {
    "no such drafter": (("--draft", "oracle"), "no drafter and no bundle 'oracle'"),
    "no JSON": (("--speculative-config", "{"), "is no JSON"),
    "no object": (("--speculative-config", "[1]"), "must be a JSON object"),
    "unknown key": (("--draft", "ngram", "--speculative-config", '{"tokens": 3}'), "num_speculative_tokens"),
    "wrong type": (("--draft", "ngram", "--speculative-config", '{"num_speculative_tokens": "3"}'), "is not one"),
    "out of range": (("--draft", "ngram", "--speculative-config", '{"num_speculative_tokens": 0}'), "between 1 and 64"),
    "two methods": (("--draft", "ngram", "--speculative-config", '{"method": "lookahead"}'), "contradict"),
    "another rule's option": (("--draft", "ngram", "--speculative-config", '{"gamma": 0.3}'), "lossy-ratio"),
    "no texts": (("--draft", "corpus"), "corpus:PATH"),
    "texts that are not there": (("--draft", "corpus:nowhere"), "no text file and no folder"),
    "no model": (("--draft", "model"), "needs a bundle"),
    "colours in a file": (("--show-drafts", "-o", "x.txt"), "--show-drafts colours text that streams"),
    "unprobed": (("--exact", "--speculative-config", '{"num_speculative_tokens": 40}'), "at most 15"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused(edgekit: Run, target: Path, case: str) -> None:
    """Exit code 2, and a message that says what would be legal."""
    options, words = REFUSED[case]
    done = run(edgekit, target, *options)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert done.stdout == ""


def test_an_image_bundle_takes_no_drafts(edgekit: Run, image_bundle: Path) -> None:
    """Options of text bundles are refused where there is no text."""
    done = edgekit("run", image_bundle, "--prompt", "apple", "--draft", "ngram")
    assert done.returncode == 2
    assert "text" in done.stderr


def test_lossy_rules_say_so(edgekit: Run, target: Path, text_bundle: Path) -> None:
    """An opt-in rule is lossy in its name, in the stats, and counts what it let pass."""
    config = {"model": str(text_bundle), "method": "model", "num_speculative_tokens": 4, "acceptance": "lossy-typical"}
    how = ("--temperature", 1.0, "--speculative-config", json.dumps(config), "--draft", "auto", "--json")
    told = only_json(run(edgekit, target, *how))["stats"]["speculation"]
    assert told["lossless"] is False
    assert told["disagreements"] > 0


def test_a_pair_is_tried(edgekit: Run, target: Path, text_bundle: Path) -> None:
    """`edgekit pair`: the same tokenizer, equal texts, acceptance by depth, a measured and a predicted speedup."""
    found = only_json(edgekit("pair", target, text_bundle, "--max-new-tokens", 24, "--json"))
    assert found["same_tokenizer"] is True
    assert found["prompts"] >= 4
    assert found["same_text"] == found["prompts"]
    assert found["slowest"] <= found["speedup"] <= found["fastest"]
    assert found["acceptance"][0]["rate"] > 0.3
    assert found["predicted"] > 0
    shown = edgekit("pair", target, text_bundle, "--max-new-tokens", 24)
    assert "tokenizer" in shown.stdout
    assert "predicted speedup" in shown.stdout


def test_a_pair_on_ones_own_text(edgekit: Run, target: Path, text_bundle: Path, tmp_path: Path) -> None:
    """`--text` is what is continued; one that is too short is refused."""
    (tmp_path / "mine.py").write_text("def area(width, height):\n    return width * height\n\n\n" * 6)
    found = only_json(edgekit("pair", target, text_bundle, "--text", tmp_path / "mine.py", "--json"))
    assert found["same_text"] == found["prompts"]
    (tmp_path / "short.py").write_text("x = 1\n")
    done = edgekit("pair", target, text_bundle, "--text", tmp_path / "short.py")
    assert done.returncode == 2
    assert "longer --text" in done.stderr
