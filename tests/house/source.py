"""The repository as text and syntax trees; nothing here imports or runs what it looks at."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "edgekit"
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """One import statement: who, what, on which line, and whether it runs when the module is imported."""

    importer: str
    imported: str
    line: int
    on_load: bool


@cache
def modules() -> dict[str, Path]:
    """Module name -> file, for the whole package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    """A parsed file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def lines(path: Path) -> int:
    """Physical lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def functions(path: Path) -> list[Function]:
    """Every function and method of a file, nested ones included."""
    return [node for node in ast.walk(tree(path)) if isinstance(node, Function)]


def length(function: Function) -> int:
    """Lines from `def` to the end, docstring included, decorators not."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


@cache
def imports() -> tuple[Import, ...]:
    """Every import of the package, those for type checkers alone left out."""
    return tuple(found for name, path in modules().items() for found in _imports(name, tree(path), on_load=True))


def _imports(importer: str, node: ast.AST, *, on_load: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _imports(importer, other, on_load=on_load)
        elif isinstance(child, ast.Import):
            yield from (Import(importer, alias.name, child.lineno, on_load) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (Import(importer, name, child.lineno, on_load) for name in _named(child))
        else:
            inside = isinstance(child, Function | ast.Lambda)
            yield from _imports(importer, child, on_load=on_load and not inside)


def _named(node: ast.ImportFrom) -> list[str]:
    """`from a import b` imports the module a.b if there is one, else a."""
    base = node.module or ""
    return [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base for alias in node.names]


def is_public(name: str) -> bool:
    """By convention, a leading underscore is private."""
    return not name.startswith("_")


def public_nodes(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Public functions and classes, and the public methods of public classes, by dotted name."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and is_public(node.name):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public_nodes(node.body, f"{prefix}{node.name}.")


@cache
def repository_files() -> tuple[Path, ...]:
    """Tracked files, and untracked ones that are not ignored; all files of a checkout without git."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listing.returncode:
        return tuple(sorted(path for path in ROOT.rglob("*") if path.is_file() and ".git" not in path.parts))
    names = sorted({name.decode() for name in listing.stdout.split(b"\0") if name})
    return tuple(ROOT / name for name in names if (ROOT / name).is_file())
