"""The report's page: well-formed, complete, asking for nothing else, and safe whatever a model's names are."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from markupsafe import Markup

from edgekit.quant.choices import CHOICES
from edgekit.quant.report_html import (
    HIGH,
    WIDE,
    Decades,
    ErrorRow,
    Layer,
    Page,
    Pair,
    Part,
    Point,
    Probed,
    colour,
    figure,
    front,
    render,
    sensitivity,
    size,
    strip,
    times,
)
from tests.quant.pages import Tag, drawn_numbers, is_finite, numbers, outside, read, rows

HOSTILE = "<b>x</b>\"'&<script>alert(1)</script>{{ 7 * 7 }}"
PIXEL = "data:image/png;base64,AAAA"
NAMES = ("fp32", "fp16", "w8a8", "w4a16-32")


def layer(number: int, part: str = "unet", name: str = "", **changes: Any) -> Layer:
    """One of several, each at another choice."""
    choice = NAMES[number % len(NAMES)]
    errors = {name: 1e-3 * 4.0**-at * (number + 1) for at, name in enumerate(reversed(NAMES[1:]))} | {"fp32": 0.0}
    made = Layer(
        part,
        name or f"block.{number}",
        "conv",
        1000 * (number + 1),
        1,
        choice,
        4000.0,
        0.5,
        {"content": errors, "quality": {key: value * 9 for key, value in errors.items()}},
        {"content": 0.25, "quality": 0.125},
    )
    return replace(made, **changes)


def page(**changes: Any) -> Page:
    """A page with something in every section."""
    made = Page(
        title="emoji, text-to-image",
        facts=(("source", "models/emoji"), ("target", "cpu:any")),
        size=(1e8, 2.5e7),
        milliseconds=(200.0, 100.0),
        bits=7.25,
        choices=NAMES,
        counts={"fp32": 1, "w8a8": 3},
        metrics=("content", "quality"),
        errors=[ErrorRow("content", 0.001, 0.0012, 0.02), ErrorRow("quality", None, None, math.inf)],
        gates=[("content: error", 0.0012, 0.02), ("bytes", 5.0, 4.0)],
        parts=[
            Part("unet", 4, 8.0, (9e7, 2e7), (20.0, 10.0), (1.0, 0.5), "QLinearConv 3 of 3"),
            Part("vae", 0, 1, (1, 1)),
        ],
        layers=[*(layer(number) for number in range(5)), layer(5, "vae", sharing=3)],
        points=[
            Point("front", "", 1e7, {"content": 0.1, "quality": 1.0}),
            Point("front", "", 2e7, {"content": 0.01, "quality": 0.1}),
            Point("uniform", "fp32", 1e8, {"content": 0.0, "quality": 0.0}),
            Point("uniform", "w8a8", 2.6e7, {"content": 0.02, "quality": 0.2}),
            Point("plan", "this plan", 2.5e7, {"content": 0.009, "quality": 0.09}),
        ],
        rivals={"w8a8": {"content": 0.03, "quality": 0.3}},
        probed=[Probed("unet", "probe+scan", 34, {"content": 0.9}), Probed("vae", "scan", 3, {})],
        pictures=[
            Pair("a cat", PIXEL, PIXEL, 64, 64, 40.0, 0.99),
            Pair("a dog", PIXEL, PIXEL, 512, 512, math.inf, 1.0),
        ],
        texts=[("mean KL", "0", "0.01")],
        lists=[("Notes", ["one", "two"]), ("Nothing to say", [])],
    )
    return replace(made, **changes)


def cells(tags: list[Tag], first: str) -> list[str]:
    """The row that begins with a cell."""
    (found,) = (row for row in rows(tags) if row and row[0] == first)
    return found


# --------------------------------------------------------------------------------------------------- the whole page


def test_the_page_is_well_formed() -> None:
    """Tags come in pairs, drawings have finite coordinates, and nothing is asked of anyone else."""
    text = render(page())
    tags = read(text)
    assert text.startswith("<!doctype html>")
    assert outside(tags) == []
    found = drawn_numbers(tags)
    assert len(found) > 100
    assert is_finite(found)
    ids = [tag.attributes["id"] for tag in tags if "id" in tag.attributes]
    assert len(set(ids)) == len(ids)


def test_every_part_of_the_plan_is_told() -> None:
    """Figures as a reader finds them, in tiles and tables."""
    tags = read(render(page()))
    words = " ".join(tags[0].text.split())
    for told in (
        "25.0 MB",
        "was 100.0 MB, 4.00x smaller",
        "100 ms",
        "2.00x faster",
        "7.25",
        "w8a8 \N{MULTIPLICATION SIGN} 3",
    ):
        assert told in words
    assert cells(tags, "quality") == ["quality", "-", "-", "∞"]
    assert cells(tags, "bytes")[-1] == "over"
    assert cells(tags, "content: error")[-1] == "passed"
    assert ["w8a8", "0.03", "0.3"] in rows(tags)
    assert ["unet", "4", "8", "90.0 MB", "20.0 MB", "20 ± 0.5", "10 ± 0.25", "QLinearConv 3 of 3"] in rows(tags)
    assert ["unet", "probe+scan", "34", "0.9", "-"] in rows(tags)
    assert ["mean KL", "0", "0.01"] in rows(tags)


def test_every_layer_is_there() -> None:
    """A row in the table, a rectangle in its part's strip, coloured by its choice."""
    given = page()
    tags = read(render(given))
    for each in given.layers:
        (row,) = (row for row in rows(tags) if row and row[0].startswith(f"{each.part}/{each.name}"))
        assert row[2:4] == [f"{each.params:,}", each.choice]
        assert ("and 2 more that share its weights" in row[0]) == (each.sharing == 3)
        titles = [
            tag.text for tag in tags if tag.name == "title" and tag.text.startswith(f"{each.name}: {each.choice}")
        ]
        assert len(titles) == 1
    assert sum(tag.name == "svg" and "strip" in tag.classes for tag in tags) == 2


