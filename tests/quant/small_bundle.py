"""A few-step bundle of some 30 kB with everything that mixed precision looks for, and the measurements of it.

A text encoder whose first token is the same for every prompt and outweighs the others, a UNet with attention to it and
a raw skip concatenation, a decoder of two convolutions. Made of numpy, so a measurement takes seconds and no torch.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from edgekit.bundle.files import sha256_file
from edgekit.bundle.manifest import FORMAT, AxisRange, Manifest, Provenance, Tokenizer
from edgekit.bundle.recipe import Grid, Guidance, Recipe
from edgekit.bundle.store import new_bundle
from edgekit.runtime.diffusion.tables import compile_tables
from tests.bundle import tiny
from tests.quant.tiny_graphs import CHANNELS, WIDTH, Graph, tiny_unet
from tests.runtime.diffusion.fakes import WORDS, write_tokenizer

SIDE = 16  # of latents and pictures
PROMPTS = ("red apple", "green pear", "red pear", "green apple", "apple", "blurry pear", "red", "green green apple")


def text_encoder(seed: int = 0) -> onnx.ModelProto:
    """Words to rows, each row through a residual block of its own: that of `<s>` is constant, and 30 times larger."""
    make = Graph(seed)
    table = make.normal(len(WORDS), WIDTH) * np.float32(np.sqrt(len(WORDS)))
    table[1] *= 30
    words = make("Gather", table, "input_ids", name="words")
    ones, zeros = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
    wide = make("MatMul", make("LayerNormalization", words, ones, zeros), make.normal(WIDTH, 2 * WIDTH), name="fc1")
    narrow = make("MatMul", make("Gelu", wide), make.normal(2 * WIDTH, WIDTH), name="fc2")
    make("Add", words, narrow, name="last_hidden_state")
    graph = helper.make_graph(
        make.nodes,
        "text",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ("batch", tiny.LENGTH))],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ("batch", tiny.LENGTH, WIDTH))],
        make.weights,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(made)


def decoder(seed: int = 5) -> onnx.ModelProto:
    """Latents to three colours, at their own size."""
    make, pad = Graph(seed), {"pads": [1] * 4}
    inner = make("Conv", "latent_sample", make.normal(CHANNELS, 4, 3, 3), name="inner", **pad)
    make("Conv", make("Relu", inner), make.normal(3, CHANNELS, 3, 3), name="sample", **pad)
    return make.done({"latent_sample": ("batch", 4, "height", "width")}, {"sample": ("batch", 3, "height", "width")})


def recipe() -> Recipe:
    """LCM in two steps, without guidance."""
    made = tiny.image_recipe()
    stage = made.stages[0]
    stage = msgspec.structs.replace(
        stage,
        init=msgspec.structs.replace(stage.init, downscale=1, width=SIDE, height=SIDE),
        guidance=Guidance(),
        sampler=msgspec.structs.replace(stage.sampler, grid=Grid("lcm")),
    )
    return msgspec.structs.replace(made, stages=(stage,))


def write_bundle(target: Path, encoder: onnx.ModelProto | None = None) -> Path:
    """The whole of it, with this text encoder or the usual one."""
    with new_bundle(target) as draft:
        graphs = draft.root / "graphs"
        tiny.save(encoder or text_encoder(), graphs / "text_encoder.onnx")
        unet = ir.serde.deserialize_model(tiny_unet(text=("batch", tiny.LENGTH, WIDTH)))
        ir.save(unet, graphs / "unet.onnx", external_data="unet.onnx.data")
        tiny.save(decoder(), graphs / "vae_decoder.onnx")
        draft.seal(_manifest(draft.root))
    return target


def _manifest(root: Path) -> Manifest:
    tokens = root / "tokenizer/tokenizer.json"
    write_tokenizer(tokens)
    made = recipe()
    return Manifest(
        FORMAT,
        "text-to-image",
        "tiny-diffusion",
        {name: tiny.part(root, name) for name in ("text_encoder", "unet", "vae_decoder")},
        (),
        Provenance("tests", "0" * 64),
        axes={"batch": AxisRange(1, 8)},
        tokenizers={"default": Tokenizer("tokenizer/tokenizer.json", sha256_file(tokens), tiny.LENGTH, 0)},
        recipe=made,
        tables=compile_tables(made),
    )


def write_prompts(path: Path) -> Path:
    """Prompts in the words that its tokenizer has."""
    path.write_text("\n".join(PROMPTS) + "\n")
    return path
