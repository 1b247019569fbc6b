from __future__ import annotations

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from services.gateway.stop_strings import StopStrings

TEXT = st.text(alphabet="abc", max_size=24)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4)


def cut_at_first_complete(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: the stop string that is complete first, the longest of those."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 24), max_size=6))
@example(text="aabaac", stops=["aac"], cuts=[1, 2, 3, 4, 5])
@example(text="abcab", stops=["abcabd", "cab"], cuts=[4])
def test_every_split_gives_the_same_text(text: str, stops: list[str], cuts: list[int]) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    matcher = StopStrings(stops)
    shown = ""
    for start, end in itertools.pairwise(borders):
        if not matcher.stopped:
            shown += matcher.push(text[start:end])
    stopped = matcher.stopped
    if not stopped:
        shown += matcher.finish()
    assert (shown, stopped) == cut_at_first_complete(text, stops)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["\n\n", "END"])
    assert matcher.push("one\n") == "one"
    assert matcher.push("two E") == "\ntwo "
    assert matcher.push("N") == ""
    assert matcher.push("X") == "ENX"
    assert matcher.push("END and more") == ""
    assert matcher.stopped
