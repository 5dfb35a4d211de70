"""What a recipe may not combine: every refusal names the field, and every sampler has a recipe that passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import msgspec
import pytest

from edgekit.bundle.combinations import ACTS_ON, NEEDS, STARTS, TABLED, check_combinations
from edgekit.bundle.recipe import (
    TABLE_FREE,
    Blocks,
    Call,
    Denoise,
    Dynamic,
    Grid,
    Guidance,
    Init,
    Recipe,
    Remask,
    ResidualShift,
    Resize,
    Retrieve,
    Rigid,
    Sampler,
    Select,
    Stage,
    Table,
    TimeShift,
    Tokens,
)
from edgekit.bundle.sampling import SamplerKind
from edgekit.bundle.store import read_bundle
from edgekit.bundle.validate import check_manifest
from edgekit.errors import BadManifest, TableMismatch
from tests.bundle import tiny

KINDS: tuple[SamplerKind, ...] = get_args(SamplerKind)
SET: dict[str, Any] = {  # another value than the default, for every field of ACTS_ON
    "grid": Grid("trailing"),
    "timesteps": (9.0,),
    "endpoints": (0.0,),
    "sigmas": (0.5,),
    "shift": 3.0,
    "mu": 0.8,
    "sign": -1,
    "eta": 1.0,
    "gamma": 0.5,
    "timestep_scaling": 7.0,
    "sigma_data": 1.0,
    "sigma_min": 0.0,
    "clip": 1.0,
    "clip_out": 1.0,
    "final_alpha_one": False,
    "time": "index",
    "time_scale": 0.001,
    "time_tuned": (9.0,),
    "nets": ("big",),
    "residual_shift": ResidualShift(kappa=1.0),
    "bridge_noise": 0.5,
    "tokens": Tokens(16, 32, remask=Remask("cap")),
    "blocks": Blocks((1, 4), 32),
    "rigid": Rigid(8),
}


def sampler(kind: SamplerKind, **options: Any) -> Sampler:
    """The plainest sampler of a kind that means something."""
    needed = {field: SET[field] for field, kinds in NEEDS.items() if kind in kinds}
    if kind.startswith("flow"):
        needed["prediction"] = "flow"
    return Sampler(kind, **({"steps": 1, "legal_steps": (1,)} | needed | options))


def stage(kind: SamplerKind, init: Init | None = None, guidance: Guidance | None = None, **options: Any) -> Stage:
    """A stage of that sampler, at a start it takes."""
    starts = STARTS.get(kind, ("noise",))
    start: Any = "input" if "input" in starts else starts[0]
    plain = Init(start, noised=kind == "residual_shift")
    return Stage("main", init or plain, sampler(kind, **options), Denoise("net", {}, "m"), guidance or Guidance())


def check(*stages: Stage, **options: Any) -> None:
    """Hold a recipe of these stages against the rules."""
    check_combinations(Recipe(stages, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_every_sampler_has_a_plain_recipe(kind: SamplerKind) -> None:
    """The rules leave something to each kind, and each kind has a table or runs without one."""
    check(stage(kind))
    assert (kind in TABLED) != (kind in TABLE_FREE)


@pytest.mark.parametrize("field", ACTS_ON)
def test_a_setting_belongs_to_samplers_that_act_on_it(field: str) -> None:
    """On any other kind it is refused by name: a value that silently does nothing is a mistake in the recipe."""
    for kind in KINDS:
        made = stage(kind, **{field: SET[field]})
        if kind not in ACTS_ON[field]:
            with pytest.raises(BadManifest, match=rf"stages\.main\.sampler\.{field} is set"):
                check(made)
        elif field != "endpoints":
            check(made)


def test_every_setting_has_an_owner() -> None:
    """A field that is added to Sampler is either for all kinds or listed."""
    for_all = {"kind", "steps", "legal_steps", "prediction", "noise_schedule"}
    assert {field.name for field in msgspec.structs.fields(Sampler)} == for_all | set(ACTS_ON)
    assert set(SET) == set(ACTS_ON)


@pytest.mark.parametrize(("field", "kind"), [(field, kind) for field, kinds in NEEDS.items() for kind in kinds])
def test_a_sampler_of_tokens_or_frames_says_of_what(field: str, kind: SamplerKind) -> None:
    """Without `tokens`, `blocks` or `rigid` there is nothing to draw."""
    with pytest.raises(BadManifest, match=f"no `{field}`"):
        check(stage(kind, **{field: None}))


ENCODE = Call("encoder", {"image": "@image"})
W_EMBEDDING = Guidance("w_embedding")
RETRIEVE = Retrieve("stored", key_row=3, resume_row=6)
CARRIES = Stage("main", Init(), sampler("ddim"), Denoise("net", {}, "m", carry=("cache",)))
REFUSED: dict[str, tuple[Callable[[], None], str]] = {
    "a default that is not legal": (lambda: check(stage("ddim", legal_steps=(2,), steps=1)), "legal_steps"),
    "a count twice": (lambda: check(stage("ddim", legal_steps=(1, 1))), "twice"),
    "noise on a flow": (lambda: check(stage("flow_euler", prediction="epsilon")), "'flow_euler' does not go with"),
    "a flow on a schedule": (lambda: check(stage("lcm", prediction="flow")), "'lcm' does not go with"),
    "two shifts": (lambda: check(stage("flow_euler", mu=0.8, shift=3.0)), "`shift` and `mu`"),
    "endpoints of nothing": (lambda: check(stage("ddim", endpoints=(0.0,))), "1 endpoints for 0 timesteps"),
    "tokens from noise": (lambda: check(stage("masked_tokens", Init())), "starts from mask"),
    "noise from tokens": (lambda: check(stage("ddim", Init("mask"))), "'mask', which sampler 'ddim' cannot"),
    "a first stage after another": (lambda: check(stage("ddim", Init("previous"))), "first stage"),
    "no encoder": (lambda: check(stage("ddim", Init("encode"))), "`encode`"),
    "no spread": (lambda: check(stage("ddim", Init("gaussian", mean="net.mean"))), "`chol`"),
    "noised noise": (lambda: check(stage("ddim", Init(noised=True))), "`noised`"),
    "larger noise": (lambda: check(stage("ddim", Init(resize=Resize(2)))), "`resize`"),
    "a shift from noise": (lambda: check(stage("residual_shift", Init())), "starts from encode or input"),
    "a shift from a clean picture": (lambda: check(stage("residual_shift", Init("input"))), "needs noise"),
    "a bridge from a noised one": (lambda: check(stage("brownian_bridge", Init("input", noised=True))), "takes no"),
    "an embedding of no width": (lambda: check(stage("lcm", guidance=W_EMBEDDING)), "`dim`"),
    "nothing to join": (lambda: check(stage("ddim", guidance=Guidance("concat_tokens"))), "`joined`"),
    "joined by nobody": (lambda: check(stage("ddim", guidance=Guidance(joined=("text.hidden",)))), "`joined`"),
    "no scale is legal": (lambda: check(stage("ddim", guidance=Guidance("cfg", minimum=9.0, maximum=2.0))), "smallest"),
    "rescaled nothing": (lambda: check(stage("ddim", guidance=Guidance(rescale=0.7))), "rescale"),
    "a fade upside down": (lambda: check(stage("ddim", guidance=Guidance("cfg", dynamic=Dynamic(0.8, 0.2)))), "tau2"),
    "a shift of no time": (lambda: check(stage("flow_euler"), hooks=(TimeShift(30, 300.0),)), "time_shift"),
    "a hook on a direct call": (lambda: check(stage("direct"), hooks=(RETRIEVE,)), "`retrieve` cannot act"),
    "a jump back": (lambda: check(stage("ddim"), hooks=(Retrieve("stored", 6, 6),)), "resume_row"),
    "a jump over what is carried": (lambda: check(CARRIES, hooks=(RETRIEVE,)), "carries"),
    "a policy of other counts": (lambda: check(stage("ddim"), select=Select("policy", {}, "p", (1, 2))), "has 2"),
    "a policy of none": (lambda: check(stage("ddim"), select=Select("policy", {}, "p", ())), "has none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_contradicts_itself_is_refused(name: str) -> None:
    """Each with the place in the recipe and the two things that do not go together."""
    attempt, words = REFUSED[name]
    with pytest.raises(BadManifest, match=words) as refusal:
        attempt()
    assert str(refusal.value).startswith("recipe.")


def test_what_belongs_together_passes() -> None:
    """The counterpart of the refusals: the same settings where they act."""
    second = msgspec.structs.replace(stage("ddim", Init("previous", noised=True, resize=Resize(2))), name="second")
    check(stage("lcm", Init(encode=ENCODE), Guidance("w_embedding", dim=16)), second)
    check(stage("ddim", timesteps=(9.0,), endpoints=(0.0,)), hooks=(TimeShift(30, 300.0), RETRIEVE))
    check(stage("dpmpp_2m", guidance=Guidance("concat_tokens", joined=("text.hidden",))))
    check(stage("one_step", Init("encode", encode=ENCODE), prediction="flow"))
    check(stage("euler", Init("gaussian", mean="net.mean", chol="net.chol")), stage("direct"))
    check(stage("ddim", steps=2, legal_steps=(1, 2)), select=Select("policy", {}, "p", (1, 2)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nets": ("a", "b")}, "run a, b, the recipe's one part"),
        ({"steps": 3}, "legal step counts"),
        ({"rows": ()}, "no rows"),
    ],
)
def test_a_table_is_its_stages(image_bundle: Any, change: dict[str, Any], words: str) -> None:
    """Parts per row, step count and rows of a shipped table are those of the stage it names."""
    manifest = read_bundle(image_bundle).manifest
    table = msgspec.structs.replace(Table("base", 2, 1.0, (tiny.ROW, tiny.ROW)), **change)
    with pytest.raises(TableMismatch, match=words):
        check_manifest(msgspec.structs.replace(manifest, tables=(table,)))


def test_a_stage_without_a_table_ships_none(image_bundle: Any) -> None:
    """A table of a direct call is from somewhere else."""
    manifest = read_bundle(image_bundle).manifest
    recipe = tiny.image_recipe()
    direct = msgspec.structs.replace(recipe.stages[0], sampler=Sampler("direct", 2, (2,)))
    changed = msgspec.structs.replace(manifest, recipe=msgspec.structs.replace(recipe, stages=(direct,)))
    with pytest.raises(TableMismatch, match="runs without one"):
        check_manifest(msgspec.structs.replace(changed, tables=(Table("base", 2, 1.0, (tiny.ROW, tiny.ROW)),)))
