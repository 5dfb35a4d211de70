"""Samplers as data: which rule, on which points, and the table of numbers it compiles to.

`edgekit.runtime.diffusion.tables` compiles a continuous sampler to a table; samplers of tokens, blocks and rigid frames
run by rules of their own (edgekit.runtime.diffusion.tokens, .blocks, .rigid), which `Tokens`, `Blocks` and `Rigid` set.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Steps = Annotated[int, msgspec.Meta(ge=1, le=1000)]

SamplerKind = Literal[
    "lcm",
    "tcd",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "euler",
    "euler_ancestral",
    "edm_consistency",
    "trig_consistency",
    "flow_euler",
    "flow_heun",
    "flow_midpoint",
    "flow_map",
    "flow_stochastic",
    "residual_shift",
    "brownian_bridge",
    "one_step",
    "direct",
    "masked_tokens",
    "renoise_tokens",
    "discrete_posterior",
    "ar_blocks",
    "jacobi_tokens",
    "euler_rigid",
]
Prediction = Literal["epsilon", "sample", "v_prediction", "flow"]
Ids = Annotated[int, msgspec.Meta(ge=0, le=2**31)]


class Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Frozen, validated, and written without its defaults."""


class NoiseSchedule(Value, frozen=True):
    """The training noise schedule of a variance-preserving model: betas, then their running product.

    `betas` lists them outright, for models with a schedule of their own (WaveGrad); the other fields then do nothing.
    """

    kind: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    n: Annotated[int, msgspec.Meta(ge=2, le=100_000)] = 1000
    zero_snr: bool = False
    betas: tuple[float, ...] = ()


class Grid(Value, frozen=True):
    """How `steps` points are chosen on the training grid (names as in diffusers' `timestep_spacing`)."""

    spacing: Literal["lcm", "trailing", "leading", "linspace", "uniform", "flow", "karras"] = "trailing"
    original: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 50  # lcm: the distillation grid the points are taken from
    offset: int = 0  # leading: diffusers' steps_offset
    sigma_min: float = 0.002  # karras: ends of the grid and its curvature (Karras et al. 2022, eq. 5)
    sigma_max: float = 80.0
    rho: float = 7.0


class ResidualShift(Value, frozen=True):
    """ResShift (Yue et al. 2023): the residual between the two pictures is shifted in by sqrt(eta_k)."""

    kappa: float = 2.0
    min_noise: float = 0.2
    eta_end: float = 0.99
    power: float = 0.3


class Remask(Value, frozen=True):
    """ReMDM (Wang et al. 2025): how likely a decided token is masked again."""

    strategy: Literal["cap", "rescale", "confidence", "loop"]
    eta: float = 0.02
    t_on: float = 0.55
    t_off: float = 0.05
    alpha_on: float = 0.9


class Tokens(Value, frozen=True):
    """Samplers of discrete tokens: `length` of them per sample (`rows` per RVQ codebook), of `vocabulary` values."""

    length: Annotated[int, msgspec.Meta(ge=1, le=2**20)]
    vocabulary: Annotated[int, msgspec.Meta(ge=2, le=2**24)]
    mask_id: Ids = 0
    codebooks: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    codebook_steps: tuple[Steps, ...] = ()  # masked: rows of each codebook, one after the other
    span: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1  # masked: tokens that are decided together (MAGNeT)
    schedule: Literal["cosine", "cosine_closed", "linear"] = "cosine"
    temperature: tuple[float, float] = (1.0, 1.0)  # of the softmax, first and last row
    anneal: bool = False  # masked: instead the first temperature times the share of rows left (MAGNeT)
    choice_temperature: tuple[float, float] = (2.0, 0.0)  # masked: of the noise on confidence, first and last row
    renoise_steps: Annotated[int, msgspec.Meta(ge=0, le=1000)] | None = None  # renoise: rows that put noise back
    top_k: Ids = 0
    top_p: float = 1.0
    times: tuple[float, float] = (1.0, 0.0)  # renoise, posterior: first and last time
    remask: Remask | None = None
    confidence: Name | None = None  # masked: the part whose output scores tokens, in place of their probability


