"""One engine, one model, one process: load, prefill and decode times and memory, as a line of JSON on stdout.

    python measure.py ENGINE MODEL PROMPTS.json [--threads 2] [--tokens 128]

Needs nothing but the engine itself, so that each runs in an environment of its own. Every engine is given the same
token ids, decodes greedily past end tokens and keeps its own defaults for the rest.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

Prompt = dict[str, Any]  # {"text": str, "ids": list of int}
CONTEXT = 1024


@dataclass(frozen=True)
class Opened:
    """A loaded model.

    Attributes:
        prefill: a prompt -> seconds until its first new token is there.
        decode: (a prompt, a count) -> seconds of each of so many tokens after the first.
        kept: what must live as long.
    """

    prefill: Callable[[Prompt], float]
    decode: Callable[[Prompt, int], list[float]]
    kept: object = None


def open_edgekit(path: str, threads: int) -> Opened:
    """The public interface: prefill from its statistics, decode from the gaps of a stream, text made on the way."""
    model = import_module("edgekit").load(path, task="text-generation", threads=threads)

    def prefill(prompt: Prompt) -> float:
        result = model.generate(prompt["text"], max_new_tokens=1, temperature=0.0)
        assert list(result.prompt_tokens) == prompt["ids"], "edgekit's tokenizer gives other ids"
        assert result.stats.reused_tokens == 0, result.stats
        return float(result.stats.prefill_seconds)

    def decode(prompt: Prompt, count: int) -> list[float]:
        gaps: list[float] = []
        chunks = model.stream(prompt["text"], max_new_tokens=count + 1, temperature=0.0)
        next(chunks)
        last = time.perf_counter()
        for chunk in chunks:
            now = time.perf_counter()
            gaps += [(now - last) / len(chunk.tokens) for _ in chunk.tokens]
            last = now
        assert chunk.stats.prefill_tokens == len(prompt["ids"]), chunk.stats
        return gaps

    return Opened(prefill, decode)


def open_ortgenai(path: str, threads: int) -> Opened:
    """ONNX Runtime GenAI: its generator, one call per token."""
    genai, numpy = import_module("onnxruntime_genai"), import_module("numpy")
    config = genai.Config(path)
    session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = genai.Model(config)
    words = genai.Tokenizer(model)  # never asked: it counts in load time and memory, as that of every engine does

    def begin(prompt: Prompt, count: int) -> Any:
        parameters = genai.GeneratorParams(model)
        length = len(prompt["ids"]) + count + 1
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        return genai.Generator(model, parameters)

    def first(generator: Any, prompt: Prompt) -> None:
        generator.append_tokens(numpy.array([prompt["ids"]], "int32"))
        generator.generate_next_token()

    def prefill(prompt: Prompt) -> float:
        generator = begin(prompt, 1)
        return timed(lambda: first(generator, prompt))

    def decode(prompt: Prompt, count: int) -> list[float]:
        generator = begin(prompt, count)
        first(generator, prompt)
        return [timed(generator.generate_next_token) for _ in range(count)]

    return Opened(prefill, decode, kept=words)


def open_llama(path: str, threads: int) -> Opened:
    """llama.cpp through the ctypes layer of llama-cpp-python: `llama_decode`, and numpy's argmax over its logits."""
    api, numpy = import_module("llama_cpp"), import_module("numpy")
    api.llama_backend_init()
    silence = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(silence, ctypes.c_void_p(0))
    model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
    options = api.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = CONTEXT, CONTEXT // 2, CONTEXT // 2
    options.n_threads = options.n_threads_batch = threads
    context = api.llama_init_from_model(model, options)
    memory = api.llama_get_memory(context)
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    batch = api.llama_batch_init(CONTEXT // 2, 0, 1)

    def step(past: int, ids: list[int]) -> int:
        batch.n_tokens = len(ids)
        for row, token in enumerate(ids):
            batch.token[row], batch.pos[row], batch.n_seq_id[row] = token, past + row, 1
            batch.seq_id[row][0], batch.logits[row] = 0, row == len(ids) - 1
        assert api.llama_decode(context, batch) == 0
        return int(numpy.ctypeslib.as_array(api.llama_get_logits(context), (vocabulary,)).argmax())

    def prefill(prompt: Prompt) -> float:
        api.llama_memory_seq_rm(memory, 0, 0, -1)
        return timed(lambda: step(0, prompt["ids"]))

    def decode(prompt: Prompt, count: int) -> list[float]:
        api.llama_memory_seq_rm(memory, 0, 0, -1)
        token, gaps = step(0, prompt["ids"]), []
        for past in range(len(prompt["ids"]), len(prompt["ids"]) + count):
            start = time.perf_counter()
            token = step(past, [token])
            gaps.append(time.perf_counter() - start)
        return gaps

    return Opened(prefill, decode, kept=silence)


def open_openvino(path: str, threads: int, attention: str) -> Opened:
    """OpenVINO GenAI's pipeline, with the given attention (SDPA, or PA: paged); its own token times."""
    genai, openvino, numpy = map(import_module, ("openvino_genai", "openvino", "numpy"))
    pipeline = genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads, ATTENTION_BACKEND=attention)

    def generate(prompt: Prompt, count: int) -> Any:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = count, True
        config.do_sample = config.apply_chat_template = False
        ids = numpy.array([prompt["ids"]])
        return pipeline.generate(genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(ids * 0 + 1)), config)

    def decode(prompt: Prompt, count: int) -> list[float]:
        times = generate(prompt, count + 1).perf_metrics.raw_metrics.m_new_token_times  # milliseconds
        return [float(gap) / 1e3 for gap in numpy.diff(times)]

    return Opened(lambda prompt: timed(lambda: generate(prompt, 1)), decode)


