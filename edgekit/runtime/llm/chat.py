"""Chat templates: jinja2 from a bundle is somebody else's program, so it runs in a sandbox with a budget.

What templates may use is what transformers gives them: `raise_exception`, `strftime_now`, an unescaped `tojson`, loop
controls, `{% generation %}` blocks, and the variables `messages`, `add_generation_prompt`, `bos_token` and the like.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgekit.errors import BadManifest, BadRequest

CALLS = 100_000  # calls and range() elements of one rendering, together
LONGEST = 1 << 22  # characters of one rendering, and of any product or power inside it


class ChatTemplate:
    """A compiled template.

    Raises:
        BadManifest: the template has a syntax error.
    """

    def __init__(self, source: str) -> None:
        self._sandbox = _Sandbox()
        try:
            self._template = self._sandbox.from_string(source)
        except (jinja2.TemplateSyntaxError, RecursionError) as why:
            raise BadManifest(f"the chat template does not parse: {why}") from why

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        special: Mapping[str, str] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt of a conversation.

        Args:
            messages: `{"role": ..., "content": ...}`, oldest first.
            special: `bos_token`, `eos_token` and the like, as text.
            add_generation_prompt: end where the assistant's answer begins.

        Raises:
            BadManifest: the template reached out of its sandbox or over its budget.
            BadRequest: it does not accept these messages; in its own words.
        """
        self._sandbox.left = CALLS
        variables = {"tools": None, "documents": None, **(special or {})}
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(
                messages=json.loads(json.dumps(list(messages))),  # plain data: nothing of ours to reach through
                add_generation_prompt=add_generation_prompt,
                **variables,
            ):
                pieces.append(piece)
                size += len(piece)
                if size > LONGEST:
                    raise SecurityError(f"it wrote more than {LONGEST:,} characters")
        except (SecurityError, OverflowError, RecursionError, MemoryError) as why:
            raise BadManifest(f"the chat template was stopped: {why}. Do not trust this bundle.") from why
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError) as why:
            raise BadRequest(f"the chat template does not accept these messages: {why}") from why
        return "".join(pieces)


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, loud: what it would quietly leave undefined raises, and work is counted."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.left = CALLS
        self.filters["tojson"] = _tojson
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, dict=dict, range=self._range, lipsum=None
        )

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """An attribute the sandbox forbids."""
        raise SecurityError(f"it reached for {attribute!r} of a {type(obj).__name__}")

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Any call a template makes."""
        self._spend(1)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Operators whose result could be of any size: repeat, join, power and padded formatting."""
        a, b = _size(left), _size(right)
        plain = isinstance(left, (int, float)) and isinstance(right, (int, float))
        huge = {
            "+": not plain and a + b > LONGEST,
            "*": (a * b > LONGEST) if not plain else max(a, b) > 1 << 64,
            "**": max(a, b) > 64,
            "%": isinstance(left, str) and re.search(r"%[^a-zA-Z%]*(\d{5}|\*)", left) is not None,
        }
        if huge[operator]:
            raise SecurityError(f"it asked for a {operator} of sizes {a} and {b}")
        return super().call_binop(context, operator, left, right)

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self._spend(len(numbers))
        return numbers

    def _spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise SecurityError(f"it made more than {CALLS:,} calls and loop turns")


def _size(value: Any) -> float:
    """Elements of a sequence, magnitude of a number, 0 of anything else."""
    if isinstance(value, (str, list, tuple)):
        return len(value)
    return abs(value) if isinstance(value, (int, float)) else 0


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's declaration)

    def parse(self, parser: Any) -> Any:
        """The block's statements."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
