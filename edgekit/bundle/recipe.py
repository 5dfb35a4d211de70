"""The few-step contract of a bundle as data: what to feed each network, on which grid, with which guidance.

A recipe is a list of conditions (networks run once, on the prompt) and stages (networks run step by step). It holds no
code: `edgekit.runtime.diffusion.tables` compiles a stage to a table of ten coefficients per step, and the bundle ships
both, so that a runtime in another language needs no scheduler mathematics.

A *source* says where a graph input comes from:
    part.output      an output of a condition that ran before, e.g. `text_encoder.last_hidden_state`
    @x, @t           the current sample (after c_in) and the row's timestep, float32 (batch,)
    @tokens[.name]   token ids of the prompt by the bundle's (named) tokenizer, int64 (batch, length)
    @w_embedding     the guidance-scale embedding, float32 (batch, dim)
    @time_ids        SDXL's (height, width, top, left, height, width), float32 (batch, 6)
    @latent          the finished sample of this stage; @image the picture given by the user, float32 in [-1, 1]
    @previous        the picture the stage before left, float32 (batch, 3, height, width) in [-1, 1]
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Source = Annotated[str, msgspec.Meta(pattern=r"^(@[a-z_]+(\.[a-z][a-z0-9_]*)?|[a-z][a-z0-9_]*\.[A-Za-z0-9_.]+)$")]
Steps = Annotated[int, msgspec.Meta(ge=1, le=1000)]

SamplerKind = Literal[
    "lcm", "tcd", "ddim", "euler", "euler_ancestral", "flow_euler", "flow_stochastic", "one_step", "direct"
]
Prediction = Literal["epsilon", "sample", "v_prediction", "flow"]


class _Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Frozen, validated, and written without its defaults."""


class NoiseSchedule(_Value, frozen=True):
    """The training noise schedule of a variance-preserving model: betas, then their running product."""

    kind: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    n: Annotated[int, msgspec.Meta(ge=2, le=100_000)] = 1000
    zero_snr: bool = False


class Grid(_Value, frozen=True):
    """How `steps` points are chosen on the training grid (names as in diffusers' `timestep_spacing`)."""

    spacing: Literal["lcm", "trailing", "leading", "linspace", "uniform", "flow"] = "trailing"
    original: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 50  # lcm: the distillation grid the points are taken from
    offset: int = 0  # leading: diffusers' steps_offset


class Sampler(_Value, frozen=True):
    """One sampler and the step counts the model was distilled for.

    `timesteps` (or `sigmas`, for flow samplers) fixes the grid for `steps == len(timesteps)`; else `grid` makes it.
    `shift` is the flow-matching resolution shift; `timestep_scaling` and `sigma_data` are LCM's boundary condition.
    """

    kind: SamplerKind
    steps: Steps
    legal_steps: tuple[Steps, ...]
    prediction: Prediction = "epsilon"
    noise_schedule: NoiseSchedule | None = None
    grid: Grid | None = None
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    shift: float = 1.0
    eta: float = 0.0
    gamma: float = 0.3
    timestep_scaling: float = 10.0
    sigma_data: float = 0.5
    clip: float | None = None
    final_alpha_one: bool = True  # ddim: diffusers' set_alpha_to_one


class Guidance(_Value, frozen=True):
    """`cfg` runs the network on prompt and negative prompt; `w_embedding` feeds the scale to the network (LCM).

    With `zero_empty`, the conditions of an empty negative prompt are zeros (SDXL's force_zeros_for_empty_prompt).
    """

    kind: Literal["none", "cfg", "w_embedding"] = "none"
    scale: float = 1.0
    rescale: float = 0.0
    dim: Annotated[int, msgspec.Meta(ge=0, le=8192)] = 0
    shift: float = -1.0
    minimum: float = 1.0
    maximum: float = 30.0
    zero_empty: bool = False


class Call(_Value, frozen=True):
    """One run of one graph: every input of the part has a source."""

    part: Name
    feeds: dict[str, Source]


class Init(_Value, frozen=True):
    """Where a stage's sample starts.

    `noise`: (batch, channels, height / downscale, width / downscale), scaled by the table's `init_scale`;
    `previous`: the picture the stage before left. With `encode`, a given picture starts the stage part of the way
    (image-to-image): encoded, scaled as `(z - shift) * scale`, and noised to the first row's level.
    """

    kind: Literal["noise", "previous"] = "noise"
    channels: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 4
    downscale: Annotated[int, msgspec.Meta(ge=1, le=256)] = 8
    width: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 512
    height: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 512
    fixed_size: bool = False
    encode: Call | None = None
    scale: float = 1.0
    shift: float = 0.0


class Denoise(_Value, frozen=True):
    """The network of a stage; `output` is the tensor taken, `keep_channels` its leading channels (learned variance)."""

    part: Name
    feeds: dict[str, Source]
    output: str
    keep_channels: int | None = None


class Decode(_Value, frozen=True):
    """From sample to picture: `part(sample / scale + shift)`."""

    part: Name
    feeds: dict[str, Source]
    output: str
    scale: float = 1.0
    shift: float = 0.0


class Stage(_Value, frozen=True):
    """One denoising loop."""

    name: Name
    init: Init
    sampler: Sampler
    denoise: Denoise
    guidance: Guidance = Guidance()
    decode: Decode | None = None
    upscale: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1  # output pixels per input pixel of a `direct` stage


class Recipe(_Value, frozen=True):
    """Conditions run once; stages run in order, each seeing what came before."""

    stages: tuple[Stage, ...]
    conditions: tuple[Call, ...] = ()


class Table(_Value, frozen=True):
    """A stage compiled for one step count: rows of COLUMNS, from a start at `init_keep * image + init_scale * noise`.

    Shipped tables start from noise alone; `init_keep` is other than 0 where the runtime compiles image-to-image.
    """

    stage: Name
    steps: Steps
    init_scale: float
    rows: tuple[tuple[float, ...], ...]
    init_keep: float = 0.0


COLUMNS = ("t", "c_in", "px", "pm", "kx", "ky", "km", "kz", "kp", "kq")