def llama_version() -> str:
    """llama-cpp-python's version and that of the ggml inside it, which alone says how fast it is."""
    folder = Path(str(import_module("llama_cpp").__file__)).parent / "lib"
    library = ctypes.CDLL(str(next(folder.glob("libggml-base.so*"))))
    library.ggml_version.restype = ctypes.c_char_p
    return f"llama-cpp-python {version('llama-cpp-python')}, ggml {library.ggml_version().decode()}"


def package_versions(*names: str) -> str:
    return ", ".join(f"{name} {version(name)}" for name in names)


# engine -> its modules, imported before the clock of loading starts; how to open a model; its version
ENGINES: dict[str, tuple[tuple[str, ...], Callable[[str, int], Opened], Callable[[], str]]] = {
    "edgekit": (
        ("edgekit.runtime.llm.pipeline", "onnxruntime"),
        open_edgekit,
        lambda: package_versions("edgekit", "onnxruntime"),
    ),
    "ortgenai": (
        ("onnxruntime_genai", "numpy"),
        open_ortgenai,
        lambda: package_versions("onnxruntime-genai", "onnxruntime"),
    ),
    "llama": (("llama_cpp", "numpy"), open_llama, llama_version),
    **{
        f"openvino-{attention}": (
            ("openvino_genai", "openvino", "numpy"),
            partial(open_openvino, attention=attention),
            lambda: package_versions("openvino-genai", "openvino"),
        )
        for attention in ("SDPA", "PA")
    },
}


def timed(call: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def raise_priority() -> bool:
    """Put this process's session before others that share the cores; whether the kernel let us.

    Where Linux schedules by session (autogroup), `nice` acts inside one session only. The caller starts us in our own.
    """
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text("-19")
        return True
    return False


def memory(when: str = "") -> dict[str, float]:
    """Megabytes: `rss_mb`, the peak of this process since it began (`ru_maxrss` would count its parent's too); and now

    `anon_mb`, which is its own, and `file_mb`, of files that it maps, weights among them, and the system can drop.
    """
    found = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text()))
    fields = {"rss_mb": "VmHWM", "anon_mb": "RssAnon", "file_mb": "RssFile"}
    return {when + name: int(found[field]) * 1024 / 1e6 for name, field in fields.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("prompts", type=Path, help='{"warmup": prompt, "prefill": [prompts], "decode": [prompts]}')
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    first = raise_priority()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    prompts = json.loads(options.prompts.read_text())
    modules, open_model, engine_version = ENGINES[options.engine]
    import_seconds = timed(lambda: [import_module(name) for name in modules])
    start = time.perf_counter()
    opened = open_model(options.model, options.threads)
    load_seconds = time.perf_counter() - start
    loaded = memory("loaded_")
    opened.prefill(prompts["warmup"])
    prefill = [opened.prefill(prompt) for prompt in prompts["prefill"]]
    decode = [gap for prompt in prompts["decode"] for gap in opened.decode(prompt, options.tokens)]
    if len(decode) < options.tokens * len(prompts["decode"]):
        raise SystemExit(f"{options.engine} stopped after {len(decode)} tokens, at an end token: change the checkpoint")
    row = {
        "version": engine_version(),
        "import_s": import_seconds,
        "load_s": load_seconds,
        "prefill_s": prefill,
        "decode_s": decode,
        "priority": first,
        **loaded,
        **memory(),
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
