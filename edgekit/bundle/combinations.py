"""What a recipe may combine: every setting belongs to a sampler that acts on it, every sampler has what it needs."""

from __future__ import annotations

import msgspec

from edgekit.bundle.recipe import Guidance, Hook, Recipe, Retrieve, Sampler, Select, Stage, TimeShift
from edgekit.bundle.sampling import TABLE_FREE, SamplerKind
from edgekit.errors import BadManifest

VP: tuple[SamplerKind, ...] = ("lcm", "tcd", "ddim", "ddpm", "dpmpp_2m")
SIGMA: tuple[SamplerKind, ...] = ("euler", "euler_ancestral")
FLOW: tuple[SamplerKind, ...] = ("flow_euler", "flow_heun", "flow_midpoint", "flow_map", "flow_stochastic")
BRIDGES: tuple[SamplerKind, ...] = ("residual_shift", "brownian_bridge")
TABLED: tuple[SamplerKind, ...] = (
    *VP,
    *SIGMA,
    *FLOW,
    *BRIDGES,
    "edm_consistency",
    "trig_consistency",
    "one_step",
)
TOKENS: tuple[SamplerKind, ...] = ("masked_tokens", "renoise_tokens", "discrete_posterior")
BLOCKS: tuple[SamplerKind, ...] = ("ar_blocks", "jacobi_tokens")

# The samplers a setting acts on; on any other it has its default.
ACTS_ON: dict[str, tuple[SamplerKind, ...]] = {
    "grid": (*VP, *SIGMA, *FLOW, "edm_consistency", "trig_consistency"),
    "timesteps": (*VP, *SIGMA, "trig_consistency", "one_step"),
    "endpoints": ("ddim",),
    "sigmas": (*SIGMA, *FLOW, "edm_consistency", "one_step"),
    "shift": FLOW,
    "mu": FLOW,
    "sign": (*FLOW, "one_step"),
    "eta": ("ddim",),
    "gamma": ("tcd",),
    "timestep_scaling": ("lcm",),
    "sigma_data": ("lcm", "edm_consistency", "trig_consistency"),
    "sigma_min": ("edm_consistency",),
    "clip": TABLED,
    "clip_out": TABLED,
    "final_alpha_one": ("ddim",),
    "time": TABLED,
    "time_scale": TABLED,
    "time_tuned": TABLED,
    "nets": TABLED,
    "residual_shift": ("residual_shift",),
    "bridge_noise": ("brownian_bridge",),
    "tokens": TOKENS,
    "blocks": BLOCKS,
    "rigid": ("euler_rigid",),
}
NEEDS: dict[str, tuple[SamplerKind, ...]] = {"tokens": TOKENS, "blocks": BLOCKS, "rigid": ("euler_rigid",)}

PICTURES = ("encode", "input", "previous")
# Where a sampler starts, if not from noise, a picture or a Gaussian; and the starts that are these samplers' alone.
STARTS: dict[SamplerKind, tuple[str, ...]] = {
    "masked_tokens": ("mask",),
    "discrete_posterior": ("mask",),
    "renoise_tokens": ("random",),
    "ar_blocks": ("mask", "random"),
    "jacobi_tokens": ("mask", "random"),
    "euler_rigid": ("rigid",),
    "residual_shift": PICTURES,
    "brownian_bridge": PICTURES,
}
DISCRETE_STARTS = ("mask", "random", "rigid")

_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(Sampler)}


def check_combinations(recipe: Recipe) -> None:
    """Refuse settings that contradict each other or that nothing would act on. Raises BadManifest, naming them."""
    for number, stage in enumerate(recipe.stages):
        where = f"recipe.stages.{stage.name}"
        _check_sampler(f"{where}.sampler", stage.sampler)
        _check_start(where, stage, number)
        _check_guidance(f"{where}.guidance", stage.guidance)
    main = next((stage for stage in recipe.stages if stage.sampler.kind != "direct"), None)
    for number, hook in enumerate(recipe.hooks):
        _check_hook(f"recipe.hooks[{number}]", hook, main)
    if recipe.select is not None:
        _check_select(recipe.select, main)