def test_empty_sections_are_left_out() -> None:
    """What was not measured has no heading and no tile."""
    bare = page(
        milliseconds=None, pictures=(), texts=(), rivals={}, gates=(), layers=(), points=(), lists=(), probed=()
    )
    tags = read(render(bare))
    heads = {tag.text for tag in tags if tag.name in ("h2", "h3")}
    assert not heads & {"On held-out texts", "Gates", "Before and after, on held-out requests"}
    assert not any(tag.name in ("img", "details", "path") for tag in tags)
    assert "time of one generation" not in tags[0].text


def test_pictures_lie_within_the_page() -> None:
    """Both sides of each, as data, with their sizes; small ones are not smoothed."""
    images = [tag for tag in read(render(page())) if tag.name == "img"]
    assert [tag.attributes["src"] for tag in images] == [PIXEL] * 4
    assert [tag.attributes["width"] for tag in images] == ["64", "64", "512", "512"]
    assert [tag.classes for tag in images] == [{"small"}, {"small"}, set(), set()]
    assert [tag.attributes["alt"] for tag in images[:2]] == ["a cat, before", "a cat, after"]


def test_every_choice_has_a_colour() -> None:
    """A class of the style sheet, light and dark, another for each."""
    style = next(tag.text for tag in read(render(page())) if tag.name == "style")
    classes = [colour(name) for name in CHOICES]
    assert len(set(classes)) == len(CHOICES)
    for each in classes:
        assert f".{each} {{ --tone: var(--{each}); }}" in style
        assert style.count(f"--{each}: #") == 2
    assert colour("no choice") not in classes


def test_names_are_only_names() -> None:
    """Markup, quotes and braces in whatever comes from a model or a user read as they were written."""
    every = page(
        title=HOSTILE,
        facts=((HOSTILE, HOSTILE),),
        errors=[ErrorRow("content", 0.1, 0.1, 1.0)],
        gates=[(HOSTILE, 1.0, 2.0)],
        parts=[Part(HOSTILE, 1, 1.0, (1.0, 1.0), kernels=HOSTILE)],
        layers=[layer(0, HOSTILE, HOSTILE, role=HOSTILE), layer(1, "other")],
        points=[*page().points, Point("uniform", HOSTILE, 3e7, {"content": 0.5, "quality": 0.5})],
        probed=[Probed(HOSTILE, HOSTILE, 1, {})],
        pictures=[Pair(HOSTILE, PIXEL, PIXEL, 8, 8, 1.0, 1.0)],
        texts=[(HOSTILE, HOSTILE, HOSTILE)],
        lists=[(HOSTILE, [HOSTILE])],
    )
    text = render(every)
    tags = read(text)
    assert outside(tags) == []
    assert "<script" not in text
    assert "<b>x</b>" not in text
    assert "49" not in {cell for row in rows(tags) for cell in row}
    assert tags[0].text.count(HOSTILE) >= 18
    assert [tag.attributes["alt"] for tag in tags if tag.name == "img"] == [f"{HOSTILE}, before", f"{HOSTILE}, after"]


# --------------------------------------------------------------------------------------------------- drawings


def marks(drawing: Markup, name: str) -> list[Tag]:
    """Elements of a drawing."""
    return [tag for tag in read(str(drawing)) if tag.name == name]


