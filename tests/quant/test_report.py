"""The report's figures are the study's, the plan's and what was measured; its evidence is of the graphs as made."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekit.bundle.manifest import FORMAT, Gate, Manifest, PrecisionRecord, Provenance
from edgekit.quant.budget import Budget
from edgekit.quant.calibrate import Calibration
from edgekit.quant.fused import Fused
from edgekit.quant.metrics import NSR, kl_tokens
from edgekit.quant.mixed import Measured, Outcome
from edgekit.quant.pictures import Call
from edgekit.quant.plan import Error, PartChoices, PrecisionPlan, Rewrite
from edgekit.quant.prepare import Prepared
from edgekit.quant.report import REPORT_FILE, data_uri, page_of, pairs_of, text_rows, write_report
from edgekit.quant.report_html import Page, figure, render, size
from edgekit.quant.rewrite import Constants
from edgekit.quant.study import FLOATS
from edgekit.quant.targets import get_target
from edgekit.quant.verify import CAPS, Made, Verified
from edgekit.quant.workload import GraphWorkload
from edgekit.runtime.backends.fake import FakeSession
from edgekit.runtime.diffusion.request import Settled
from edgekit.runtime.diffusion.result import DrawResult, DrawStats
from tests.quant.pages import drawn_numbers, is_finite, outside, read, rows
from tests.quant.studies import PARTS, made_up

STUDY = made_up(shared=True)
FOUND = STUDY.decide(Budget(bits=9.0))
WORKLOAD = GraphWorkload("unet", FakeSession(lambda _: {}, (), ()), (), "y", (NSR,))


def made(part: str, kernels: Fused | None = None, runs: float = 2.0) -> Made:
    """One graph of the plan."""
    nothing = Calibration({}, {}, {}, {}, {})
    own = Prepared(part, Path(), (), (), Constants(), (), Call({}, {}), runs, WORKLOAD, {}, nothing)
    return Made(own, Path(), STUDY.choices_of(FOUND.pick)[part], 1, kernels)


def plan() -> PrecisionPlan:
    """Of what the study decides at 9 bits."""
    choices = STUDY.choices_of(FOUND.pick)
    rewrites = {"unet": (Rewrite("bos", "to_k", "text"), Rewrite("shortcut", "skip"))}
    return PrecisionPlan(
        target=STUDY.target,
        parts={name: PartChoices(choices[name], {}, rewrites.get(name, ())) for name in PARTS},
        caps={"content": 0.5},
        errors=(Error("content", FOUND.errors["content"]), Error("quality", FOUND.errors["quality"])),
        calibration="c" * 64,
        notes=("a note <b>",),
    )


MEASURED = Measured(STUDY, (), get_target("cpu:any"), WORKLOAD, WORKLOAD, "c" * 64)
OUTCOME = Outcome(
    manifest=Manifest(
        FORMAT,
        "text-to-image",
        "emoji",
        {},
        (),
        Provenance("models/emoji", "0" * 64),
        PrecisionRecord("mixed", (Gate("content: error", 0.1, 0.5),)),
    ),
    plan=plan(),
    made=(made("text_encoder"), made("unet", Fused({"QLinearConv": 3, "MatMulNBits": 0}, {"QLinearConv": 2}), 8.0)),
    verified=Verified(
        {"content": 0.1, "quality": 0.2},
        {"text_encoder": (1.0, 0.5), "unet": (10.0, 8.0)},
        {"text_encoder": (0.1, 0.1), "unet": (1.0, 0.4)},
    ),
    rivals={"w8a8": {"content": 0.3, "quality": 0.1}},
)


@pytest.fixture(scope="module")
def page() -> Page:
    """Everything, as data."""
    return page_of(MEASURED, OUTCOME, 12_345)


# --------------------------------------------------------------------------------------------------- figures


def test_every_unit_is_on_the_page(page: Page) -> None:
    """At its choice, with its own bytes and time, and all its errors that are known."""
    assert [(each.part, each.name) for each in page.layers] == [(row.part, row.units[0]) for row in STUDY.rows]
    for at, (each, row) in enumerate(zip(page.layers, STUDY.rows, strict=True)):
        column = FOUND.pick[at]
        assert (each.role, each.params, each.sharing) == (row.role, row.params, len(row.units))
        assert each.choice == STUDY.choices[column]
        assert (each.bytes, each.milliseconds) == (STUDY.bytes[at, column], STUDY.milliseconds[at, column])
        for name, table in STUDY.errors.items():
            known = {choice: v for choice, v in zip(STUDY.choices, table[at], strict=True) if not np.isnan(v)}
            assert each.errors[name] == pytest.approx(known)


def test_shares_of_the_error_are_whole(page: Page) -> None:
    """They add up to one, by metric, in proportion to the rows' own errors."""
    for name, table in STUDY.errors.items():
        shares = np.array([each.shares[name] for each in page.layers])
        assert shares.sum() == pytest.approx(1.0)
        np.testing.assert_allclose(shares, table[range(12), FOUND.pick] / FOUND.errors[name])