def _check_sampler(where: str, sampler: Sampler) -> None:
    if sampler.steps not in sampler.legal_steps:
        legal = ", ".join(map(str, sampler.legal_steps)) or "none"
        raise BadManifest(f"{where}.steps is {sampler.steps}, which is not among its legal_steps ({legal})")
    if len(set(sampler.legal_steps)) != len(sampler.legal_steps):
        raise BadManifest(f"{where}.legal_steps lists a count twice")
    for field, kinds in ACTS_ON.items():
        if sampler.kind not in kinds and getattr(sampler, field) != _DEFAULTS[field]:
            raise BadManifest(
                f"{where}.{field} is set, and sampler {sampler.kind!r} does not act on it; {', '.join(kinds)} would"
            )
    for field, kinds in NEEDS.items():
        if sampler.kind in kinds and getattr(sampler, field) is None:
            raise BadManifest(f"{where} is {sampler.kind!r} and has no `{field}`, which says what it draws")
    if (sampler.prediction == "flow") != (sampler.kind in FLOW) and sampler.kind not in ("one_step", *TABLE_FREE):
        raise BadManifest(f"{where}: sampler {sampler.kind!r} does not go with prediction {sampler.prediction!r}")
    if sampler.mu is not None and sampler.shift != 1:
        raise BadManifest(f"{where} has both `shift` and `mu`, which are two forms of one shift")
    given = len(sampler.timesteps or ())
    if sampler.endpoints is not None and len(sampler.endpoints) != given:
        raise BadManifest(f"{where} has {len(sampler.endpoints)} endpoints for {given} timesteps; each row has one")


def _check_start(where: str, stage: Stage, number: int) -> None:
    init, kind = stage.init, stage.sampler.kind
    starts = STARTS.get(kind)
    if starts is not None and init.kind not in starts:
        raise BadManifest(f"{where}.init is {init.kind!r}; sampler {kind!r} starts from {' or '.join(starts)}")
    if starts is None and init.kind in DISCRETE_STARTS:
        raise BadManifest(f"{where}.init is {init.kind!r}, which sampler {kind!r} cannot start from")
    if init.kind == "previous" and number == 0 and kind != "direct":
        raise BadManifest(f"{where}.init is 'previous' in the first stage: no picture comes before it")
    if init.kind == "encode" and init.encode is None:
        raise BadManifest(f"{where}.init is 'encode' and names no call in `encode`")
    if init.kind == "gaussian" and (init.mean is None or init.chol is None):
        raise BadManifest(f"{where}.init is 'gaussian' and lacks its `mean` or its `chol`")
    if init.noised and init.kind not in PICTURES:
        raise BadManifest(f"{where}.init is `noised`, which is for a start from a picture ({', '.join(PICTURES)})")
    if init.resize is not None and init.kind not in PICTURES:
        raise BadManifest(f"{where}.init has `resize`, which is for a start from a picture ({', '.join(PICTURES)})")
    if kind in BRIDGES and init.noised != (kind == "residual_shift"):
        wanted = "needs" if kind == "residual_shift" else "takes no"
        raise BadManifest(f"{where}.init: sampler {kind!r} {wanted} noise on its picture; see `noised`")


def _check_guidance(where: str, guidance: Guidance) -> None:
    if guidance.kind == "w_embedding" and not guidance.dim:
        raise BadManifest(f"{where} feeds an embedding of the scale, but gives no `dim`")
    if bool(guidance.joined) != (guidance.kind == "concat_tokens"):
        raise BadManifest(f"{where}: `joined` names what concat_tokens joins, and is for it alone")
    if guidance.minimum > guidance.maximum:
        raise BadManifest(f"{where}: the smallest scale {guidance.minimum} is above the largest, {guidance.maximum}")
    if guidance.rescale and guidance.kind != "cfg":
        raise BadManifest(f"{where}.rescale acts on cfg alone; this guidance is {guidance.kind!r}")
    dynamic = guidance.dynamic
    if dynamic is not None and not 0 <= dynamic.tau1 <= dynamic.tau2:  # equal: all or nothing (iCD)
        raise BadManifest(
            f"{where}.dynamic fades from tau1 {dynamic.tau1} to tau2 {dynamic.tau2}; tau2 is not the earlier"
        )


def _check_hook(where: str, hook: Hook, main: Stage | None) -> None:
    if isinstance(hook, TimeShift | Retrieve) and main is None:
        raise BadManifest(f"{where}: no stage draws row by row, so `{type(hook).__struct_config__.tag}` cannot act")
    if isinstance(hook, TimeShift) and main is not None and main.sampler.kind not in VP:
        raise BadManifest(
            f"{where}: time_shift reads a variance-preserving schedule ({', '.join(VP)}); "
            f"stage {main.name!r} is {main.sampler.kind!r}"
        )
    if isinstance(hook, Retrieve) and main is not None:
        if hook.resume_row <= hook.key_row:
            raise BadManifest(f"{where}: resume_row {hook.resume_row} is not after key_row {hook.key_row}")
        if main.denoise.carry:
            raise BadManifest(f"{where}: stage {main.name!r} carries tensors from row to row, so none may be skipped")


def _check_select(select: Select, main: Stage | None) -> None:
    legal = main.sampler.legal_steps if main is not None else ()
    wrong = [steps for steps in select.steps if steps not in legal]
    if wrong or not select.steps:
        named = ", ".join(map(str, wrong)) or "none"
        raise BadManifest(
            f"recipe.select.steps has {named}; the legal counts are {', '.join(map(str, legal)) or 'none'}"
        )
