"""The report of a plan as one page that needs nothing else: plain data in, HTML and SVG out.

Whatever comes from a model (names of layers, prompts, notes) is escaped on its way, in the template by jinja2 and in
drawings by `Markup.format`. Colours are classes, so that the page's style sheet gives them for light and for dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

import jinja2
from markupsafe import Markup

from edgekit.quant.choices import CHOICES

TEMPLATE = "report.html.jinja"
WIDE, HIGH = 720, 300  # of a plot, in units of its own
LEFT, RIGHT, TOP, BOTTOM = 52, 30, 12, 34
THINNEST = 0.002  # of a strip, a unit of few bytes keeps this much, so that it is seen at all
LINE = 13  # between labels


@dataclass(frozen=True)
class Layer:
    """One unit, or several that share their weights.

    Attributes:
        part, name, role, params: as the study has them; `sharing` counts the units.
        choice: what it became; None where there is no such choice for it.
        bytes, milliseconds: at that choice.
        errors: by metric, by choice: of this one alone.
        shares: by metric, what of the plan's predicted error is this one's, from 0 to 1.
    """

    part: str
    name: str
    role: str
    params: int
    sharing: int
    choice: str
    bytes: float
    milliseconds: float
    errors: Mapping[str, Mapping[str, float]]
    shares: Mapping[str, float]


@dataclass(frozen=True)
class Point:
    """One plan on the plane of size and error; `kind` is `front`, `uniform` or `plan`."""

    kind: str
    label: str
    bytes: float
    errors: Mapping[str, float]


@dataclass(frozen=True)
class Pair:
    """A picture before and after, as data URIs."""

    label: str
    before: str
    after: str
    width: int
    height: int
    psnr: float
    ssim: float


@dataclass(frozen=True)
class Part:
    """One graph: bytes before and after, milliseconds of one run before and after with their spreads, its kernels."""

    name: str
    units: int
    runs: float
    bytes: tuple[float, float]
    milliseconds: tuple[float, float] | None = None
    spread: tuple[float, float] | None = None
    kernels: str = ""


@dataclass(frozen=True)
class ErrorRow:
    """One metric: what the sum over units predicts, what the graphs gave, what was allowed."""

    metric: str
    predicted: float | None
    measured: float | None
    cap: float


@dataclass(frozen=True)
class Probed:
    """How one part's sensitivity was measured, and the rank correlation of probes and trials, by metric."""

    part: str
    method: str
    trials: int
    agreement: Mapping[str, float]


