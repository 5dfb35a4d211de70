"""What quantization does to a language model, at how many bits: edgekit's bundles beside ONNX Runtime GenAI and NNCF.

    python benchmarks/precision_text.py --work DIR [--bundle BUNDLE]... [--uniform int8,int4] [--peers genai,nncf]
                                        [--only WORDS] [--model DIR] [--table FILE]

Every form of one checkpoint is asked for its logits on the same tokens, and they are compared with those of its float32
export by edgekit. A row has the mean KL(float32 || quantized) in nats, the value that one token in a hundred exceeds,
how often the most likely token is the same, and bits per weight: bytes of all stored weights with scales, zero points,
norms, embedding and head, over the checkpoint's number of parameters (what is tied counts once).

- Held-out text: two files of CPython 3.11.7's library that `models/pycode` was not trained on, by their sha256.
- Calibration text, for the tools that want some: other files of the same library.
- edgekit and GenAI run as they ship: both round activations to int8 in blocks. OpenVINO, which runs what NNCF makes,
  is asked for float32 activations and cache, so that the weights alone count.

Each tool lives in DIR/venv-NAME, made by pip when it is not there. Models made once are kept in DIR.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from harness import record

from edgekit.bundle.store import read_bundle
from edgekit.quant.metrics import kl_tokens
from edgekit.quant.texts import TextWorkload
from edgekit.runtime.tokenizer import Tokenizer

Ids = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

MARK = "answer: "  # before a line of the worker's
WORKER = Path(__file__).parent / "peers" / "precision_text_peers.py"
MODEL = Path(__file__).parent.parent / "models" / "pycode"
TEXTS, LENGTH = 32, 256
HELD = {
    "_pyio.py": "f22f010af7d96fa7",
    "zipfile.py": "2de79ca464499be9",
}
CALIBRATION = (
    "argparse.py",
    "asyncio/base_events.py",
    "dataclasses.py",
    "json/decoder.py",
    "subprocess.py",
    "tarfile.py",
    "typing.py",
)
UNIFORM = ("int8", "int8-128", "int8-row", "int4", "int4-128")
PACKAGES = {
    "genai": ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "torch==2.13.0", "transformers", "onnx", "onnx-ir"),
    "nncf": ("nncf==3.4.0", "openvino==2026.4.1", "torch==2.13.0", "optimum-intel", "transformers"),
}


@dataclass(frozen=True)
class Peer:
    """One way of one tool to make the model small; `kind` is what peers/precision_text_peers.py calls it."""

    kind: str
    weights: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Where its model is kept: a name of its own for every set of options."""
        digest = hashlib.sha256(json.dumps(self.options, sort_keys=True).encode()).hexdigest()
        return f"{self.kind}-{digest[:12]}"


def genai() -> Iterator[Peer]:
    yield Peer("genai", "fp32", {"precision": "fp32"})
    mixed = {"algo_config": "rtn", "matmul_mixed_precision": "last_matmul:int8,mixed_layers:int8"}
    for block in (32, 64):  # its k_quant cannot pack the odd number of blocks that 128 makes of a width of 384
        for algorithm in ("default", "rtn_last", "k_quant", "k_quant_last", "k_quant_mixed"):
            yield Peer("genai", f"{algorithm} b{block}", {"algo_config": algorithm, "block_size": block})
        yield Peer("genai", f"rtn, last and mixed int8 b{block}", {**mixed, "block_size": block})
    yield Peer("genai", "default b128", {"algo_config": "default", "block_size": 128})
    yield Peer("genai", "int8 b32", {"precision": "int8", "block_size": 32})


DATA_FREE = ("WEIGHT_QUANTIZATION_ERROR",)
MIXES = (*DATA_FREE, "HESSIAN_INPUT_ACTIVATION", "MEAN_ACTIVATION_MAGNITUDE")


