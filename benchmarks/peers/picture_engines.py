"""One engine, one model, one process: a picture drawn in one step, its parts timed; a line of JSON on stdout.

    python picture_engines.py ENGINE MODEL HOST.npz [--draws 2] [--threads 2] [--save FILE.npz]

MODEL is a bundle, a pipeline's folder or a folder of plain graphs; HOST.npz is what peers/picture_models.py wrote.
Needs nothing but the engine and numpy. Every engine keeps its defaults, except that OpenVINO is told the precision (its
own choice on this kind of processor is bf16) and the shapes, and is given the plain graphs, as ONNX Runtime is.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from measure import memory, package_versions, raise_priority, timed

Array = npt.NDArray[Any]
Host = dict[str, Array]
PROMPT = "photo of an old house"  # of which host.npz has the ids
GUIDANCE = {
    "LatentConsistencyModelPipeline": 8.5,
    "StableDiffusionPipeline": 0.0,
    "StableDiffusionXLPipeline": 0.0,
    "PixArtAlphaPipeline": 1.0,
}


class Clock:
    """Seconds by what was done, of one drawing at a time."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


Draw = Callable[[Clock], tuple[Array, Array]]  # -> latents (1, c, h, w), picture (height, width, 3) of 0 to 255
Run = Callable[[str, Host], list[Array]]


def open_edgekit(path: str, host: Host, threads: int) -> Draw:
    """The public interface; the parts' seconds are those of its own statistics."""
    edgekit = import_module("edgekit")
    model = edgekit.load(path, threads=threads)

    def draw(clock: Clock) -> tuple[Array, Array]:
        result = model.generate(PROMPT, steps=1, width=512, height=512, latents=host["latents"])
        for part, seconds in result.stats.parts.items():
            role = "text" if part.startswith("text") else "decode" if part.startswith("vae") else "step"
            clock.seconds[role] += seconds
        return result.latents, np.asarray(result.images[0])

    return draw


def open_diffusers(path: str, host: Host, threads: int) -> Draw:
    """The pipeline in float32, its networks' calls timed."""
    torch, diffusers = import_module("torch"), import_module("diffusers")
    torch.set_num_threads(threads)
    diffusers.utils.logging.set_verbosity_error()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(path, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    scale = pipeline.vae.config.scaling_factor
    latents = torch.from_numpy(host["latents"])
    guidance = GUIDANCE[type(pipeline).__name__]
    sizes = {"use_resolution_binning": False} if hasattr(pipeline, "transformer") else {}
    now: dict[str, Any] = {}

    def watch(owner: Any, method: str, role: str) -> None:
        inner = getattr(owner, method)

        @functools.wraps(inner)
        def wrapped(*args: Any, **given: Any) -> Any:
            if role == "decode":
                now["latents"] = args[0] * scale
            with now["clock"].of(role):
                return inner(*args, **given)

        setattr(owner, method, wrapped)

    watch(getattr(pipeline, "transformer", None) or pipeline.unet, "forward", "step")
    watch(pipeline.vae, "decode", "decode")
    for name in ("text_encoder", "text_encoder_2"):
        if getattr(pipeline, name, None) is not None:
            watch(getattr(pipeline, name), "forward", "text")

    def draw(clock: Clock) -> tuple[Array, Array]:
        now["clock"] = clock
        with torch.inference_mode():
            out = pipeline(
                PROMPT,
                num_inference_steps=1,
                guidance_scale=guidance,
                latents=latents.clone(),
                width=512,
                height=512,
                **sizes,
            )
        return now["latents"].numpy(), np.asarray(out.images[0])

    return draw


def open_ort(path: str, host: Host, threads: int) -> Draw:
    """The plain graphs, with nothing set but the thread count."""
    ort = import_module("onnxruntime")
    ort.set_default_logger_severity(3)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    sessions = {
        graph.stem: ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        for graph in sorted(Path(path).glob("*.onnx"))
    }
    return plain_draw(lambda name, feeds: sessions[name].run(None, feeds), host, set(sessions))


def open_openvino(path: str, host: Host, threads: int, precision: str) -> Draw:
    """The plain graphs, reshaped to what is fed; compiled for latency."""
    openvino = import_module("openvino")
    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
    }
    graphs = {graph.stem: graph for graph in sorted(Path(path).glob("*.onnx"))}
    requests: dict[str, Any] = {}

    def run(name: str, feeds: Host) -> list[Array]:
        if name not in requests:  # in the first drawing, which is not timed: what is fed gives the shapes
            model = core.read_model(graphs[name])
            model.reshape({key: list(value.shape) for key, value in feeds.items()})
            requests[name] = core.compile_model(model, "CPU", settings).create_infer_request()
        answer = requests[name].infer(feeds)
        return [np.array(value) for value in answer.values()]

    return plain_draw(run, host, set(graphs))


