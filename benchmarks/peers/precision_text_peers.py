"""Quantized language models of another tool: made where they are not there, then their logits on given tokens.

    python precision_text_peers.py TEXTS.npz JOBS.json

TEXTS has `held` and `calibration`, ids (texts, tokens). A job is {"kind", "source", "target", "logits", "options"}. Its
kind is `genai`, which makes `target` from a checkpoint; `openvino`, which converts a checkpoint to OpenVINO's float32;
or `nncf`, which compresses that. `logits` becomes a file of float32 (texts, tokens, vocabulary), of `held`. Every job
answers with a line on stdout, MARK and JSON: bytes of all stored weights, and versions; or the error.

Runs in the tool's own environment and needs nothing of edgekit.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Options = dict[str, Any]

MARK = "answer: "
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
NOT_WEIGHTS = ("cos_cache", "sin_cache")
ENUMS = {"mode": "CompressWeightsMode", "sensitivity_metric": "SensitivityMetric", "backup_mode": "BackupMode"}
VERSIONS = {
    "genai": ("onnxruntime-genai", "onnxruntime", "torch", "transformers"),
    "openvino": ("openvino", "optimum-intel", "transformers"),
    "nncf": ("nncf", "openvino"),
}


def build_genai(source: Path, target: Path, options: Options, calibration: Ids) -> None:  # noqa: ARG001
    """ONNX Runtime GenAI's model builder, for the CPU; it has no calibration."""
    options = dict(options)
    flags = ["-i", str(source), "-o", str(target), "-p", options.pop("precision", "int4"), "-e", "cpu"]
    extra = [f"{name}={value}" for name, value in options.items()]
    more = ["--extra_options", *extra] if extra else []
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *flags, "-c", f"{target}.cache", *more]
    subprocess.run(command, check=True, stdout=sys.stderr)
    shutil.rmtree(f"{target}.cache", ignore_errors=True)


def build_openvino(source: Path, target: Path, options: Options, calibration: Ids) -> None:  # noqa: ARG001
    """optimum-intel's export, nothing compressed."""
    flags = ["-m", str(source), "--task", "text-generation-with-past", "--weight-format", "fp32", str(target)]
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", *flags]
    subprocess.run(command, check=True, stdout=sys.stderr)


def build_nncf(source: Path, target: Path, options: Options, calibration: Ids) -> None:
    """`nncf.compress_weights`; `"dataset": true` gives it the calibration texts."""
    nncf, openvino = import_module("nncf"), import_module("openvino")
    options = dict(options)
    if options.pop("dataset", False):
        options["dataset"] = nncf.Dataset([openvino_feeds(ids) for ids in calibration])
    for name, enum in ENUMS.items():
        if name in options:
            options[name] = getattr(getattr(nncf, enum), options[name])
    model = openvino.Core().read_model(source / "openvino_model.xml")
    model = nncf.compress_weights(model, **options)
    target.mkdir()
    openvino.save_model(model, target / "openvino_model.xml", compress_to_fp16=False)


def logits_genai(path: Path, texts: Ids) -> Iterator[npt.NDArray[np.float32]]:
    """Every text as one prompt of a generator: its own sessions, buffers and masks."""
    genai = import_module("onnxruntime_genai")
    model = genai.Model(str(path))
    for ids in texts:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(ids) + 1)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(ids.astype(np.int32))
        yield np.asarray(generator.get_output("logits"), np.float32)[0]


def logits_openvino(path: Path, texts: Ids) -> Iterator[npt.NDArray[np.float32]]:
    """In float32 with an unquantized cache, so that weights alone differ: the most favourable reading."""
    core = import_module("openvino").Core()
    request = core.compile_model(core.read_model(path / "openvino_model.xml"), "CPU", EXACT).create_infer_request()
    for ids in texts:
        request.reset_state()
        yield np.array(request.infer(openvino_feeds(ids))["logits"][0], np.float32)


def openvino_feeds(ids: Ids) -> dict[str, npt.NDArray[Any]]:
    return {
        "input_ids": ids[None],
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "position_ids": np.arange(len(ids), dtype=np.int64)[None],
        "beam_idx": np.zeros(1, np.int32),
    }


def bytes_genai(path: Path) -> int:
    """All initializers, tables of the rotation left out."""
    graph = import_module("onnx_ir").load(path / "model.onnx").graph
    return sum(v.const_value.nbytes for name, v in graph.initializers.items() if name not in NOT_WEIGHTS)


def bytes_openvino(path: Path) -> int:
    """All constants, as they are packed in the file."""
    model = import_module("openvino").Core().read_model(path / "openvino_model.xml")
    return sum(op.get_byte_size() for op in model.get_ordered_ops() if op.get_type_name() == "Constant")


KINDS = {
    "genai": (build_genai, bytes_genai, logits_genai),
    "openvino": (build_openvino, bytes_openvino, logits_openvino),
    "nncf": (build_nncf, bytes_openvino, logits_openvino),
}


def answer(job: dict[str, Any], given: Any) -> dict[str, Any]:
    """One job."""
    build, nbytes, run = KINDS[job["kind"]]
    source, target = Path(job["source"]), Path(job["target"])
    if not target.exists():
        making = target.with_name(f"making-{target.name}")
        shutil.rmtree(making, ignore_errors=True)
        build(source, making, job["options"], given["calibration"])
        making.rename(target)
    np.save(job["logits"], np.stack(list(run(target, given["held"]))))
    return {"bytes": nbytes(target), "versions": {name: version(name) for name in VERSIONS[job["kind"]]}}


def main() -> None:
    given = np.load(sys.argv[1])
    for job in json.loads(Path(sys.argv[2]).read_text()):
        try:
            found = answer(job, given)
        except Exception as why:  # noqa: BLE001  (any tool's: the next job may do)
            found = {"error": f"{type(why).__name__}: {why}"}
        print(MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