def test_sizes_and_times_are_those_measured(page: Page) -> None:
    """Before: fp32 everywhere and the rest; after: the bundle as told; a generation runs each part so often."""
    column = STUDY.bytes[:, STUDY.choices.index("fp32")]
    assert page.size == (STUDY.fixed_bytes + column.sum(), 12_345)
    assert page.milliseconds == (2 * 1.0 + 8 * 10.0, 2 * 0.5 + 8 * 8.0)
    assert page.bits == pytest.approx(8 * (FOUND.bytes - STUDY.fixed_bytes) / STUDY.params)
    assert page.bits <= 9.0
    assert sum(page.counts.values()) == 13


def test_errors_are_told_with_what_was_allowed(page: Page) -> None:
    """Predicted, measured, and the cap asked for, or the usual one."""
    told = {row.metric: (row.predicted, row.measured, row.cap) for row in page.errors}
    assert told == {
        "content": (FOUND.errors["content"], 0.1, 0.5),
        "quality": (FOUND.errors["quality"], 0.2, CAPS["quality"]),
    }
    assert page.gates == [("content: error", 0.1, 0.5)]
    assert page.rivals == OUTCOME.rivals


def test_points_are_plans_of_the_study(page: Page) -> None:
    """The plan is what was decided; one choice for all costs its rows, those that lack it at the next above."""
    (mine,) = (point for point in page.points if point.kind == "plan")
    assert (mine.bytes, mine.errors) == (FOUND.bytes, FOUND.errors)
    uniform = {point.label: point for point in page.points if point.kind == "uniform"}
    assert list(uniform) == list(STUDY.choices)
    column, above = STUDY.choices.index("w8a16"), STUDY.choices.index("fp16")
    taken = np.where(np.isnan(STUDY.bytes[:, column]), above, column)
    assert uniform["w8a16"].bytes == STUDY.fixed_bytes + STUDY.bytes[range(12), taken].sum()
    front = [point for point in page.points if point.kind == "front"]
    assert len(front) > 2
    assert min(point.bytes for point in front) <= mine.bytes


def test_graphs_are_told(page: Page) -> None:
    """Bytes of each part's own rows, its time, and kernels that were planned, with those found."""
    first, second = page.parts
    own = [at for at, row in enumerate(STUDY.rows) if row.part == "unet"]
    assert second.bytes == (
        STUDY.bytes[own, 0].sum(),
        STUDY.bytes[own, FOUND.pick[own]].sum(),
    )
    assert (second.name, second.runs, second.milliseconds, second.spread) == ("unet", 8.0, (10.0, 8.0), (1.0, 0.4))
    assert (first.kernels, second.kernels) == ("", "QLinearConv 2 of 3")
    assert (first.units, second.units) == (4, 9)


def test_lists_name_what_stayed(page: Page) -> None:
    """Floats by choice and floats that must be, rewrites, notes, and values that move."""
    lists = dict(page.lists)
    assert lists["Notes"] == ["a note <b>"]
    assert lists["Exact rewrites"] == ["unet: bos at to_k, guarded by text", "unet: shortcut at skip"]
    kept = [row.name for row, at in zip(STUDY.rows, FOUND.pick, strict=True) if STUDY.choices[at] in FLOATS]
    assert lists["Layers kept in floats by choice"] == kept
    assert lists["Layers that this target keeps in floats"] == []
    assert lists["Activations whose range changes most from step to step"] == ["unet/conv_in_output: 3.21 times"]
    assert [(each.part, each.method, each.trials) for each in page.probed] == [
        ("text_encoder", "scan", 12),
        ("unet", "probe+scan", 34),
    ]


# --------------------------------------------------------------------------------------------------- the file


def test_the_written_page_holds_it_all(tmp_path: Path) -> None:
    """One file in the bundle's folder, well-formed, with every unit and the size of what lies beside it."""
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "unet.onnx").write_bytes(bytes(54_321))
    for _ in range(2):  # written again, it does not count itself
        write_report(tmp_path, MEASURED, OUTCOME)
    text = (tmp_path / REPORT_FILE).read_text(encoding="utf-8")
    tags = read(text)
    assert outside(tags) == []
    assert is_finite(drawn_numbers(tags))
    assert size(54_321) in tags[0].text
    assert figure(FOUND.errors["quality"]) in tags[0].text
    assert "a note <b>" in tags[0].text
    for at, row in enumerate(STUDY.rows):
        (told,) = (cells for cells in rows(tags) if cells and cells[0].split(" and ")[0] == row.name)
        assert told[3:5] == [STUDY.choices[FOUND.pick[at]], size(STUDY.bytes[at, FOUND.pick[at]])]


