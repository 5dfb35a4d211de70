"""Prompts for benchmarks/speculation.py: four kinds of text, ten of each, for a model that knows Python."""

from __future__ import annotations

PIECES = {
    "read_settings": (
        'def read_settings(path, encoding="utf-8"):\n'
        '    """Read settings from a file and return them as a dictionary."""\n'
        "    settings = {}\n"
        "    with open(path, encoding=encoding) as stream:\n"
        "        for line in stream:\n"
        '            name, value = line.strip().split("=", 1)\n'
        "            settings[name.strip()] = value.strip()\n"
        "    return settings\n"
    ),
    "Queue": (
        "class Queue:\n"
        "    def __init__(self, items=()):\n"
        "        self._items = list(items)\n"
        "        self._closed = False\n\n"
        "    def put(self, item):\n"
        "        if self._closed:\n"
        '            raise ValueError("the queue is closed")\n'
        "        self._items.append(item)\n\n"
        "    def get(self):\n"
        "        return self._items.pop(0)\n"
    ),
    "parse_version": (
        "def parse_version(text):\n"
        '    match = re.match(r"(\\d+)\\.(\\d+)\\.(\\d+)", text)\n'
        "    if match is None:\n"
        '        raise ValueError("not a version: %r" % text)\n'
        "    major, minor, patch = match.groups()\n"
        "    return int(major), int(minor), int(patch)\n"
    ),
    "walk_files": (
        "def walk_files(root, suffix):\n"
        "    for folder, folders, files in os.walk(root):\n"
        "        folders.sort()\n"
        "        for name in sorted(files):\n"
        "            if name.endswith(suffix):\n"
        "                yield os.path.join(folder, name)\n"
    ),
    "Response": (
        "class Response:\n"
        "    def __init__(self, status, headers, body):\n"
        "        self.status = status\n"
        "        self.headers = dict(headers)\n"
        "        self.body = body\n\n"
        "    @property\n"
        "    def content_type(self):\n"
        '        return self.headers.get("content-type", "text/plain")\n'
    ),
}
COPIES = ("# the original\n{0}\n# the same, once more\n{1}", "{0}\n\n# a copy of the above for the tests\n{1}")

NAMES = ("read_lines", "Session", "format_table", "find_package", "Parser")
DOCS = (
    '"""Tools for {0}.\n\nThis module provides',
    'def {0}(value, default=None):\n    """Return the',
)
CODE = (
    "import os\nimport sys\n\n\ndef {0}(path, encoding='utf-8'):\n    ",
    "class {0}Test(TestCase):\n    def setUp(self):\n        self.value = ",
)


def prompts() -> dict[str, tuple[str, ...]]:
    """By kind: `copy` repeats a text that stands in the prompt; `docs` is prose in docstrings; `code` is code."""
    copies = tuple(form.format(text, text.partition("\n")[0]) for form in COPIES for text in PIECES.values())
    return {
        "copy": copies,
        "docs": tuple(form.format(name) for form in DOCS for name in NAMES),
        "code": tuple(form.format(name) for form in CODE for name in NAMES),
    }
