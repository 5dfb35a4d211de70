"""The few-step contract of a bundle as data: what to feed each network, on which grid, with which guidance.

A recipe is a list of conditions (networks run once, on the prompt) and stages (networks run step by step). It holds no
code: `edgekit.runtime.diffusion.tables` compiles a stage to a table of ten coefficients per step, and the bundle ships
both, so that a runtime in another language needs no scheduler mathematics.

A *source* says where a graph input comes from; the batch is always on axis 0:
    part.output      an output of a call that ran before, e.g. `text_encoder.last_hidden_state`
    @x, @t, @r       the current sample (after c_in), the row's time, the next row's time, float32 (batch,)
    @row             the row's number, int64 (batch,); @codebook that of masked_tokens' codebook; @decided how many
                     tokens jacobi_tokens has settled; both int64 (batch,)
    @tokens[.name]   token ids of the prompt by the bundle's (named) tokenizer, int64 (batch, length)
    @mask[.name]     1 where those ids are the prompt's and 0 where they pad, int64 (batch, length)
    @w_embedding     the guidance-scale embedding, float32 (batch, dim)
    @guidance        the guidance scale times the guidance's `factor`, float32 (batch,)
    @time_ids        SDXL's (height, width, top, left, height, width), float32 (batch, 6)
    @size            (height, width) of the picture in pixels; @aspect: height / width, float32 (batch, 2), (batch, 1)
    @seconds         seconds of sound asked for, float32 (batch,)
    @const.name      a row of the recipe's constants, float32 (batch, length of it)
    @random.name     unit noise, drawn anew for every row, or once for a condition, of the shape the graph declares
    @input.name      an array the caller gives by name, (batch, ...)
    @latent          the finished sample of this stage; @image the picture given by the user, float32 in [-1, 1]
    @original        the same at the size it was given in, (1, 3, height, width): for networks that look at it whole
    @start           what the sample started from: the encoded picture, before noise
    @previous        the picture the stage before left, float32 (batch, 3, height, width) in [-1, 1]
    @control         the control picture, float32 (batch, 3, height, width) in [0, 1]; @control_scale float32 (batch,)
    @reference       the middle square of the reference picture, float32 (1, 3, side, side) in [0, 1], of the side the
                     graph declares; conditions only. @reference_scale how alike the drawn is to be, float32 (batch,)
    @inpaint_mask    1 where to paint, float32 (batch, 1, height, width) at the size of the sample
    @masked_image    the given picture with the painted part at 0, float32 (batch, 3, height, width) in [-1, 1]
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edgekit.bundle.sampling import (
    COLUMNS,
    TABLE_FREE,
    Blocks,
    Grid,
    Name,
    NoiseSchedule,
    Remask,
    ResidualShift,
    Rigid,
    Sampler,
    Steps,
    Table,
    Tokens,
    Value,
)

__all__ = [
    "COLUMNS",
    "TABLE_FREE",
    "Accept",
    "Blocks",
    "Call",
    "Decode",
    "Denoise",
    "Dynamic",
    "Grid",
    "Guidance",
    "Hook",
    "Init",
    "Media",
    "Name",
    "NoiseSchedule",
    "Rank",
    "Recipe",
    "Remask",
    "ResidualShift",
    "Resize",
    "Retrieve",
    "Rigid",
    "Sampler",
    "Select",
    "Source",
    "Stage",
    "Steps",
    "Table",
    "Tiles",
    "TimeShift",
    "Tokens",
    "Value",
]

Source = Annotated[str, msgspec.Meta(pattern=r"^(@[a-z_]+(\.[a-z][a-z0-9_]*)?|[a-z][a-z0-9_]*\.[A-Za-z0-9_.]+)$")]
Axis = Annotated[int, msgspec.Meta(ge=1, le=2**20)] | Literal["height", "width", "frames", "length"]


class Call(Value, frozen=True):
    """One run of one graph: every input of the part has a source."""

    part: Name
    feeds: dict[str, Source]


class Dynamic(Value, frozen=True):
    """Guidance that fades with noise (iCD, Starodubcev et al. 2024): full to t = 1000 tau1, `floor` from 1000 tau2."""

    tau1: float
    tau2: float
    floor: float = 0.0


class Guidance(Value, frozen=True):
    """How the prompt's pull is set.

    `cfg` runs the network on prompt and negative prompt; `w_embedding` feeds the scale as sines and cosines (LCM),
    `embedded` as the number `scale * factor` (FLUX, SANA-Sprint); `concat_tokens` joins the conditions of prompt and
    negative prompt along their length in one call (SpeedUpNet). `ramp` moves the scale linearly from `start` to `scale`
    over the rows of a table or the frames of a video; `dynamic` fades it with the row's noise. With `zero_empty`, the
    conditions of an empty negative prompt are zeros (SDXL's force_zeros_for_empty_prompt); `zero_negative` are
    sources that are zeros beside any negative prompt (an image embedding, SVD's encoded picture).
    """

    kind: Literal["none", "cfg", "w_embedding", "embedded", "concat_tokens"] = "none"
    scale: float = 1.0
    rescale: float = 0.0
    dim: Annotated[int, msgspec.Meta(ge=0, le=8192)] = 0
    shift: float = -1.0
    factor: float = 1.0
    minimum: float = 1.0
    maximum: float = 30.0
    zero_empty: bool = False
    zero_negative: tuple[Source, ...] = ()
    joined: tuple[Source, ...] = ()  # concat_tokens: the sources that are joined, the prompt's first
    ramp: Literal["none", "rows", "frames"] = "none"
    start: float = 1.0
    dynamic: Dynamic | None = None


class Resize(Value, frozen=True):
    """A picture made larger before it is used."""

    factor: Annotated[int, msgspec.Meta(ge=1, le=64)]
    mode: Literal["bicubic", "lanczos", "nearest"] = "bicubic"


class Init(Value, frozen=True):
    """Where a stage's sample starts, and its shape: `shape` after the batch, or (channels, height, width).

    `height` and `width` in a shape are the picture's divided by `downscale`; `frames` and `length` (of sound, in sample
    units) are the fields of that name. Kinds:
        noise      unit noise times the table's `init_scale`, around `mean` where one is given. With `encode`, a given
                   picture may start the stage part of the way (image-to-image): encoded, scaled as (z - shift) * scale
                   and noised to the first row's level.
        encode     the encoded picture, always: as it is, or, where `noised`, brought to the first row's noise level.
                   `resize` makes the picture larger first.
        input      as `encode`, without an encoder: the given picture, or `mean` where it is set, is the sample.
        previous   the picture the stage before left, or, where that has no decoder, its sample; `encode`, `resize` and
                   `noised` as above.
        gaussian   mean + chol z: `mean` (batch, ...) and lower-triangular `chol` (batch, n, n) over the flat sample.
        mask, random     tokens: all masked, or drawn evenly. `rigid`: frames, see edgekit.bundle.sampling.Rigid.
    """

    kind: Literal["noise", "encode", "input", "previous", "gaussian", "mask", "random", "rigid"] = "noise"
    channels: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 4
    downscale: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 8
    multiple: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1  # of height and width of the sample (patches)
    width: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 512
    height: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 512
    fixed_size: bool = False
    shape: tuple[Axis, ...] = ()
    frames: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1
    length: Annotated[int, msgspec.Meta(ge=1, le=2**24)] = 1
    encode: Call | None = None
    scale: float = 1.0
    shift: float = 0.0
    noised: bool = False
    resize: Resize | None = None
    mean: Source | None = None
    chol: Source | None = None


class Tiles(Value, frozen=True):
    """Run on overlapping squares of `size` input pixels, blended, so that any size fits in memory.

    `always` tiles whatever is larger than one tile; else only a request that asks for it does.
    """

    size: Annotated[int, msgspec.Meta(ge=8, le=65536)]
    overlap: Annotated[int, msgspec.Meta(ge=0, le=65536)] = 0
    blend: Literal["linear", "gaussian"] = "linear"
    always: bool = False


class Denoise(Value, frozen=True):
    """The network of a stage; `output` is the tensor taken, `keep_channels` its leading channels (learned variance).

    `before` runs in every row ahead of it, on the same sample and time (ControlNet), and its outputs are sources.
    `carry` names outputs that are fed back as inputs of the same name in the next row, zeros at first (feature caches,
    self-conditioning). `fixed` entries, NaN where free, are put back before every row and at the end.
    Where a row's part (`sampler.nets`) has fewer inputs, it is fed those it has.
    """

    part: Name
    feeds: dict[str, Source]
    output: str
    keep_channels: int | None = None
    before: tuple[Call, ...] = ()
    carry: tuple[str, ...] = ()
    fixed: Source | None = None
    tiles: Tiles | None = None


class Decode(Value, frozen=True):
    """From sample to picture or sound: `part(sample / scale + shift)`.

    `mean` and `std`, one per channel, replace scale and shift where they differ: sample * std + mean. With `per_frame`
    frames are folded into the batch, axis `frames` of Init.shape, and unfolded after. `chunk` frames go through the
    decoder at a time, 0 for all; one that smooths over time does so within a chunk. `preview` names a second, small
    decoder of the same latent space, which `tiny` decoding and previews use.
    """

    part: Name
    feeds: dict[str, Source]
    output: str
    scale: float = 1.0
    shift: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    per_frame: bool = False
    chunk: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0
    tiles: Tiles | None = None
    preview: Decode | None = None


class Accept(Value, frozen=True):
    """Whether the picture of a stage is good enough to stop there (teacher-student oracle): score >= threshold."""

    part: Name
    feeds: dict[str, Source]
    output: str
    threshold: float


class Stage(Value, frozen=True):
    """One denoising loop."""

    name: Name
    init: Init
    sampler: Sampler
    denoise: Denoise
    guidance: Guidance = Guidance()
    decode: Decode | None = None
    upscale: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1  # output pixels per input pixel of a `direct` stage
    accept: Accept | None = None


class TimeShift(Value, frozen=True, tag="time_shift", tag_field="kind"):
    """Time-Shift sampling (Li et al. 2024): each sample is fed the time within `window` whose variance is its own."""

    window: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    cutoff: float


class Retrieve(Value, frozen=True, tag="retrieve", tag_field="kind"):
    """ReDi (Zhang et al. 2023): at `key_row` the sample is looked up among stored ones and jumps to `resume_row`.

    `part` takes nothing and gives `keys` and `values`, (stored, ...) samples at the two rows.
    """

    part: Name
    key_row: Annotated[int, msgspec.Meta(ge=0, le=1000)]
    resume_row: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    top_k: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1


class Rank(Value, frozen=True, tag="rank", tag_field="kind"):
    """The samples of a batch in the order of a score, the best first (DiffDock's confidence)."""

    part: Name
    feeds: dict[str, Source]
    output: str


Hook = TimeShift | Retrieve | Rank


class Select(Value, frozen=True):
    """A policy that chooses the step count from the prompt (AdaDiff): argmax of the output over `steps`."""

    part: Name
    feeds: dict[str, Source]
    output: str
    steps: tuple[Steps, ...]


class Media(Value, frozen=True):
    """What comes out: pictures, a video of `rate` frames a second, sound of `rate` samples a second, arrays."""

    kind: Literal["image", "video", "audio", "array"] = "image"
    rate: float = 0.0


class Recipe(Value, frozen=True):
    """Conditions run once; stages run in order, each seeing what came before."""

    stages: tuple[Stage, ...]
    conditions: tuple[Call, ...] = ()
    constants: dict[Name, tuple[float, ...]] = {}
    hooks: tuple[Hook, ...] = ()
    select: Select | None = None
    media: Media = Media()
