"""`--precision mixed`: a float export, then everything of edgekit.quant, with gradient probes where torch is there.

The float bundle and all measurements stand in the cache under the hash of what was asked; an export that was stopped
goes on from what is finished there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgekit.bundle.files import cache_folder
from edgekit.bundle.manifest import Manifest
from edgekit.bundle.store import new_bundle, read_bundle
from edgekit.export.probe_worker import probe_apart
from edgekit.quant.budget import parse_budget
from edgekit.quant.flow import check_measurable, measure_bundle
from edgekit.quant.mixed import MixedOptions, Outcome, quantize
from edgekit.quant.plan import read_plan
from edgekit.quant.report import write_report
from edgekit.quant.targets import get_target

if TYPE_CHECKING:
    from edgekit.export.build import ExportRequest

Report = Callable[[str, float], None]
KEPT = 1 << 30  # bytes of finished work that stay in the cache; of a larger model the graphs are removed again
CALIBRATION_FILE = "calibration.txt"  # in a model's folder: prompts or text that fit it


def export_mixed(
    request: ExportRequest, float_export: Callable[[ExportRequest, Report], Manifest], report: Report
) -> Manifest:
    """Export in floats, measure, plan, write and verify.

    Args:
        request: what was asked, with precision `mixed`.
        float_export: exports a request of another precision.
        report: told what is done, and the share that is behind.

    Raises:
        BudgetTooSmall, PlanRefused, KernelsMissing: no plan, or not a good one; no bundle appears.
        BadRequest: an option that cannot be meant.
    """
    options = _options(request)
    target = get_target(request.device)
    check_measurable(target)
    plain = replace(request.in_floats(request.target), overwrite=True)
    work = cache_folder() / "precision" / plain.fingerprint()[:32]
    plain = replace(plain, target=work / "float.bundle")
    float_export(plain, lambda what, share: report(what, 0.2 * share))
    bundle = read_bundle(plain.target, verify=False)
    calibration = request.calibration or _own_calibration(request.source)
    measured = measure_bundle(
        bundle,
        target,
        calibration,
        work / target.name.replace(":", "-"),
        lambda what, share: report(what, 0.2 + 0.6 * share),
        probe_apart(request.max_memory) if _has_torch(bundle.manifest) else None,
    )
    with new_bundle(request.target, overwrite=request.overwrite) as draft:
        outcome = quantize(bundle, measured, options, draft.root, lambda what, share: report(what, 0.8 + 0.18 * share))
        report("report", 0.98)
        write_report(draft.root, measured, outcome)
        sealed = draft.seal(_stamped(outcome, request))
    _tidy(work)
    report("done", 1.0)
    return sealed


def _options(request: ExportRequest) -> MixedOptions:
    plan = None if request.plan is None else read_plan(request.plan)
    return MixedOptions(parse_budget(request.budgets, request.caps), request.protect, plan)


def _own_calibration(source: Path) -> Path | None:
    found = source / CALIBRATION_FILE
    return found if found.is_file() else None


def _has_torch(manifest: Manifest) -> bool:
    return manifest.recipe is not None and find_spec("torch") is not None


def _stamped(outcome: Outcome, request: ExportRequest) -> Manifest:
    provenance = msgspec.structs.replace(outcome.manifest.provenance, request=request.fingerprint())
    return msgspec.structs.replace(outcome.manifest, provenance=provenance)


def _tidy(work: Path) -> None:
    """Large graphs go, measurements stay."""
    graphs = [*work.glob("float.bundle"), *work.glob("*/*.onnx*")]
    if sum(file.stat().st_size for file in work.rglob("*") if file.is_file()) > KEPT:
        for each in graphs:
            if each.is_dir():
                shutil.rmtree(each)
            else:
                each.unlink()
