"""`report/report.html` of a bundle: what its plan is, why, what it cost and what it is held against, in one file.

Everything is taken from what was measured; only the pictures or texts that show the result are made anew, on held-out
requests. The page itself is written by report_html.
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgekit.errors import BudgetTooSmall
from edgekit.quant.allocate import Allocation, Problem, evaluate, uniform
from edgekit.quant.choices import CHOICES
from edgekit.quant.metrics import kl_tokens, perplexity, psnr_db, ssim, top1_agreement
from edgekit.quant.mixed import Measured, Outcome
from edgekit.quant.pictures import PictureWorkload
from edgekit.quant.plan import Rewrite
from edgekit.quant.report_html import ErrorRow, Layer, Page, Pair, Part, Point, Probed, figure, render
from edgekit.quant.study import FLOATS, Pick, Study
from edgekit.quant.texts import TextWorkload, Tokens
from edgekit.quant.verify import CAPS, Made, Verified, whole_time
from edgekit.quant.workload import Workload
from edgekit.runtime.backends import Array, Session, open_session
from edgekit.runtime.diffusion.pipeline import DrawResult

REPORT_FILE = "report/report.html"
PICTURES = 6
LOSSLESS = 256  # pixels of a side up to which pictures are PNG
WINDOW = 7  # pixels of a side below which structural similarity is of the whole picture


def write_report(root: Path, measured: Measured, outcome: Outcome) -> None:
    """Write the page into a bundle's folder.

    Args:
        root: the folder, with everything else that ships in it already.
        measured: what was measured of the unquantized bundle.
        outcome: the plan as made and verified.
    """
    pictures, texts = evidence(measured.held_out, outcome.made)
    path = root / REPORT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    after = sum(file.stat().st_size for file in root.rglob("*") if file.is_file() and file != path)
    path.write_text(render(page_of(measured, outcome, after, pictures, texts)), encoding="utf-8")


def page_of(
    measured: Measured,
    outcome: Outcome,
    bytes_after: int,
    pictures: Sequence[Pair] = (),
    texts: Sequence[tuple[str, str, str]] = (),
) -> Page:
    """All that the page says, as plain data.

    Args:
        measured, outcome: see `write_report`.
        bytes_after: of the bundle.
        pictures, texts: see `evidence`.
    """
    study, plan = measured.study, outcome.plan
    problem = study.problem()
    pick = study.pick_of({part: choices.units for part, choices in plan.parts.items()})
    made = study.whole(problem, pick)
    every = Counter[str](chain.from_iterable(part.units.values() for part in plan.parts.values()))
    origin = outcome.manifest.provenance
    return Page(
        title=f"{outcome.manifest.family}, {outcome.manifest.task}",
        facts=(("source", origin.source), ("target", plan.target), ("calibration", plan.calibration[:12] or "none")),
        size=(study.fixed_bytes + float(fp32_bytes(study).sum()), bytes_after),
        milliseconds=whole_time(outcome.verified, outcome.made) if outcome.verified.milliseconds else None,
        bits=8 * (made.bytes - study.fixed_bytes) / max(study.params, 1),
        choices=study.choices,
        counts={name: every[name] for name in CHOICES if every[name]},
        metrics=tuple(study.errors),
        errors=error_rows(study, outcome),
        gates=[(gate.what, gate.value, gate.limit) for gate in outcome.manifest.precision.gates],
        parts=part_rows(study, pick, outcome.made, outcome.verified),
        layers=layers_of(study, pick),
        points=points_of(study, problem, made),
        rivals={name: dict(found) for name, found in outcome.rivals.items()},
        probed=probed(study),
        pictures=pictures,
        texts=texts,
        lists=lists_of(study, problem, pick, outcome),
    )


def fp32_bytes(study: Study) -> npt.NDArray[np.float64]:
    """Bytes of every row before anything was done: (R,)."""
    column: npt.NDArray[np.float64] = study.bytes[:, study.choices.index("fp32")]
    return column


def layers_of(study: Study, pick: Pick) -> list[Layer]:
    """Every row of the study at its choice."""
    rows = np.arange(len(study.rows))
    taken = {name: np.nan_to_num(table[rows, pick]) for name, table in study.errors.items()}
    whole = {name: float(values.sum()) or 1.0 for name, values in taken.items()}
    return [
        Layer(
            part=row.part,
            name=row.units[0],
            role=row.role,
            params=row.params,
            sharing=len(row.units),
            choice=study.choices[pick[at]],
            bytes=float(study.bytes[at, pick[at]]),
            milliseconds=float(study.milliseconds[at, pick[at]]),
            errors={
                name: {
                    choice: float(value)
                    for choice, value in zip(study.choices, table[at], strict=True)
                    if np.isfinite(value)
                }
                for name, table in study.errors.items()
            },
            shares={name: float(values[at]) / whole[name] for name, values in taken.items()},
        )
        for at, row in enumerate(study.rows)
    ]


def points_of(study: Study, problem: Problem, made: Allocation) -> list[Point]:
    """The front, one choice for everything wherever it may be taken, and the plan that was made."""
    try:
        best = study.front()
    except BudgetTooSmall:  # the solver ran out of time: the page does without
        best = ()
    found = [Point("front", "", one.bytes, one.errors) for one in best]
    for name in study.choices:
        if problem.allowed[:, study.choices.index(name)].any():
            one = evaluate(problem, uniform(problem, name))
            found.append(Point("uniform", name, one.bytes, one.errors))
    return [*found, Point("plan", "this plan", made.bytes, made.errors)]


def error_rows(study: Study, outcome: Outcome) -> list[ErrorRow]:
    """What was predicted, measured and allowed, by metric."""
    said = {error.metric: error for error in outcome.plan.errors}
    return [
        ErrorRow(
            name,
            said[name].predicted if name in said else None,
            outcome.verified.measured.get(name),
            outcome.plan.caps.get(name, CAPS.get(name, math.inf)),
        )
        for name in study.errors
    ]


def part_rows(study: Study, pick: Pick, made: Sequence[Made], verified: Verified) -> list[Part]:
    """The graphs that were made."""
    before, after = fp32_bytes(study), study.bytes[np.arange(len(pick)), pick]
    found = []
    for each in made:
        own = [at for at, row in enumerate(study.rows) if row.part == each.part.part]
        kernels = each.kernels
        told = (
            ""
            if kernels is None
            else ", ".join(
                f"{name} {kernels.found.get(name, 0)} of {planned}"
                for name, planned in kernels.planned.items()
                if planned
            )
        )
        found.append(
            Part(
                name=each.part.part,
                units=len(each.choices),
                runs=each.part.runs,
                bytes=(float(before[own].sum()), float(after[own].sum())),
                milliseconds=verified.milliseconds.get(each.part.part),
                spread=verified.spread.get(each.part.part),
                kernels=told,
            )
        )
    return found


def probed(study: Study) -> list[Probed]:
    """How sensitivity was measured, by part."""
    facts = study.facts
    return [
        Probed(part, str(method), int(facts.get("trials", {}).get(part, 0)), facts.get("agreement", {}).get(part, {}))
        for part, method in facts.get("method", {}).items()
    ]


def lists_of(study: Study, problem: Problem, pick: Pick, outcome: Outcome) -> list[tuple[str, list[str]]]:
    """What is said in a line each: notes, rewrites, layers that stayed floats, ranges that move from step to step."""
    floats = np.array([name in FLOATS for name in study.choices])
    bound = ~(problem.allowed & ~floats).any(1)
    kept = floats[pick]
    return [
        ("Notes", list(outcome.plan.notes)),
        (
            "Exact rewrites",
            [f"{name}: {_told(each)}" for name, part in outcome.plan.parts.items() for each in part.rewrites],
        ),
        (
            "Layers kept in floats by choice",
            [row.name for at, row in enumerate(study.rows) if kept[at] and not bound[at]],
        ),
        ("Layers that this target keeps in floats", [row.name for at, row in enumerate(study.rows) if bound[at]]),
        (
            "Activations whose range changes most from step to step",
            [f"{name}: {figure(value)} times" for name, value in study.facts.get("spread", {}).items()],
        ),
    ]


def _told(rewrite: Rewrite) -> str:
    return f"{rewrite.kind} at {rewrite.node}" + (f", guarded by {rewrite.input}" if rewrite.input else "")


def evidence(held_out: Workload, made: Sequence[Made]) -> tuple[tuple[Pair, ...], tuple[tuple[str, str, str], ...]]:
    """Pictures before and after, or what a language model says of texts before and after; else nothing."""
    if isinstance(held_out, PictureWorkload):
        after = held_out.draw(_sessions(made))
        return pairs_of(held_out.draw({}), after), ()
    if isinstance(held_out, TextWorkload):
        return (), text_rows(held_out.run({}), held_out.run(_sessions(made)), held_out.requests)
    return (), ()


def _sessions(made: Sequence[Made]) -> Mapping[str, Session]:
    return {each.part.part: open_session(each.path, "cpu", planned=False) for each in made}


def pairs_of(before: Sequence[DrawResult], after: Sequence[DrawResult]) -> tuple[Pair, ...]:
    """The first pictures (of a video, its middle frame), from as many requests as there are."""
    pairs = []
    for number, (one, other) in enumerate(zip(before, after, strict=True)):
        prompt = one.used.prompt or f"request {number + 1}"
        pairs.append([_pair(prompt, *both) for both in zip(_pictures(one), _pictures(other), strict=True)])
    turns = (pair for turn in _by_turns(pairs) for pair in turn)
    return tuple(islice(turns, PICTURES))


def _by_turns(rows: Sequence[Sequence[Pair]]) -> list[list[Pair]]:
    """The first of every row, then the second of every row, and so on."""
    return [[row[turn] for row in rows if turn < len(row)] for turn in range(max(map(len, rows), default=0))]


def _pictures(result: DrawResult) -> tuple[Image.Image, ...]:
    return result.images or tuple(video[len(video) // 2] for video in result.videos if video)


def _pair(label: str, before: Image.Image, after: Image.Image) -> Pair:
    reference, output = (np.moveaxis(np.asarray(each.convert("RGB")), -1, 0) for each in (before, after))
    window = WINDOW if min(before.size) >= WINDOW else None
    return Pair(
        label=label,
        before=data_uri(before),
        after=data_uri(after),
        width=before.width,
        height=before.height,
        psnr=psnr_db(reference, output, 255.0),
        ssim=ssim(reference, output, 255.0, window),
    )


def data_uri(image: Image.Image) -> str:
    """A picture as text: small ones as they are, large ones as good WebP."""
    kind, options = ("png", {"optimize": True}) if max(image.size) <= LOSSLESS else ("webp", {"quality": 92})
    file = io.BytesIO()
    image.save(file, format=kind.upper(), **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def text_rows(
    before: Sequence[Array], after: Sequence[Array], requests: Sequence[Tokens]
) -> tuple[tuple[str, str, str], ...]:
    """What two models say of the same texts: name, before, after.

    Args:
        before, after: logits (rows, vocabulary) at the last rows of each text.
        requests: the texts' tokens.
    """
    divergence = np.concatenate([kl_tokens(*both) for both in zip(before, after, strict=True)])
    same = float(np.mean([top1_agreement(*both) for both in zip(before, after, strict=True)]))
    rows = [
        ("mean KL divergence per token, nats", "0", figure(float(divergence.mean()))),
        ("KL divergence that one token in a hundred exceeds, nats", "0", figure(float(np.quantile(divergence, 0.99)))),
        ("same most likely token", "100 %", f"{100 * same:.1f} %"),
    ]
    known = [
        (a[:-1], b[:-1], text[len(text) - len(a) + 1 :]) for a, b, text in zip(before, after, requests, strict=True)
    ]
    if all(len(a) for a, _, _ in known):
        targets = np.concatenate([text for _, _, text in known])
        one, other = (perplexity(np.concatenate([each[side] for each in known]), targets) for side in (0, 1))
        rows.append(("perplexity", f"{one:.4g}", f"{other:.4g}"))
    return tuple(rows)
