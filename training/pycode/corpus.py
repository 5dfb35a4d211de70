"""Collect the training text: Python sources of the standard library and of a few permissively licensed wheels.

    python -m training.pycode.corpus --wheels WHEELS --out DATA

WHEELS holds the wheels named in `PACKAGES` (README.md says how to fetch them); nothing is downloaded here.
DATA receives `train.jsonl`, `heldout.jsonl`, `heldout_package.jsonl` (one `{"path", "text"}` per line, UTF-8)
and `sources.json` (versions, licences, files and bytes of what was kept).
"""

import argparse
import hashlib
import json
import platform
import re
import sysconfig
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES: dict[str, str] = {  # wheel name -> SPDX licence of its Python sources
    "aiohttp": "Apache-2.0 AND MIT", "attrs": "MIT", "black": "MIT", "bottle": "MIT", "celery": "BSD-3-Clause",
    "click": "BSD-3-Clause", "django": "BSD-3-Clause", "fastapi": "MIT", "flask": "BSD-3-Clause",
    "httpx": "BSD-3-Clause", "ipython": "BSD-3-Clause", "jinja2": "BSD-3-Clause", "more_itertools": "MIT",
    "mypy": "MIT", "pydantic": "MIT", "pygments": "BSD-2-Clause", "pytest": "MIT", "requests": "Apache-2.0",
    "rich": "MIT", "setuptools": "MIT", "sphinx": "BSD-2-Clause", "sqlalchemy": "MIT", "starlette": "BSD-3-Clause",
    "tornado": "Apache-2.0", "twisted": "MIT", "urllib3": "MIT", "werkzeug": "BSD-3-Clause",
}  # fmt: skip
HELD_OUT_PACKAGES = ("bottle", "attrs")  # never trained on
HELD_OUT_SHARE = 0.015  # of the files of every other source, chosen by a hash of their path

SKIPPED = re.compile(
    r"(^|/)(tests?|testing|idlelib|lib2to3|encodings|pydoc_data|site-packages|_?vendor(ed)?|_?extern(al)?s?|locale"
    r"|turtledemo|__pycache__|benchmarks|dist-info|typeshed|_generated|benchmark|conf/locale|lexers|lex_auto|mypyc"
    r"|_array_api_override|array_api_compat|cython_template)(/|$)"
    r"|(^|/)(test_[^/]*|[^/]*_test|conftest|_builtins|_mapping|_sysconfigdata[^/]*|.*_generated|parser_tables)\.py$"
    r"|\.dist-info/|\.data/"
)
MIN_BYTES, MAX_BYTES = 200, 250_000
MAX_LINE = 300  # characters; longer lines are data, not code
MAX_DIGITS = 0.12  # share of digits above which a file is a table


@dataclass(frozen=True)
class Source:
    """One origin of text: its name, version, licence and `(path, text)` files."""

    name: str
    version: str
    licence: str
    files: tuple[tuple[str, str], ...]


def is_code(path: str, text: str) -> bool:
    """Whether a file is hand-written Python: not a test, a table, generated, or indented by tabs."""
    if SKIPPED.search(path) or not MIN_BYTES <= len(text.encode()) <= MAX_BYTES:
        return False
    if "\n\t" in text or max(map(len, text.split("\n"))) > MAX_LINE:
        return False
    return sum(map(str.isdigit, text)) <= MAX_DIGITS * len(text)


def decoded(raw: bytes) -> str | None:
    """UTF-8 text with Unix newlines, or None when the bytes are not UTF-8."""
    try:
        return raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None


def standard_library() -> Source:
    """The `*.py` files of the running interpreter's standard library, docstrings included."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        text, name = decoded(path.read_bytes()), path.relative_to(root).as_posix()
        if text is not None and is_code(name, text):
            found.append((f"cpython/{name}", text))
    return Source("cpython", platform.python_version(), "PSF-2.0", tuple(found))


def read_wheel(wheel: Path) -> Source:
    """The Python files of one wheel; its name must be in `PACKAGES`."""
    name, version = wheel.name.split("-")[:2]
    found = []
    with zipfile.ZipFile(wheel) as archive:
        for path in sorted(archive.namelist()):
            text = decoded(archive.read(path)) if path.endswith(".py") else None
            if text is not None and is_code(path, text):
                found.append((f"{name}/{path}", text))
    return Source(name, version, PACKAGES[name], tuple(found))


def split_of(source: str, path: str) -> str:
    """`train`, `heldout` or `heldout_package`: a stable function of the file's path."""
    if source in HELD_OUT_PACKAGES:
        return "heldout_package"
    draw = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") / 2**32
    return "heldout" if draw < HELD_OUT_SHARE else "train"


def unseen(files: tuple[tuple[str, str], ...], seen: set[bytes]) -> Iterator[tuple[str, str]]:
    """The files whose text (by SHA-256) was not met before; `seen` grows."""
    for path, text in files:
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield path, text


def write_corpus(wheels: Path, out: Path) -> None:
    """Write the three splits and `sources.json` into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    sources = [standard_library()]
    sources += [read_wheel(wheel) for wheel in sorted(wheels.glob("*.whl")) if wheel.name.split("-")[0] in PACKAGES]
    splits: dict[str, list[str]] = {"train": [], "heldout": [], "heldout_package": []}
    record, seen = [], set[bytes]()
    for source in sources:
        nbytes = dict.fromkeys(splits, 0)
        count = 0
        for path, text in unseen(source.files, seen):
            split = split_of(source.name, path)
            splits[split].append(json.dumps({"path": path, "text": text}, ensure_ascii=False))
            nbytes[split] += len(text.encode())
            count += 1
        row = {"name": source.name, "version": source.version, "licence": source.licence, "files": count}
        record.append(row | {f"{split}_bytes": size for split, size in nbytes.items()})
    for split, lines in splits.items():
        (out / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "sources.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_split(path: Path) -> list[str]:
    """The texts of one split, in file order."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    write_corpus(arguments.wheels, arguments.out)
