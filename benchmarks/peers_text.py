"""edgekit beside ONNX Runtime GenAI, llama.cpp and OpenVINO GenAI: decode, prefill, memory, load, size; int4, one CPU.

    python benchmarks/peers_text.py --work DIR [--models qwen,smol] [--rounds 5] [--table FILE]

Random checkpoints of two real shapes (benchmarks/peers/build.py) are turned into each engine's own int4 form once, in
DIR; edgekit's are exported anew at every start. Each measurement (benchmarks/peers/measure.py) is one process with a
process session of its own; engines take turns, and the turn begins one engine further each round. A figure is
the median over rounds of what one process measured, its spread beside it.

An engine is run by DIR/venv-NAME/bin/python (NAME: ortgenai, llama, openvino) or by what --python NAME=FILE says. One
that is not there, cannot be built or fails is named and left out.

- llama.cpp's AMX kernels need a compiler whose `_tile_loadconfig` reads all 64 bytes. GCC 12.2's tells the optimizer
  of 8, and a build by it ends in SIGSEGV on a processor that has AMX; Clang and newer GCCs are right.
- Peak memory counts weights that are mapped from a file, anonymous memory (after decoding) what the system cannot drop.
- Loading counts the tokenizer; edgekit alone also makes text of what it decodes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any, TypeVar

from harness import device, record, summary
from tokenizers import Tokenizer

T = TypeVar("T")
HERE = Path(__file__).parent / "peers"
PROMPT, TOKENS, PREFILL = 64, 128, 512
PREFILLS, DECODES = 4, 2  # in one process
RUN_SECONDS = 300
Command = list[Path | str]


@dataclass(frozen=True)
class Peer:
    """One engine with one form of the weights.

    Attributes:
        name: what the table calls the engine.
        engine: its key in `peers/measure.py`; up to a hyphen, its key in NEEDS.
        weights: what the table calls the form.
        build: its key in `peers/build.py`, or a precision of edgekit.
    """

    name: str
    engine: str
    weights: str
    build: str

    @property
    def home(self) -> str:
        """The environment it runs in."""
        return self.engine.partition("-")[0]


PEERS = (
    Peer("ONNX Runtime GenAI", "ortgenai", "int4 b32, its default", "ortgenai-b32"),
    Peer("ONNX Runtime GenAI", "ortgenai", "int4 b128, gate/up fused, head pruned", "ortgenai-b128"),
    Peer("llama.cpp", "llama", "Q4_0 --pure", "llama-q4_0-pure"),
    Peer("llama.cpp", "llama", "Q4_0", "llama-q4_0"),
    Peer("OpenVINO GenAI", "openvino-SDPA", "int4 g64, int8 head; SDPA", "openvino-g64"),
    Peer("OpenVINO GenAI", "openvino-PA", "int4 g64, int8 head; paged, its default", "openvino-g64"),
)
NEEDS = {
    "edgekit": ("edgekit", "edgekit[cpu]"),
    "ortgenai": ("onnxruntime_genai", "onnxruntime-genai onnx onnx-ir torch transformers"),
    "llama": ("llama_cpp", "llama-cpp-python gguf, with CMAKE_ARGS=-DGGML_NATIVE=ON"),
    "openvino": ("openvino_genai", "openvino-genai optimum-intel nncf torch, torchvision of the same build or none"),
}


class LeftOut(Exception):
    """An engine cannot be measured; the text says why and what to do."""


class Workshop:
    """The folder with checkpoints, models, prompts and logs, and the Python of each engine."""

    def __init__(self, folder: Path, pythons: dict[str, Path]) -> None:
        self.folder = folder
        self._pythons = {"edgekit": Path(sys.executable), **pythons}
        self._checked: dict[str, Path] = {}
        (folder / "logs").mkdir(parents=True, exist_ok=True)

    def python(self, home: str) -> Path:
        """The interpreter that imports an engine, asked once. Raises LeftOut."""
        if home in self._checked:
            return self._checked[home]
        python = self._pythons.get(home, self.folder / f"venv-{home}" / "bin" / "python")
        module, packages = NEEDS[home]
        advice = f"Make an environment with {packages}, or give --python {home}=FILE."
        if not python.is_file():
            raise LeftOut(f"there is no {python}. {advice}")
        if subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode:
            raise LeftOut(f"{python} does not import {module}. {advice}")
        self._checked[home] = python
        return python

    def checkpoint(self, model: str) -> Path:
        """The checkpoint, made when first asked for. Raises LeftOut."""
        command: Command = [sys.executable, HERE / "build.py", "checkpoint", model]
        return self._built(self.folder / "hf" / model, command, f"checkpoint-{model}")

    def model(self, peer: Peer, model: str) -> Path:
        """A peer's form of a checkpoint, made when first asked for; edgekit's every time. Raises LeftOut."""
        python, source, name = self.python(peer.home), self.checkpoint(model), f"{peer.build}-{model}"
        target = self.folder / peer.home / name
        command: Command = [python, HERE / "build.py", peer.build, source]
        if peer.home == "edgekit":
            shutil.rmtree(target, ignore_errors=True)
            command = [python, "-m", "edgekit.cli", "export", source, "--precision", peer.build, "--output"]
        return self._built(target, command, f"{peer.home}-{name}")

    def _built(self, target: Path, command: Command, name: str) -> Path:
        """`target`, by `command target` where it is not there; a half-made one never gets its name."""
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            making = target.with_name(f"making-{target.name}")
            shutil.rmtree(making, ignore_errors=True)
            print(f"making {target}", file=sys.stderr)
            self._call([*command, making], f"build-{name}")
            making.rename(target)
        return target

    def measure(self, peer: Peer, model: str, path: Path, prompts: Path, threads: int) -> dict[str, Any]:
        """What one process measured. Raises LeftOut."""
        options = ["--threads", str(threads), "--tokens", str(TOKENS)]
        command: Command = [self.python(peer.home), HERE / "measure.py", peer.engine, path, prompts, *options]
        answer = self._call(command, f"run-{peer.engine}-{peer.build}-{model}", RUN_SECONDS)
        measured: dict[str, Any] = json.loads(answer)
        return measured

    def _call(self, command: Command, name: str, seconds: int | None = None) -> str:
        """Run in a process session of its own, everything it says in a log; its last line. Raises LeftOut."""
        log = self.folder / "logs" / f"{name}.log"
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, start_new_session=True)
        except subprocess.TimeoutExpired as why:
            raise LeftOut(f"it took more than {seconds} seconds") from why
        log.write_text(f"{done.stdout}\n{done.stderr}")
        if done.returncode:
            code = done.returncode
            end = f"exit code {code}" if code > 0 else Signals(-code).name
            raise LeftOut(f"{end}, {(done.stderr.strip() or '-').splitlines()[-1]}; see {log}")
        return done.stdout.strip().rpartition("\n")[2]

    def prompts(self, model: str) -> Path:
        """Prompts that begin differently, so that no engine finds one in its cache of prefixes."""
        engine = Tokenizer.from_file(str(self.checkpoint(model) / "tokenizer.json"))
        source = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text()
        prefills = cut(engine, source, PREFILL, PREFILLS + 1)
        found = {"warmup": prefills[0], "prefill": prefills[1:], "decode": cut(engine, source, PROMPT, DECODES)}
        path = self.folder / f"prompts-{model}.json"
        path.write_text(json.dumps(found))
        return path


def cut(engine: Tokenizer, source: str, length: int, count: int) -> list[dict[str, Any]]:
    """`count` texts of exactly `length` tokens each, from `source`, no two with the same first token."""
    found: dict[int, dict[str, Any]] = {}
    for start in range(0, len(source), 97):
        rest = engine.encode(source[start : start + 16 * length])
        text = source[start : start + rest.offsets[length - 1][1]]
        ids = engine.encode(text).ids
        if len(ids) == length:
            found.setdefault(ids[0], {"text": text, "ids": ids})
        if len(found) == count:
            break
    return list(found.values())


def size_megabytes(path: Path) -> float:
    """Bytes on disk of a model, tokenizers not counted (GGUF holds its own: 1 MB)."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    weights = [file for file in files if "tokenizer" not in str(file.relative_to(path.parent))]
    return sum(file.stat().st_size for file in weights) / 1e6