@dataclass(frozen=True)
class Page:
    """Everything the report says.

    Attributes:
        title: task and family.
        facts: label and value, for the head.
        size, milliseconds: of the bundle and of one generation, before and after.
        bits: mean bits of a planned weight, scales included.
        choices: those of the study, most accurate first.
        counts: units by choice.
        gates: what, value, limit.
        rivals: by name of one choice for everything, measured errors by metric.
        texts: what, before, after; of a language model.
        lists: heading and entries of whatever else is to be said.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    size: tuple[float, float]
    milliseconds: tuple[float, float] | None
    bits: float
    choices: Sequence[str]
    counts: Mapping[str, int]
    metrics: Sequence[str]
    errors: Sequence[ErrorRow]
    gates: Sequence[tuple[str, float, float]]
    parts: Sequence[Part]
    layers: Sequence[Layer]
    points: Sequence[Point]
    rivals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    probed: Sequence[Probed] = ()
    pictures: Sequence[Pair] = ()
    texts: Sequence[tuple[str, str, str]] = ()
    lists: Sequence[tuple[str, Sequence[str]]] = ()


def render(page: Page) -> str:
    """The whole page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"size": size, "figure": figure, "times": times, "colour": colour}
    template = environment.from_string(resources.files("edgekit.quant").joinpath(TEMPLATE).read_text("utf-8"))
    names = list(dict.fromkeys(layer.part for layer in page.layers))
    largest = {name: max((layer.shares[name] for layer in page.layers), default=0.0) or 1.0 for name in page.metrics}
    strips = {name: strip([layer for layer in page.layers if layer.part == name]) for name in names}
    return template.render(
        page=page,
        strips=strips,
        largest=largest,
        harm={name: sensitivity(page.layers, name, page.choices) for name in page.metrics},
        fronts={name: front(page.points, name) for name in page.metrics},
        colours=[(name, f"c{number}") for number, name in enumerate(CHOICES)],
    )


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def figure(value: float | None) -> str:
    """Three digits, or all of a large number; a dash where there is none."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def times(pair: tuple[float, float], less: str, more: str) -> str:
    """How many times (before, after) became less or more: `3.2x smaller`."""
    before, after = pair
    if min(before, after) <= 0:
        return "-"
    ratio = before / after
    return f"{ratio:.2f}x {less}" if ratio >= 1 else f"{1 / ratio:.2f}x {more}"


def colour(choice: str) -> str:
    """The class that colours a choice."""
    return f"c{list(CHOICES).index(choice)}" if choice in CHOICES else "c-none"


def strip(layers: Sequence[Layer]) -> Markup:
    """All units of a part in the order they run, as wide as they have weights, coloured by their choice."""
    whole = sum(layer.params for layer in layers) or 1
    widths = [max(layer.params / whole, THINNEST) for layer in layers]
    scale = 1000 / sum(widths)
    cells, at = [], 0.0
    for layer, width in zip(layers, widths, strict=True):
        told = f"{layer.name}: {layer.choice}, {size(layer.bytes)}"
        cell = Markup('<rect class="{}" x="{:.2f}" y="0" width="{:.2f}" height="24"><title>{}</title></rect>')
        cells.append(cell.format(colour(layer.choice), at, scale * width, told))
        at += scale * width
    head = Markup('<svg class="strip" viewBox="0 0 1000 24" preserveAspectRatio="none" role="img" aria-label="{}">')
    return head.format("choices in execution order") + Markup("").join(cells) + Markup("</svg>")


def sensitivity(layers: Sequence[Layer], metric: str, choices: Sequence[str]) -> Markup:
    """The error that each unit alone makes at each choice, on a logarithmic scale; the chosen ones are ringed."""
    every = [value for layer in layers for value in layer.errors[metric].values() if value > 0]
    if not every:
        return Markup("")
    y = Decades(min(every), max(every))
    x = [LEFT + (WIDE - LEFT - RIGHT) * (number + 0.5) / len(layers) for number in range(len(layers))]
    chosen = [
        (x[number], y.place(value))
        for number, layer in enumerate(layers)
        if (value := layer.errors[metric].get(layer.choice, 0.0)) > 0
    ]
    marks = [_dots("ring", chosen)]
    for name in choices:
        found = [(x[number], layer.errors[metric].get(name, 0.0)) for number, layer in enumerate(layers)]
        marks.append(_dots(f"dot {colour(name)}", [(at, y.place(value)) for at, value in found if value > 0]))
    return _plot(f"{metric} error of every unit alone, by choice", y, [*_divided(layers, x), *marks])


def front(points: Sequence[Point], metric: str) -> Markup:
    """Size against error: the plans that nothing beats, one choice for everything, and the plan that was made."""
    shown = [point for point in points if point.errors[metric] > 0]
    if not shown:
        return Markup("")
    y = Decades(min(point.errors[metric] for point in shown), max(point.errors[metric] for point in shown))
    low, high = (pick(point.bytes for point in shown) for pick in (min, max))
    step = _step(max(high - low, high * 0.05, 1.0))
    first, last = math.floor(low / step) * step, math.ceil(high / step) * step
    if first == last:
        last += step

    def place(point: Point) -> tuple[float, float]:
        return LEFT + (WIDE - LEFT - RIGHT) * (point.bytes - first) / (last - first), y.place(point.errors[metric])

    line = [place(point) for point in shown if point.kind == "front"]
    marks = [
        Markup('<path class="line" d="{}"/>').format("L".join(f"{a:.1f} {b:.1f}" for a, b in line).join(("M", "")))
    ]
    marks = marks if len(line) > 1 else []
    marks += [_ticks(first, last, step)]
    marks += _labels([(point, *place(point)) for point in shown if point.label])
    marks += [_mark(point, *place(point)) for point in shown]
    return _plot(f"bytes of the bundle against {metric} error", y, marks)


@dataclass(frozen=True)
class Decades:
    """A logarithmic axis from `low` to `high`, both positive, in whole decades."""

    low: float
    high: float

    @property
    def ends(self) -> tuple[int, int]:
        """Powers of ten that it begins and ends with."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        return first, max(last, first + 1)

    def place(self, value: float) -> float:
        """Where a value lies, from the top."""
        return self.place_of_power(math.log10(value))

    def place_of_power(self, power: float) -> float:
        """Where a power of ten lies; itself, it may be too small for a number."""
        first, last = self.ends
        return TOP + (HIGH - TOP - BOTTOM) * (last - power) / (last - first)

    def marks(self) -> Iterator[int]:
        """Powers of ten that are written, nine at most."""
        first, last = self.ends
        yield from range(first, last + 1, max(1, math.ceil((last - first) / 8)))


