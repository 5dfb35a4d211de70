"""Reading a page as a browser does: its tags in pairs, its words, its tables, its numbers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "hr", "input", "link"}
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|inf", re.IGNORECASE)
PLACED = ("x", "y", "x1", "x2", "y1", "y2", "width", "height", "rx", "d", "viewbox", "transform", "dy")
DRAWN = {"svg", "rect", "path", "line", "text", "tspan"}


@dataclass
class Tag:
    """One element: its attributes, and all the words within."""

    name: str
    attributes: dict[str, str]
    inside: tuple[str, ...]
    text: str = ""

    @property
    def classes(self) -> set[str]:
        """Of its class attribute."""
        return set(self.attributes.get("class", "").split())


@dataclass
class Reader(HTMLParser):
    """Every element of a page, in order; fails on an end tag that ends something else."""

    tags: list[Tag] = field(default_factory=list)
    open: list[Tag] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"<{tag}> has an attribute twice"
        made = Tag(tag, {name: value or "" for name, value in attrs}, tuple(each.name for each in self.open))
        self.tags.append(made)
        if tag not in VOID:
            self.open.append(made)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> ends nothing"
        assert self.open[-1].name == tag, f"</{tag}> ends <{self.open[-1].name}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for each in self.open:
            each.text += data


def read(page: str) -> list[Tag]:
    """All elements of a page whose tags come in pairs."""
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader.tags


def numbers(text: str) -> list[float]:
    """All that look like numbers, `nan` and `inf` among them."""
    return [float(each) for each in NUMBER.findall(text)]


def drawn_numbers(tags: list[Tag]) -> list[float]:
    """Of all drawings: every coordinate."""
    return [
        number
        for tag in tags
        if tag.name in DRAWN
        for name, value in tag.attributes.items()
        if name in PLACED
        for number in numbers(value)
    ]


def is_finite(values: list[float]) -> bool:
    """Whether all are."""
    return all(math.isfinite(value) for value in values)


def outside(tags: list[Tag]) -> list[str]:
    """Whatever makes a browser ask for something beyond the page itself."""
    found = [tag.name for tag in tags if tag.name in ("script", "link", "iframe", "object", "embed", "base", "form")]
    for tag in tags:
        for name, value in tag.attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "action", "data") and not value.startswith("data:"):
                found.append(value)
            if name.startswith("on"):
                found.append(f"{name}={value}")
        if tag.name == "style" and re.search(r"url\(|@import|https?:", tag.text):
            found.append(tag.text)
    return found


def rows(tags: list[Tag]) -> list[list[str]]:
    """Rows of all tables, cells as they read."""
    found: list[list[str]] = []
    for tag in tags:
        if tag.name == "tr":
            found.append([])
        elif tag.name in ("td", "th"):
            found[-1].append(" ".join(tag.text.split()))
    return found