# --------------------------------------------------------------------------------------------------- evidence


def drawn(*pictures: Image.Image, prompt: str = "a cat", video: bool = False) -> DrawResult:
    """What a pipeline gives."""
    side = pictures[0].width if pictures else 8
    used = Settled(prompt, "", 1, 1.0, side, side, len(pictures), 0, "device", None, 0)
    stats = DrawStats(1.0, {}, {}, {})
    return DrawResult(() if video else pictures, None, stats, used, {}, (pictures,) if video else ())


def picture(level: int, side: int = 16) -> Image.Image:
    """Noise around a grey."""
    noise = np.random.default_rng(level).integers(0, 20, (side, side, 3))
    return Image.fromarray((level + noise).astype(np.uint8))


def test_pictures_are_measured_as_they_are_shown() -> None:
    """PSNR by its definition on eight bits; the same picture is infinitely close; the data are the picture."""
    before, after = picture(100), picture(110)
    (pair, other) = pairs_of([drawn(before, before)], [drawn(after, before)])
    error = np.mean(np.square(np.asarray(before, float) - np.asarray(after, float)))
    assert pair.psnr == pytest.approx(10 * math.log10(255**2 / error))
    assert (pair.label, pair.width, pair.height) == ("a cat", 16, 16)
    assert (other.psnr, other.ssim) == (math.inf, pytest.approx(1.0))
    shown = Image.open(io.BytesIO(base64.b64decode(pair.after.partition(",")[2])))
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(after))


def test_as_many_requests_as_there_are_are_shown() -> None:
    """The first picture of each, then the second; six in all; one without a prompt has a number."""
    asked = [drawn(*[picture(9 * number)] * 4, prompt="" if number == 1 else f"p{number}") for number in range(3)]
    assert [pair.label for pair in pairs_of(asked, asked)] == ["p0", "request 2", "p2"] * 2
    assert pairs_of([], []) == ()
    assert [pair.label for pair in pairs_of(asked[:1], asked[:1])] == ["p0"] * 4


def test_of_a_video_the_middle_is_shown() -> None:
    """One frame of each."""
    frames = [picture(level, 4) for level in (0, 50, 100)]
    (pair,) = pairs_of([drawn(*frames, video=True)], [drawn(*frames, video=True)])
    assert pair.before == data_uri(frames[1])
    assert pair.ssim == pytest.approx(1.0)  # of one window, where none of the usual side fits


@pytest.mark.parametrize(("side", "kind"), [(256, "png"), (257, "webp")])
def test_large_pictures_are_packed(side: int, kind: str) -> None:
    """Small ones lose nothing."""
    assert data_uri(picture(40, side)).startswith(f"data:image/{kind};base64,")


def test_texts_are_compared_token_by_token() -> None:
    """Mean and tail of the divergence, agreement, and perplexity of the tokens that follow, by their definitions."""
    rng = np.random.default_rng(0)
    before = [rng.standard_normal((5, 11)), rng.standard_normal((3, 11))]
    after = [each + 0.1 * rng.standard_normal(each.shape) for each in before]
    texts = [tuple(rng.integers(0, 11, 8).tolist()), tuple(rng.integers(0, 11, 3).tolist())]
    found = {what: (one, other) for what, one, other in text_rows(before, after, texts)}
    kl = np.concatenate([kl_tokens(*both) for both in zip(before, after, strict=True)])
    assert found["mean KL divergence per token, nats"] == ("0", figure(float(kl.mean())))
    scores = []
    for logits, text in zip(before, texts, strict=True):
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        scores += [math.log(p[row, text[len(text) - len(logits) + 1 + row]]) for row in range(len(logits) - 1)]
    assert found["perplexity"][0] == f"{math.exp(-np.mean(scores)):.4g}"
    assert text_rows(before, before, texts)[2] == ("same most likely token", "100 %", "100.0 %")
    assert len(text_rows([before[0][:1]], [after[0][:1]], texts[:1])) == 3  # one row says nothing of what follows


def test_a_page_without_evidence_is_a_page(page: Page) -> None:
    """Neither pictures nor texts: sections are left out, the rest stands."""
    tags = read(render(page))
    assert not any(tag.name == "img" for tag in tags)
    assert {"Layers", "Graphs", "Size against error"} <= {tag.text for tag in tags if tag.name == "h2"}