def measure_all(
    workshop: Workshop, peers: Sequence[Peer], models: Sequence[str], rounds: int, threads: int
) -> dict[tuple[str, Peer], tuple[Path, list[dict[str, Any]]]]:
    """Every peer on every model, in turns: its model and what each round measured."""
    runs: dict[tuple[str, Peer], tuple[Path, list[dict[str, Any]]]] = {}
    for model in models:
        for peer in peers:
            try:
                runs[model, peer] = workshop.model(peer, model), []
            except LeftOut as why:
                leave_out(model, peer, why)
    prompts = {model: workshop.prompts(model) for model in dict.fromkeys(model for model, _ in runs)}
    for turn in range(rounds):
        for model, peer in rotated(list(runs), turn):
            path, measured = runs[model, peer]
            try:
                measured.append(workshop.measure(peer, model, path, prompts[model], threads))
            except LeftOut as why:
                leave_out(model, peer, why)
                del runs[model, peer]
        print(f"round {turn + 1} of {rounds} done", file=sys.stderr)
    return runs


def rotated(items: list[T], by: int) -> list[T]:
    """The same, beginning at the item number `by`, counted round and round."""
    at = by % max(1, len(items))
    return items[at:] + items[:at]


def leave_out(model: str, peer: Peer, why: LeftOut) -> None:
    print(f"{model}: {peer.name} {peer.weights} is left out: {why}", file=sys.stderr)