def test_a_strip_is_as_wide_as_its_weights() -> None:
    """Rectangles one after another from 0 to 1000; a unit of few weights is still seen."""
    found = marks(strip([layer(0, params=10), layer(1, params=10**6), layer(2, params=3 * 10**6)]), "rect")
    at = 0.0
    for tag in found:
        assert float(tag.attributes["x"]) == pytest.approx(at, abs=0.02)
        at += float(tag.attributes["width"])
    assert at == pytest.approx(1000, abs=0.05)
    first, second, third = (float(tag.attributes["width"]) for tag in found)
    assert first > 1
    assert third / second == pytest.approx(3, rel=0.01)


SIZES = st.floats(1, 1e12)
ERRORS = st.floats(0, 1e6) | st.just(5e-324)
POINTS = st.lists(
    st.builds(
        Point,
        st.sampled_from(["front", "uniform", "plan"]),
        st.sampled_from(["", "w8a8", "this plan"]),
        SIZES,
        st.fixed_dictionaries({"content": ERRORS}),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(points=POINTS)
def test_any_front_lies_within_its_frame(points: list[Point]) -> None:
    """Finite places inside the plot, one mark for each plan with an error, whatever sizes and errors are."""
    drawing = front(points, "content")
    shown = [point for point in points if point.errors["content"] > 0]
    assert bool(drawing) == bool(shown)
    placed = marks(drawing, "rect") if drawing else []
    assert len(placed) == len(shown)
    assert is_finite(drawn_numbers(read(str(drawing)))) if drawing else True
    for tag in placed:
        assert 0 <= float(tag.attributes["x"]) + 6 <= WIDE + 6
        assert 0 <= float(tag.attributes["y"]) + 6 <= HIGH


@settings(max_examples=60, deadline=None)
@given(values=st.lists(ERRORS, min_size=1, max_size=8))
def test_any_sensitivities_lie_within_their_frame(values: list[float]) -> None:
    """A dot for each error above 0, and a rim for each chosen one."""
    given = [layer(0, choice="w8a8", errors={"content": {"fp32": 0.0, "w8a8": value}}) for value in values]
    drawing = sensitivity(given, "content", ("fp32", "w8a8"))
    positive = sum(value > 0 for value in values)
    assert bool(drawing) == bool(positive)
    if drawing:
        paths = {frozenset(tag.classes): tag.attributes["d"] for tag in marks(drawing, "path")}
        assert paths[frozenset({"ring"})].count("M") == positive
        assert paths[frozenset({"dot", colour("w8a8")})].count("M") == positive
        ys = numbers(paths[frozenset({"ring"})].replace("h0", " ").replace("M", " "))[1::2]
        assert all(0 <= y <= HIGH for y in ys)


def test_more_bytes_lie_to_the_right_and_more_error_above() -> None:
    """Of two plans, as axes say."""
    points = [
        Point("front", "", 1e6, {"content": 0.1}),
        Point("front", "", 2e6, {"content": 0.001}),
        Point("plan", "this plan", 3e6, {"content": 1e-5}),
    ]
    places = [
        (float(tag.attributes["x"]), float(tag.attributes["y"])) for tag in marks(front(points, "content"), "rect")
    ]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert [y for _, y in places] == sorted(y for _, y in places)


@pytest.mark.parametrize(("low", "high", "ends"), [(0.002, 0.5, (-3, 0)), (1.0, 1.0, (0, 1)), (0.02, 30, (-2, 2))])
def test_an_axis_has_whole_decades(low: float, high: float, ends: tuple[int, int]) -> None:
    """One at least, and as many marks as can be read."""
    axis = Decades(low, high)
    assert axis.ends == ends
    assert axis.place(10.0 ** ends[1]) < axis.place(10.0 ** ends[0])
    assert list(axis.marks()) == list(range(ends[0], ends[1] + 1))
    assert len(list(Decades(1e-30, 1.0).marks())) <= 9


# --------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("count", "told"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2.5e6, "2.5 MB"), (1.234e9, "1.2 GB")]
)
def test_sizes(count: float, told: str) -> None:
    """As people read them."""
    assert size(count) == told


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "-"),
        (math.nan, "-"),
        (math.inf, "∞"),
        (0.0, "0"),
        (0.012345, "0.0123"),
        (999.4, "999"),
        (12345.6, "12,346"),
    ],
)
def test_figures(value: float | None, told: str) -> None:
    """Three digits, all of a large number, a dash where there is none."""
    assert figure(value) == told


@pytest.mark.parametrize(
    ("pair", "told"),
    [((4.0, 1.0), "4.00x smaller"), ((1.0, 2.0), "2.00x larger"), ((1.0, 0.0), "-"), ((0.0, 1.0), "-")],
)
def test_ratios(pair: tuple[float, float], told: str) -> None:
    """Less or more, never a share below one."""
    assert times(pair, "smaller", "larger") == told
