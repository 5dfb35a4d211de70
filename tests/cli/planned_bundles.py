"""Bundles with a study and a plan in them: the graphs are of another model, which `edgekit plan` never looks at."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgekit.bundle.manifest import Manifest, PrecisionRecord
from edgekit.quant.mixed import PLAN_FILE, STUDY_FILE
from edgekit.quant.plan import Error, PartChoices, PrecisionPlan, Rewrite, encode_plan
from edgekit.quant.study import Study
from tests.bundle import tiny

RANGES = {"x": (-1.5, 2.0)}
REWRITES = (Rewrite("shortcut", "block.3.proj"),)


def own_plan(study: Study) -> PrecisionPlan:
    """Eight bits for everything."""
    pick = study.problem().allowed[:, study.choices.index("w8a8")] * study.choices.index("w8a8")
    return PrecisionPlan(
        target=study.target,
        parts={name: PartChoices(units, RANGES, REWRITES) for name, units in study.choices_of(pick).items()},
        budgets={"bytes": 1e9},
        errors=(Error("content", 0.1, 0.2), Error("quality", 0.3, 0.4)),
        calibration="c" * 64,
        method="unet: scan",
    )


def write_planned(target: Path, study: Study, *, raw_study: bytes | None = None, raw_plan: bytes | None = None) -> Path:
    """A bundle whose hashes fit what is in it, whether or not that can be read."""

    def draft(root: Path) -> Manifest:
        manifest = tiny.image_draft(root)
        (root / PLAN_FILE).parent.mkdir()
        (root / PLAN_FILE).write_bytes(encode_plan(own_plan(study)) if raw_plan is None else raw_plan)
        (root / STUDY_FILE).write_bytes(study.encode() if raw_study is None else raw_study)
        return msgspec.structs.replace(manifest, precision=PrecisionRecord("mixed"))

    tiny.write(target, draft)
    return target