class Blocks(Value, frozen=True):
    """Autoregression block by block (tokens, rows, scales): tokens per block; `window` of a Jacobi iteration."""

    sizes: tuple[Annotated[int, msgspec.Meta(ge=1, le=2**20)], ...]
    vocabulary: Annotated[int, msgspec.Meta(ge=2, le=2**24)]
    temperature: float = 1.0
    top_k: Ids = 0
    top_p: float = 1.0
    window: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 16


class Rigid(Value, frozen=True):
    """Frames of a rigid chain (ReQFlow, FrameFlow): translations on a straight path, rotations on a geodesic."""

    count: Annotated[int, msgspec.Meta(ge=1, le=2**20)]
    min_t: float = 0.01
    rotation: Literal["exponential", "linear"] = "exponential"
    rate: float = 10.0
    scale: float = 10.0  # of the initial translations, in the network's unit of length


class Sampler(Value, frozen=True):
    """One sampler and the step counts the model was distilled for.

    `timesteps` (or `sigmas`, for flow and EDM samplers; angles, for trig_consistency) fixes the grid for
    `steps == len(...)`; else `grid` makes it. `endpoints` are explicit targets of ddim's rows (the last 0 means clean).
    `shift` is the flow-matching resolution shift, `mu` its exponential form; `sign` is -1 where a flow network predicts
    x_0 - eps. `timestep_scaling`, `sigma_data` and `sigma_min` are the boundary conditions of consistency models.
    `time` says what the network is fed for a point: the timestep, its sqrt(abar), 1 - sigma, or the row's place counted
    from the clean end; all times `time_scale`. `time_tuned` feeds other times, row by row, and leaves the coefficients
    (Timestep Aligner). `nets` names the part of each row (Hybrid SD, AutoDiffusion, feature caches).
    """

    kind: SamplerKind
    steps: Steps
    legal_steps: tuple[Steps, ...]
    prediction: Prediction = "epsilon"
    noise_schedule: NoiseSchedule | None = None
    grid: Grid | None = None
    timesteps: tuple[float, ...] | None = None
    endpoints: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    shift: float = 1.0
    mu: float | None = None
    sign: Literal[1, -1] = 1
    eta: float = 0.0
    gamma: float = 0.3
    timestep_scaling: float = 10.0
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    clip: float | None = None
    clip_out: float | None = None  # bound on the sample after every row (WaveGrad)
    final_alpha_one: bool = True  # ddim: diffusers' set_alpha_to_one
    time: Literal["t", "sqrt_alpha_cumprod", "one_minus_sigma", "index"] = "t"
    time_scale: float = 1.0
    time_tuned: tuple[float, ...] = ()
    nets: tuple[Name, ...] = ()
    residual_shift: ResidualShift | None = None
    bridge_noise: float = 1.0  # brownian_bridge: epsilon
    tokens: Tokens | None = None
    blocks: Blocks | None = None
    rigid: Rigid | None = None


class Table(Value, frozen=True):
    """A stage compiled for one step count: rows of COLUMNS, from a start at `init_keep * image + init_scale * noise`.

    `nets` names the part of each row where they differ. Shipped tables start from noise alone, or, where
    the stage starts from a picture, from `init_keep` of it; the runtime compiles image-to-image.
    """

    stage: Name
    steps: Steps
    init_scale: float
    rows: tuple[tuple[float, ...], ...]
    init_keep: float = 0.0
    nets: tuple[Name, ...] = ()


COLUMNS = ("t", "c_in", "px", "pm", "kx", "ky", "km", "kz", "kp", "kq")

TABLE_FREE: tuple[SamplerKind, ...] = (
    "direct",
    "masked_tokens",
    "renoise_tokens",
    "discrete_posterior",
    "ar_blocks",
    "jacobi_tokens",
    "euler_rigid",
)