def nncf() -> Iterator[Peer]:
    yield Peer("openvino", "fp32")
    yield Peer("nncf", "INT8_SYM", {"mode": "INT8_SYM"})
    for mode, group in (("INT4_SYM", 64), ("INT4_ASYM", 32)):
        base = {"mode": mode, "group_size": group}
        yield Peer("nncf", f"{mode} g{group}, all layers", {**base, "all_layers": True})
        yield Peer("nncf", f"{mode} g{group}", {**base, "ratio": 1.0})
        for ratio in (0.9, 0.8, 0.7, 0.6, 0.5):
            for metric in MIXES:
                options: dict[str, Any] = {**base, "ratio": ratio, "sensitivity_metric": metric}
                if metric not in DATA_FREE:
                    options["dataset"] = True
                yield Peer("nncf", f"{mode} g{group}, ratio {ratio:g}, {metric.lower()}", options)
    data = {"mode": "INT4_ASYM", "group_size": 32, "dataset": True}
    for metric, ratios in ((MIXES[1], (1.0, 0.8, 0.6)), (MIXES[0], (0.9, 0.8, 0.6))):
        for ratio in ratios:
            for extra in ("scale_estimation", "gptq"):
                options = {**data, "sensitivity_metric": metric, "ratio": ratio, extra: True}
                yield Peer("nncf", f"INT4_ASYM g32, ratio {ratio:g}, {metric.lower()}, {extra}", options)
    options = {**data, "all_layers": True, "gptq": True}
    yield Peer("nncf", "INT4_ASYM g32, all layers, gptq", options)
    options = {**data, "mode": "INT4_SYM", "group_size": 64, "ratio": 1.0, "gptq": True}
    yield Peer("nncf", "INT4_SYM g64, gptq", options)


PEERS = {"genai": genai, "nncf": nncf}


class Failed(Exception):
    """A tool cannot be measured; the text says why."""


class Workshop:
    """The folder with environments, models and texts.

    Attributes:
        held, calibration: ids (texts, tokens).
        reference: float32 logits (texts, tokens, vocabulary) of the float32 export.
        parameters: of the checkpoint.
    """

    def __init__(self, folder: Path, model: Path, only: str = "") -> None:
        self.folder, self._model, self._only = folder, model, only
        (folder / "models").mkdir(parents=True, exist_ok=True)
        tokenizer = Tokenizer.from_file(model / "tokenizer.json")
        self.held, self.calibration = pieces(tokenizer, held_text()), pieces(tokenizer, library(CALIBRATION))
        self._texts = folder / "texts.npz"
        (folder / "calibration.txt").write_text(library(CALIBRATION), "utf-8")  # what edgekit's plans may read too
        np.savez(self._texts, held=self.held, calibration=self.calibration)
        self.parameters = parameters(model / "model.safetensors")
        self.reference = self._run(self.export("fp32"))

    def export(self, precision: str) -> Path:
        """A bundle of the checkpoint by edgekit as it is now."""
        target = self.folder / "models" / f"edgekit-{precision}"
        shutil.rmtree(target, ignore_errors=True)
        options = ["--precision", precision, "--output", str(target)]
        command = [sys.executable, "-m", "edgekit.cli", "export", str(self._model), *options]
        subprocess.run(command, check=True, capture_output=True)
        return target

    def bundle(self, path: Path) -> dict[str, Any]:
        """The figures of a bundle of edgekit."""
        return {"bits": self._bits(bundle_bytes(path)), **compare(self.reference, self._run(path))}

    def peers(self, home: str) -> Iterator[tuple[Peer, dict[str, Any]]]:
        """The figures of every form of one tool, from one process of its environment. Raises Failed."""
        listed = [peer for peer in PEERS[home]() if self._only in peer.weights]
        jobs = self.folder / f"jobs-{home}.json"
        jobs.write_text(json.dumps([self._job(peer) for peer in listed]))
        command = [self._python(home), WORKER, self._texts, jobs]
        with (self.folder / f"log-{home}.txt").open("w") as log:
            worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        assert worker.stdout is not None
        answers = (json.loads(line.removeprefix(MARK)) for line in worker.stdout if line.startswith(MARK))
        for peer, answer in zip(listed, answers, strict=False):
            if "error" in answer:
                print(f"{home}, {peer.weights}, is left out: {answer['error']}", file=sys.stderr)
                continue
            logits = Path(self._job(peer)["logits"])
            figures = compare(self.reference, np.load(logits))
            logits.unlink()
            yield peer, {"bits": self._bits(answer["bytes"]), **figures, "peer_versions": answer["versions"]}
        if worker.wait():
            raise Failed(f"{home}'s process ended with {worker.returncode}; see {log.name}")

    def _job(self, peer: Peer) -> dict[str, Any]:
        models = self.folder / "models"
        source = models / next(nncf()).folder if peer.kind == "nncf" else self._model
        paths = {"source": source, "target": models / peer.folder, "logits": self.folder / f"{peer.folder}.npy"}
        return {"kind": peer.kind, "options": peer.options, **{name: str(path) for name, path in paths.items()}}

    def _run(self, path: Path) -> F32:
        requests = [tuple(map(int, ids)) for ids in self.held]
        workload = TextWorkload(read_bundle(path), requests, rows=LENGTH)
        return np.stack(workload.run({}))

    def _bits(self, nbytes: int) -> float:
        return round(8 * nbytes / self.parameters, 4)

    def _python(self, home: str) -> Path:
        """The environment's interpreter, made with what it needs where it is not there. Raises Failed."""
        root = self.folder / f"venv-{home}"
        python = root / "bin" / "python"
        if not python.exists():
            print(f"making {root}", file=sys.stderr)
            venv.create(root, with_pip=True)
            done = subprocess.run(
                [python, "-m", "pip", "install", "-q", *PACKAGES[home]], capture_output=True, text=True
            )
            if done.returncode:
                shutil.rmtree(root)
                raise Failed(f"pip: {done.stderr.strip()}")
        return python


