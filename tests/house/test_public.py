"""What others may call is typed and explained; every test says what it shows."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

from edgekit import errors
from tests.house.source import ROOT, Function, is_public, modules, public_nodes, tree

PUBLIC = {name: path for name, path in modules().items() if not any(part[0] == "_" for part in name.split("."))}
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def untyped(function: Function) -> list[str]:
    """Arguments without an annotation, `self` and `cls` aside, and `return`."""
    rows = function.args
    given = [*rows.posonlyargs, *rows.args, *rows.kwonlyargs, *filter(None, (rows.vararg, rows.kwarg))]
    missing = [row.arg for row in given if row.annotation is None and row.arg not in ("self", "cls")]
    return missing if function.returns is not None else [*missing, "return"]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_docstrings(name: str) -> None:
    """Every module, and every public class, function and method that is not an overload, says what it is for."""
    module = tree(PUBLIC[name])
    assert ast.get_docstring(module), f"{name} has no docstring"
    bare = [
        dotted
        for dotted, node in public_nodes(module.body)
        if not ast.get_docstring(node) and not any(ast.unparse(d).endswith("overload") for d in node.decorator_list)
    ]
    assert bare == []


@pytest.mark.parametrize("name", PUBLIC)
def test_public_arguments_are_typed(name: str) -> None:
    """Every argument and result of public functions and methods has a type."""
    nodes = [(dotted, node) for dotted, node in public_nodes(tree(PUBLIC[name]).body) if isinstance(node, Function)]
    assert {dotted: untyped(node) for dotted, node in nodes if untyped(node)} == {}


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_test_says_what_it_shows(path: Path) -> None:
    """A sentence, with its full stop, under every test."""
    tests = [n for n in ast.walk(tree(path)) if isinstance(n, Function) and n.name.startswith("test_")]
    mute = [
        node.name for node in tests if not re.search(r"[.!?]\W*$", (ast.get_docstring(node) or "").split("\n\n")[0])
    ]
    assert mute == []


def test_test_files_have_unique_names() -> None:
    """One name, one file: a failure is found without its folder."""
    names = [path.name for path in TESTS]
    assert sorted({name for name in names if names.count(name) > 1}) == []


# --------------------------------------------------------------------------------------------------- errors

CLASSES = {
    name: value for name, value in inspect.getmembers(errors, inspect.isclass) if value.__module__ == errors.__name__
}
DRAWN_ROW = re.compile(r"^(?P<indent> *)(?P<names>[A-Z]\w+(?:, [A-Z]\w+)*) {2,}(?P<code>\d+)? *(?P<words>\S.*)$")


def drawn() -> dict[str, tuple[str | None, int | None]]:
    """Class -> (class above it, exit code if drawn), read off the tree in the module's docstring."""
    above: list[tuple[int, str]] = []
    found: dict[str, tuple[str | None, int | None]] = {}
    for line in (errors.__doc__ or "").splitlines():
        row = DRAWN_ROW.match(line)
        if row is None:
            continue
        indent = len(row["indent"])
        above = [(depth, name) for depth, name in above if depth < indent]
        for name in row["names"].split(", "):
            found[name] = (above[-1][1] if above else None, int(row["code"]) if row["code"] else None)
        above.append((indent, row["names"].split(", ")[-1]))
    return found


def test_every_error_is_drawn_where_it_stands() -> None:
    """The tree in the docstring is the tree in the code: names, places, nothing left out, nothing invented."""
    actual = {name: value.__mro__[1].__name__ if name != "EdgekitError" else None for name, value in CLASSES.items()}
    assert {name: parent for name, (parent, _) in drawn().items()} == actual


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_has_the_exit_code_drawn(name: str) -> None:
    """A class has its own drawn code, or that of the class above it."""
    tree_ = drawn()
    at: str | None = name
    while at is not None and tree_[at][1] is None:
        at = tree_[at][0]
    assert at is not None, f"no exit code is drawn at or above {name}"
    assert CLASSES[name].exit_code == tree_[at][1]


def test_every_error_is_raised_somewhere() -> None:
    """An error nobody raises is a promise nobody keeps; bases and the roots of a layer's errors only group others."""
    text = "\n".join(path.read_text(encoding="utf-8") for name, path in modules().items() if name != "edgekit.errors")
    leaves = [
        name
        for name, value in CLASSES.items()
        if not value.__subclasses__() and value.__base__ is not errors.EdgekitError
    ]
    assert [name for name in leaves if not re.search(rf"\b{name}\(", text)] == []


def test_exit_codes_are_documented() -> None:
    """0 to 6 and 130 stand in the command's own help, each with its word."""
    main = importlib.import_module("edgekit.cli")
    words = {
        0: "ok",
        1: "failure",
        2: "usage",
        3: "gate",
        4: "device",
        5: "integrity",
        6: "network",
        130: "interrupted",
    }
    help_text = " ".join(str(main.app.epilog).split())
    assert [code for code, word in words.items() if f"{code} {word}" not in help_text] == []
    assert {value.exit_code for value in CLASSES.values()} <= set(words)


def test_constructors_of_checked_values_stay_home() -> None:
    """A `Bundle` is made by the reader alone, so whoever holds one holds a checked one."""
    homes = {"Bundle": "edgekit.bundle.reader", "Draft": "edgekit.bundle.store"}
    strays = [
        (name, node.func.id)
        for name, path in modules().items()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and homes.get(node.func.id, name) != name
    ]
    assert strays == []


def test_private_names_are_told_from_public_ones() -> None:
    """The walk above sees methods, and skips what begins with an underscore."""
    body = ast.parse(
        "class A:\n def b(self): ...\n def _c(self): ...\nclass _D:\n def e(self): ...\ndef f(x): ..."
    ).body
    assert [name for name, _ in public_nodes(body)] == ["A", "A.b", "f"]
    assert is_public("x")
