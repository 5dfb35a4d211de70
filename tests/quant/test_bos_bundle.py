"""A real bundle whose UNet has its first text token set aside, drawn from by the real runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from edgekit.bundle.manifest import FORMAT, AxisRange, Manifest, Provenance, Tokenizer
from edgekit.bundle.recipe import Grid, Guidance, Recipe
from edgekit.bundle.store import Bundle, new_bundle, read_bundle, sha256_file
from edgekit.errors import ForeignInput
from edgekit.quant.graph import find_units
from edgekit.quant.rewrite import find_constant_rows, split_bos
from edgekit.runtime.backends import open_session
from edgekit.runtime.diffusion.pipeline import FewStepPipeline
from edgekit.runtime.diffusion.tables import compile_tables
from tests.bundle import tiny
from tests.quant.tiny_graphs import WIDTH, normal_form, relative, tiny_unet
from tests.runtime.diffusion.fakes import WORDS, write_tokenizer

TEXT = "encoder_hidden_states"
IDS = np.array([[1, 3, 4, 2, 0, 0, 0, 0], [1, 5, 6, 2, 0, 0, 0, 0]])  # "red apple", "green pear"
GUIDED = Guidance("cfg", scale=3.0, minimum=1.0)
ZEROED = Guidance("cfg", scale=3.0, minimum=1.0, zero_empty=True)
Make = Callable[..., Bundle]


def text_encoder(first: int = 0, others: int = 0) -> Any:
    """A row per word, that of `<s>` 30 times larger; the seeds say which rows."""
    table = np.random.default_rng(others).standard_normal((len(WORDS), WIDTH)).astype(np.float32)
    table[1] = 30 * np.random.default_rng(100 + first).standard_normal(WIDTH)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["words", "input_ids"], ["last_hidden_state"])],
        "text",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ("batch", tiny.LENGTH))],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ("batch", tiny.LENGTH, WIDTH))],
        [helper.make_tensor("words", TensorProto.FLOAT, table.shape, table.tobytes(), raw=True)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def write_unet(path: Path, text: Path, is_split: bool) -> None:
    """The UNet, rewritten or not by what the text encoder beside it says of two prompts."""
    model = normal_form(tiny_unet(text=("batch", tiny.LENGTH, WIDTH)))
    if is_split:
        rows = find_constant_rows([open_session(text, threads=1).run({"input_ids": IDS})["last_hidden_state"]])
        assert len(split_bos(model, find_units(model), TEXT, rows)) == 2
    ir.save(model, path, external_data=f"{path.name}.data")


def draft(root: Path, recipe: Recipe, largest: int) -> Manifest:
    """The manifest of the graphs that lie there."""
    tokens = root / "tokenizer/tokenizer.json"
    write_tokenizer(tokens)
    return Manifest(
        FORMAT,
        "text-to-image",
        "tiny-diffusion",
        {name: tiny.part(root, name) for name in ("text_encoder", "unet", "vae_decoder")},
        (),
        Provenance("tests", "0" * 64),
        axes={"batch": AxisRange(1, largest)},
        tokenizers={"default": Tokenizer("tokenizer/tokenizer.json", sha256_file(tokens), tiny.LENGTH, 0)},
        recipe=recipe,
        tables=compile_tables(recipe),
    )


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(is_split, encoder=, guidance=, largest=)`: a bundle, with the encoder it was split for or another."""

    def made(is_split: bool, encoder: Any = None, guidance: Guidance | None = None, largest: int = 8) -> Bundle:
        recipe = tiny.image_recipe()
        stage = recipe.stages[0]
        sampler = msgspec.structs.replace(stage.sampler, grid=Grid("lcm"))
        init = msgspec.structs.replace(stage.init, downscale=1)
        stage = msgspec.structs.replace(stage, init=init, guidance=guidance or Guidance(), sampler=sampler)
        target = tmp_path / f"{len(list(tmp_path.iterdir()))}.bundle"
        with new_bundle(target) as each:
            text = each.root / "graphs/text_encoder.onnx"
            tiny.save(text_encoder(), text)
            write_unet(each.root / "graphs/unet.onnx", text, is_split)
            if encoder is not None:
                text.with_suffix(".onnx.data").unlink()
                tiny.save(encoder, text)
            tiny.save(tiny.vae_decoder(), each.root / "graphs/vae_decoder.onnx")
            each.seal(draft(each.root, msgspec.structs.replace(recipe, stages=(stage,)), largest))
        return read_bundle(target)

    return made


def draw(bundle: Bundle, **options: Any) -> np.ndarray:
    """The finished latents of two small pictures."""
    with FewStepPipeline(bundle, threads=1) as model:
        result = model.generate("red apple", **{"batch": 2, "seed": 3, "width": 6, "height": 4, **options})
    return np.asarray(result.latents)


@pytest.mark.parametrize("guidance", [Guidance(), GUIDED, ZEROED], ids=["alone", "guided", "zeroed"])
@pytest.mark.parametrize("negative", ["", "blurry"])
def test_the_split_bundle_draws_the_same(make: Make, guidance: Guidance, negative: str) -> None:
    """With and without classifier-free guidance, and with zeros for an empty negative prompt: the same latents."""
    options = {"negative": negative} if guidance.kind == "cfg" else {}
    plain, split = (draw(make(is_split, guidance=guidance), **options) for is_split in (False, True))
    assert relative(split, plain) < 1e-4
    assert np.isfinite(split).all()


def test_the_manifest_tells_the_guard_and_the_check_accepts_it(make: Make) -> None:
    """One more output than the recipe knows; reading the bundle back finds nothing wrong."""
    part = make(True).manifest.parts["unet"]
    assert [spec.name for spec in part.outputs] == ["out_sample", f"guard.{TEXT}"]
    assert part.answers == ("out_sample",)
    assert (part.outputs[1].dtype, part.outputs[1].shape) == ("float32", ())


@pytest.mark.parametrize("guidance", [Guidance(), GUIDED], ids=["alone", "guided"])
def test_another_text_encoder_is_refused(make: Make, guidance: Guidance) -> None:
    """Its first token is not the stored one: a clear error before anything is drawn, not a wrong picture."""
    with pytest.raises(
        ForeignInput, match="part 'unet', input 'encoder_hidden_states': the text encoder's first token"
    ):
        draw(make(True, text_encoder(first=1), guidance))
    draw(make(False, text_encoder(first=1), guidance))  # the same encoder is nothing wrong where nothing is stored


def test_other_words_may_change(make: Make) -> None:
    """A fine-tuned vocabulary with the same first token is served, exactly."""
    split, plain = (draw(make(is_split, text_encoder(others=5))) for is_split in (True, False))
    assert relative(split, plain) < 1e-4
    assert relative(split, draw(make(True))) > 1e-3


def test_every_slice_of_a_batch_is_watched(make: Make) -> None:
    """A graph of at most one picture at a time runs in slices; each has a guard, and none is joined to the picture."""
    one = make(True, largest=1)
    assert relative(draw(one, batch=3), draw(make(False), batch=3)) < 1e-4
    with pytest.raises(ForeignInput):
        draw(make(True, text_encoder(first=1), largest=1), batch=3)