def held_text() -> str:
    """The held-out files; they must be those that were held out."""
    text = library(tuple(HELD))
    for name, digest in HELD.items():
        if hashlib.sha256(library((name,)).encode()).hexdigest()[:16] != digest:
            raise SystemExit(f"{name} is not that of CPython 3.11.7, which was held out: run with that interpreter")
    return text


def library(names: Sequence[str]) -> str:
    root = Path(sysconfig.get_path("stdlib"))
    return "".join((root / name).read_text("utf-8") for name in names)


def pieces(tokenizer: Tokenizer, text: str) -> Ids:
    """TEXTS runs of LENGTH tokens, from evenly spread places."""
    ids = np.array(tokenizer.encode(text), np.int64)
    starts = np.linspace(0, len(ids) - LENGTH, TEXTS).astype(np.int64)
    return np.stack([ids[start : start + LENGTH] for start in starts])


def parameters(file: Path) -> int:
    """Numbers in a safetensors file."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def bundle_bytes(path: Path) -> int:
    """Weights of a language bundle as stored, each place in a file once; tables of the rotation left out."""
    bundle = read_bundle(path)
    found: dict[Any, int] = {}
    for part in bundle.manifest.parts:
        for name, value in ir.load(bundle.graph(part)).graph.initializers.items():
            tensor = value.const_value
            if tensor is None or name.startswith("rope."):
                continue
            place = (tensor.location, tensor.offset) if isinstance(tensor, ir.ExternalTensor) else name
            found[part, place] = tensor.nbytes
    return sum(found.values())


def compare(reference: F32, logits: F32) -> dict[str, float]:
    """The figures of logits (texts, tokens, vocabulary); `kl_sem` is the standard error over texts."""
    if logits.shape != reference.shape:
        raise Failed(f"logits of shape {logits.shape}, not {reference.shape}")
    kl: F64 = np.stack([kl_tokens(one, other) for one, other in zip(reference, logits, strict=True)])
    return {
        "kl_mean": float(f"{kl.mean():.4g}"),
        "kl_sem": float(f"{kl.mean(1).std(ddof=1) / math.sqrt(len(kl)):.2g}"),
        "kl_q99": float(f"{np.quantile(kl, 0.99):.4g}"),
        "top1": round(float((reference.argmax(-1) == logits.argmax(-1)).mean()), 5),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, fewest bits first."""
    lines = ["| tool | weights | bits per weight | KL mean | KL q99 | top-1 |", "|---|---|---:|---:|---:|---:|"]
    lines += [
        f"| {row['tool']} | {row['weights']} | {row['bits']:.3f} | {row['kl_mean']:.5f} | {row['kl_q99']:.4f} "
        f"| {100 * row['top1']:.2f} % |"
        for row in sorted(rows, key=lambda row: (row["bits"], row["kl_mean"]))
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--bundle", type=Path, action="append", default=[])
    parser.add_argument("--uniform", default=",".join(UNIFORM), help="precisions of edgekit's own exports")
    parser.add_argument("--peers", default=",".join(PEERS), help="empty for edgekit alone")
    parser.add_argument("--only", default="", help="peers whose name of the weights holds this")
    parser.add_argument("--table", type=Path)
    arguments = parser.parse_args()
    workshop = Workshop(arguments.work.resolve(), arguments.model.resolve(), arguments.only)
    shared = {"model": arguments.model.name, "texts": TEXTS, "tokens": LENGTH}
    rows: list[dict[str, Any]] = []

    def note(tool: str, weights: str, figures: dict[str, Any]) -> None:
        rows.append({**shared, "tool": tool, "weights": weights, **figures})
        record("precision_text", rows[-1:])

    for precision in filter(None, arguments.uniform.split(",")):
        note("edgekit", precision, workshop.bundle(workshop.export(precision)))
    for path in arguments.bundle:
        note("edgekit", path.name, workshop.bundle(path))
    for home in filter(None, arguments.peers.split(",")):
        try:
            for peer, figures in workshop.peers(home):
                note(home, peer.weights, figures)
        except Failed as why:
            print(f"{home}: {why}", file=sys.stderr)
    if arguments.table:
        arguments.table.write_text(table(rows))


if __name__ == "__main__":
    main()
