"""`--budget` and `--metric-cap`: what is written is what is limited, and nothing else is taken for a limit."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from edgekit.errors import BadRequest
from edgekit.quant.budget import UNITS, Budget, parse_budget

FIELDS = {"bits": "bits", "bit": "bits", "ms": "milliseconds", "x": "times"} | dict.fromkeys(UNITS, "bytes")
NUMBERS = st.decimals(min_value="0.001", max_value=10**9, places=3, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("300MB", Budget(bytes=3e8)),
        ("1.5 GB", Budget(bytes=1.5e9)),
        ("64KiB", Budget(bytes=65536.0)),
        ("2mib", Budget(bytes=2.0 * 2**20)),
        ("1gib", Budget(bytes=2.0**30)),
        ("8kb", Budget(bytes=8000.0)),
        (" 4.5bits ", Budget(bits=4.5)),
        ("1bit", Budget(bits=1.0)),
        ("20ms", Budget(milliseconds=20.0)),
        ("0.6x", Budget(times=0.6)),
    ],
)
def test_a_limit_is_read(text: str, expected: Budget) -> None:
    """Sizes in both kinds of thousands, bits, times and shares, in either case, blanks around them."""
    assert parse_budget([text]) == expected


def test_limits_of_several_kinds_stand_together() -> None:
    """A size, bits, a time and a share at once, and caps by metric."""
    asked = parse_budget(["1MB", "4bits", "20ms", "0.5x"], ["content=0.01", "kl=1e-3"])
    assert asked == Budget(1e6, 4.0, 20.0, 0.5, {"content": 0.01, "kl": 0.001})
    assert asked.limits_size
    assert asked.limits_time


@pytest.mark.parametrize(
    ("texts", "size", "time"),
    [
        ((), False, False),
        (("1MB",), True, False),
        (("3bits",), True, False),
        (("3ms",), False, True),
        (("0.5x",), False, True),
    ],
)
def test_a_budget_knows_what_it_limits(texts: tuple[str, ...], size: bool, time: bool) -> None:
    """Size by bytes or bits, time by milliseconds or a share; a cap limits neither."""
    asked = parse_budget(texts, ["content=1"])
    assert (asked.limits_size, asked.limits_time) == (size, time)


@settings(max_examples=200, deadline=None)
@given(number=NUMBERS, unit=st.sampled_from(sorted(FIELDS)), capitals=st.booleans(), gap=st.sampled_from(["", " "]))
def test_any_number_of_any_unit(number: object, unit: str, capitals: bool, gap: str) -> None:
    """Only the unit's own field is set, to the number times the unit."""
    asked = parse_budget([f"{number}{gap}{unit.upper() if capitals else unit}"])
    wanted = float(str(number)) * UNITS.get(unit, 1.0)
    assert asked == Budget(**{FIELDS[unit]: wanted})


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="0123456789.-+eExXmMbBsSiItTgGkK ", max_size=8))
def test_whatever_is_typed_is_a_limit_or_refused(text: str) -> None:
    """One positive, finite limit, or BadRequest that repeats what was typed."""
    asked, said = None, repr(text)
    try:
        asked = parse_budget([text])
    except BadRequest as why:
        said = str(why)
    assert repr(text) in said
    if asked is not None:
        limits = [asked.bytes, asked.bits, asked.milliseconds, asked.times]
        (one,) = (limit for limit in limits if limit is not None)
        assert 0 < one < math.inf


@pytest.mark.parametrize(
    "text", ["", "300", "MB", "-3MB", "0MB", "0.0bits", "3 bananas", "1,5GB", "1e3MB", "300MB!", f"{'9' * 400}MB"]
)
def test_what_is_no_limit_is_refused(text: str) -> None:
    """No number, no unit, a number that limits nothing: the message shows what could be meant."""
    with pytest.raises(BadRequest, match=r"300MB.*4\.5bits.*20ms.*0\.6x"):
        parse_budget([text])


@pytest.mark.parametrize("texts", [("1MB", "2GB"), ("1KiB", "1kb"), ("4bits", "3bit"), ("1ms", "2ms"), ("1x", "0.5x")])
def test_a_kind_is_limited_once(texts: tuple[str, str]) -> None:
    """Two sizes contradict each other, whatever their units."""
    with pytest.raises(BadRequest, match="limited twice"):
        parse_budget(texts)


def test_a_metric_is_capped_once() -> None:
    """The second cap of a metric is refused like the second limit of a kind."""
    with pytest.raises(BadRequest, match="content is limited twice"):
        parse_budget([], ["content=0.1", "quality=0.1", "content=0.2"])


@pytest.mark.parametrize("text", ["content", "=1", "content=", "content=0", "content=-1", "content=nan", "content=inf"])
def test_what_is_no_cap_is_refused(text: str) -> None:
    """A cap has a name and a positive, finite number."""
    with pytest.raises(BadRequest, match=r"NAME=NUMBER, such as content=0\.01"):
        parse_budget([], [text])