def plain_draw(run: Run, host: Host, graphs: set[str]) -> Draw:
    """One step around graphs that are called by name, as `host` of peers/picture_models.py says."""
    start, scale, keep, add = (float(value) for value in host["linear"])
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in graphs]
    more = ("timestep", "timestep_cond", "time_ids", "encoder_attention_mask")

    def draw(clock: Clock) -> tuple[Array, Array]:
        with clock.of("text"):
            texts = [
                run(name, {k[len(name) + 1 :]: v for k, v in host.items() if k.startswith(f"{name}.")})
                for name in encoders
            ]
        feeds = {name: host[name] for name in more if name in host}
        feeds["encoder_hidden_states"] = np.concatenate([text[0] for text in texts], -1)
        if len(texts[-1]) > 1:
            feeds["text_embeds"] = texts[-1][1]
        x = host["latents"] * np.float32(start)
        with clock.of("step"):
            noise = run("denoiser", {"sample": x * np.float32(scale), **feeds})[0]
        x = np.float32(keep) * x + np.float32(add) * noise
        with clock.of("decode"):
            drawn = run("vae_decoder", {"latent_sample": x / np.float32(host["decode"])})[0]
        return x, np.rint(255 * np.clip(drawn[0] / 2 + 0.5, 0, 1)).astype(np.uint8).transpose(1, 2, 0)

    return draw


# engine -> its modules, imported before the clock of loading starts; how to open a model; packages it depends on
ENGINES: dict[str, tuple[tuple[str, ...], Callable[[str, Host, int], Draw], tuple[str, ...]]] = {
    "edgekit": (("edgekit.runtime.diffusion.pipeline", "onnxruntime"), open_edgekit, ("edgekit", "onnxruntime")),
    "diffusers": (("torch", "diffusers", "transformers"), open_diffusers, ("diffusers", "torch")),
    "ort": (("onnxruntime",), open_ort, ("onnxruntime",)),
    "openvino-f32": (("openvino",), partial(open_openvino, precision="f32"), ("openvino",)),
    "openvino-bf16": (("openvino",), partial(open_openvino, precision="bf16"), ("openvino",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("host", type=Path)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    first = raise_priority()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    host = dict(np.load(options.host))
    modules, open_model, packages = ENGINES[options.engine]
    import_seconds = timed(lambda: [import_module(name) for name in modules])
    start = time.perf_counter()
    draw = open_model(options.model, host, options.threads)
    latents, picture = draw(Clock())
    first_seconds = time.perf_counter() - start
    draw(Clock())  # ONNX Runtime lays its memory out anew once it has seen a run
    rows: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(options.draws):
        clock = Clock()
        rows["picture"].append(timed(lambda clock=clock: draw(clock)))
        for name, seconds in clock.seconds.items():
            rows[name].append(seconds)
    if options.save:
        np.savez(options.save, latents=latents, picture=picture)
    measured = {"seconds": rows, "import_s": import_seconds, "first_picture_s": first_seconds, "priority": first}
    print(json.dumps({"version": package_versions(*packages), **measured, **memory()}), flush=True)


if __name__ == "__main__":
    main()