def _plot(title: str, y: Decades, marks: Sequence[Markup]) -> Markup:
    head = Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDE, HIGH, title)
    rule = Markup('<line class="grid" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>')
    text = Markup('<text class="end" x="{}" y="{:.1f}">10<tspan dy="-5">{}</tspan></text>')
    powers = [(power, y.place_of_power(power)) for power in y.marks()]
    grid = [rule.format(LEFT, WIDE - RIGHT, at) + text.format(LEFT - 6, at + 4, power) for power, at in powers]
    return head + Markup("").join([*grid, *marks]) + Markup("</svg>")


def _dots(classes: str, places: Sequence[tuple[float, float]]) -> Markup:
    """Round dots of one colour as one path: a hundredth of the size of as many circles."""
    if not places:
        return Markup("")
    return Markup('<path class="{}" d="{}"/>').format(classes, "".join(f"M{a:.1f} {b:.1f}h0" for a, b in places))


def _divided(layers: Sequence[Layer], x: Sequence[float]) -> Iterator[Markup]:
    """The name of every part where it begins, by turns on two lines, and a rule before all but the first."""
    starts = [at for at in range(len(layers)) if not at or layers[at - 1].part != layers[at].part]
    rule = Markup('<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>')
    for turn, at in enumerate(starts):
        edge = (x[at - 1] + x[at]) / 2 if at else LEFT
        last = at == starts[-1] and WIDE - edge < 7 * len(layers[at].part)
        if at:
            yield rule.format(edge, TOP, HIGH - BOTTOM + 14 * (turn % 2))
        yield Markup('<text class="{}" x="{:.1f}" y="{}">{}</text>').format(
            "end" if last else "", WIDE if last else edge + 3, HIGH - BOTTOM + 13 + 14 * (turn % 2), layers[at].part
        )


def _ticks(first: float, last: float, step: float) -> Markup:
    found = []
    for number in range(round((last - first) / step) + 1):
        value = first + number * step
        at = LEFT + (WIDE - LEFT - RIGHT) * (value - first) / (last - first)
        found.append(
            Markup('<text class="middle" x="{:.1f}" y="{}">{}</text>').format(at, HIGH - BOTTOM + 14, size(value))
        )
    return Markup("").join(found)


def _step(span: float) -> float:
    """1, 2 or 5 times a power of ten, of which four to ten make up the span."""
    power = 10.0 ** math.floor(math.log10(span / 4))
    return next(power * factor for factor in (5, 2, 1) if span / (power * factor) >= 4)


def _mark(point: Point, x: float, y: float) -> Markup:
    told = f"{point.label or 'best at this size'}: {size(point.bytes)}, " + ", ".join(
        f"{name} {figure(value)}" for name, value in point.errors.items()
    )
    classes = f"uniform {colour(point.label)}" if point.kind == "uniform" else point.kind
    half = 6 if point.kind == "plan" else 4
    turn = f"rotate(45 {x:.1f} {y:.1f})" if point.kind == "plan" else ""
    round_by = half if point.kind == "front" else 0
    return Markup(
        '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{}" height="{}" rx="{}" transform="{}"><title>{}</title></rect>'
    ).format(classes, x - half, y - half, 2 * half, 2 * half, round_by, turn, told)


def _labels(placed: Sequence[tuple[Point, float, float]]) -> Iterator[Markup]:
    """Labels beside their marks, those that would lie on another moved down."""
    taken: list[tuple[float, float, float]] = []
    for point, x, y in sorted(placed, key=lambda each: each[2]):
        width = 7.0 * len(point.label)
        turns = x + 10 + width > WIDE
        begin = x - 10 - width if turns else x + 10
        at = y + 4
        while any(begin < right and begin + width > left and abs(at - other) < LINE for left, right, other in taken):
            at += 1
        taken.append((begin, begin + width, at))
        yield Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(
            ("end " if turns else "") + ("strong" if point.kind == "plan" else ""),
            x - 10 if turns else x + 10,
            at,
            point.label,
        )
