"""Stop strings: nothing of one is ever shown, and chunking does not matter."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgekit.errors import BadRequest
from edgekit.runtime.llm.stop import StopStrings

letters = st.text("abc", max_size=24)
stops = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def cut(text: str, stops: list[str]) -> str:
    """The obvious twin: read letter by letter, cut where a stop string is first complete."""
    for end in range(len(text) + 1):
        done = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - max(done)]
    return text


@given(letters, stops, st.lists(st.integers(1, 5), min_size=1))
@example("aab", ["b", "aa"], [3])
@example("cab", ["b", "ab"], [3])
def test_text_is_cut_at_the_first_complete_stop_string(text, stops, sizes):
    """However the text is chunked, what comes out is the text before the stop, and no more at any time."""
    reader, shown, rest, turn = StopStrings(stops), "", text, 0
    while rest:
        size = sizes[turn % len(sizes)]
        shown += reader.feed(rest[:size])
        rest, turn = rest[size:], turn + 1
        assert cut(text, stops).startswith(shown)
    shown += reader.flush()
    assert shown == cut(text, stops)
    assert reader.stopped == any(stop in text for stop in stops)


def test_only_a_possible_beginning_is_held_back():
    """Text that cannot be part of a stop string comes out at once."""
    reader = StopStrings(["\nUser:"])
    assert reader.feed("well\nUs") == "well"
    assert reader.feed("ual. ") == "\nUsual. "
    assert reader.feed("ok\nUser: more") == "ok"
    assert reader.stopped
    assert reader.feed("more") == reader.flush() == ""


@pytest.mark.parametrize("bad", ["text", [""], ["a", ""]])
def test_stops_are_a_list_of_texts(bad):
    """A bare string would stop at each of its letters; an empty one everywhere."""
    with pytest.raises(BadRequest, match="stop strings are a list"):
        StopStrings(bad)