def row(model: str, peer: Peer, path: Path, runs: Sequence[dict[str, Any]], threads: int) -> dict[str, Any]:
    """Medians over rounds, with their spread, of one peer on one model."""
    found: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        decode = summary([1e3 * seconds for seconds in run["decode_s"]])
        found["decode_ms"].append(decode["median"])
        found["decode_p10_ms"].append(decode["p10"])
        rates = summary([PREFILL / seconds for seconds in run["prefill_s"]])
        found["prefill_tokens_per_s"].append(rates["median"])
        found["prefill_best_tokens_per_s"].append(max(PREFILL / seconds for seconds in run["prefill_s"]))
        for name in ("load_s", "import_s", *(name for name in run if name.endswith("_mb"))):
            found[name].append(run[name])
    return {
        "model": model,
        "engine": peer.name,
        "weights": peer.weights,
        "version": runs[0]["version"],
        "threads": threads,
        "priority": all(run["priority"] for run in runs),
        "prompt_tokens": PROMPT,
        "new_tokens": TOKENS,
        "decodes_per_round": DECODES,
        "prefill_tokens": PREFILL,
        "prefills_per_round": PREFILLS,
        "size_mb": round(size_megabytes(path), 1),
        **{name: summary(values) for name, values in found.items()},
    }


COLUMNS = (
    "engine",
    "weights",
    "MB",
    "decode, ms/token",
    "its p10",
    "tokens/s",
    "prefill, tokens/s",
    "its best",
    "peak MB",
    "anonymous MB",
    "load, s",
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, one table per model, fastest decoding first."""
    threads, rounds = rows[0]["threads"], rows[0]["decode_ms"]["n"]
    lines = [f"{device()['cpu']}, {threads} threads; medians of {rounds} rounds (10th to 90th percentile of rounds)."]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        lines += ["", f"### {model}", "", f"| {' | '.join(COLUMNS)} |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
        lines += [line(row) for row in sorted(mine, key=lambda row: float(row["decode_ms"]["median"]))]
    lines += ["", *dict.fromkeys(f"- {row['engine']}: {row['version']}" for row in rows)]
    return "\n".join(lines) + "\n"


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    decode, best = row["decode_ms"], row["decode_p10_ms"]
    prefill, quickest = row["prefill_tokens_per_s"], row["prefill_best_tokens_per_s"]
    cells = [
        row["engine"],
        row["weights"],
        f"{row['size_mb']:.0f}",
        f"{decode['median']:.2f} ({decode['p10']:.2f} to {decode['p90']:.2f})",
        f"{best['median']:.2f}",
        f"{1e3 / decode['median']:.0f}",
        f"{prefill['median']:.0f} ({prefill['p10']:.0f} to {prefill['p90']:.0f})",
        f"{quickest['median']:.0f}",
        f"{row['rss_mb']['median']:.0f}",
        f"{row['anon_mb']['median']:.0f}",
        f"{row['load_s']['median']:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of models and environments")
    parser.add_argument("--models", default="qwen,smol")
    parser.add_argument("--engines", default=",".join(NEEDS), help="of %(default)s")
    parser.add_argument("--precision", default="int4", help="of edgekit; several with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=FILE")
    parser.add_argument("--table", type=Path, help="write the Markdown table here too")
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    pythons = {engine: Path(file) for engine, _, file in (text.partition("=") for text in options.python)}
    workshop = Workshop(Path(os.path.abspath(options.work)), pythons)
    ours = [Peer("edgekit", "edgekit", precision, precision) for precision in options.precision.split(",")]
    peers = [peer for peer in (*ours, *PEERS) if peer.home in options.engines.split(",")]
    runs = measure_all(workshop, peers, options.models.split(","), options.rounds, options.threads)
    rows = [row(model, peer, path, found, options.threads) for (model, peer), (path, found) in runs.items()]
    if not rows:
        raise SystemExit("nothing was measured; the lines above say why")
    if not options.dry_run:
        record("peers_text", rows)
    text = table(rows)
    print(text)
    if options.table:
        options.table.write_text(text)


if __name__ == "__main__":
    main()
