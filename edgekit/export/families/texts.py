"""Text encoders besides CLIP as PartJobs: T5, and any that takes ids and their mask.

Their ids have a fixed length, the pipeline's default `max_sequence_length`, because attention to padding is part of
what the models were trained on.
"""

from __future__ import annotations

from edgekit.bundle.manifest import TensorSpec
from edgekit.errors import UnsupportedModel
from edgekit.export.families import PartJob
from edgekit.export.families.parts import BATCH, component, f32
from edgekit.export.sources import Source, read_json_if_any

NETWORKS = "edgekit.export.families.networks_text"


def t5_width(source: Source, name: str) -> int:
    """Width of a T5 encoder's states. Raises BadSource, UnsupportedModel."""
    return int(component(source, name, ("T5EncoderModel",))["d_model"])


def t5_job(source: Source, name: str, length: int, *, masked: bool = False) -> PartJob:
    """T5: `input_ids` int64 (batch, length), with `masked` also their `attention_mask`, to `last_hidden_state`.

    Raises:
        BadSource, UnsupportedModel: another class of encoder.
    """
    width = t5_width(source, name)
    vocabulary = int(component(source, name, ("T5EncoderModel",))["vocab_size"])
    states = (f32("last_hidden_state", "batch", length, width),)
    return text_job(name, "MaskedT5" if masked else "T5", length, vocabulary, states, masked=masked)


def text_job(
    name: str, network: str, length: int, vocabulary: int, outputs: tuple[TensorSpec, ...], *, masked: bool = True
) -> PartJob:
    """A text encoder on ids of one length, and their mask."""
    ids = [TensorSpec("input_ids", "int64", ("batch", length))]
    if masked:
        ids.append(TensorSpec("attention_mask", "int64", ("batch", length)))
    fill = {"input_ids": (0.0, float(vocabulary)), "attention_mask": (0.0, 2.0)}
    return PartJob(
        part=name,
        network=f"{NETWORKS}:{network}",
        folder=name,
        inputs=tuple(ids),
        outputs=outputs,
        sizes={"batch": BATCH[:2]},
        fill={spec.name: fill[spec.name] for spec in ids},
        lora=name,
    )


def pads_right(source: Source, folder: str) -> None:
    """Refuse a tokenizer that pads on the left: positions are counted from there, and the runtime pads on the right.

    Raises:
        UnsupportedModel: it does.
    """
    side = read_json_if_any(source.root / folder / "tokenizer_config.json").get("padding_side", "right")
    if side != "right":
        raise UnsupportedModel(f"{folder}: padding_side is {side!r}; only 'right' is exported")
