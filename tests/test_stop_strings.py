"""Stop strings against brute force on the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import RequestError
from headrace.tokenizer import StopStringMatcher


def feed(stop: tuple[str, ...], pieces: list[str], include_stop: bool = False) -> tuple[str, str | None]:
    """All released text and the stop string found, with a flush at the end."""
    matcher = StopStringMatcher(stop, include_stop)
    released = ""
    for piece in pieces:
        check = matcher.append(piece)
        released += check.text
        if check.stop is not None:
            return released, check.stop
    return released + matcher.flush(), None


def brute_force(
    stop: tuple[str, ...], text: str, include_stop: bool, disabled_length: int = 0
) -> tuple[str, str | None]:
    """The match with the first end past the disabled text; of equal ends the first start."""
    matches = []
    for string in stop:
        start = text.find(string, max(0, disabled_length - len(string) + 1))
        if start >= 0:
            matches.append((start + len(string), start, string))
    if not matches:
        return text, None
    end, start, string = min(matches)
    return text[: end if include_stop else start], string


@pytest.mark.parametrize(
    ("stop", "pieces", "expected"),
    [
        (("END",), ["no stop"], ("no stop", None)),
        (("END",), ["text E", "N", "D more"], ("text ", "END")),
        (("END",), ["ENE", "NDx"], ("EN", "END")),
        (("aab",), ["aaa", "ab"], ("aa", "aab")),
        (("ab", "abc"), ["abc"], ("", "ab")),
        (("abc", "ab"), ["abc"], ("", "ab")),
        (("abcd", "bc"), ["xabcd"], ("xa", "bc")),
        (("c", "abc"), ["x", "ab", "c"], ("x", "abc")),
        (("\n\n",), ["a\n", "b\n", "\nc"], ("a\nb", "\n\n")),
        (("🙂",), ["hi 🙂 there"], ("hi ", "🙂")),
        ((), ["anything", "goes"], ("anythinggoes", None)),
    ],
)
def test_where_the_text_stops(stop, pieces, expected):
    assert feed(stop, pieces) == expected


def test_the_stop_string_is_kept_on_request():
    assert feed(("END",), ["x E", "ND y"], include_stop=True) == ("x END", "END")


def test_only_what_could_become_a_stop_string_is_held():
    matcher = StopStringMatcher(("<end>",), include_stop=False)
    assert matcher.append("a <").text == "a "
    assert matcher.append("en").text == ""
    assert matcher.append("t").text == "<ent"
    assert matcher.append("<e").text == ""
    assert matcher.flush() == "<e"
    assert matcher.flush() == ""


def test_nothing_is_released_after_a_stop():
    matcher = StopStringMatcher(("x",), include_stop=False)
    assert matcher.append("axb").text == "a"
    assert matcher.append("more").text == ""
    assert matcher.flush() == ""


def test_a_stop_string_before_min_tokens_is_text():
    matcher = StopStringMatcher(("END",), include_stop=False)
    assert matcher.append("a END b E", enabled=False).text == "a END b "
    check = matcher.append("ND")
    assert (check.text, check.stop) == ("", "END")


def test_an_empty_stop_string_is_refused():
    with pytest.raises(RequestError, match="at least one character"):
        StopStringMatcher(("a", ""), include_stop=False)


def test_a_very_long_stop_string_costs_linear_time():
    matcher = StopStringMatcher(("a" * 100_000 + "b",), include_stop=False)
    released = "".join(matcher.append("a" * 10).text for _ in range(20_000))
    assert len(released) == 100_000
    assert matcher.append("b").stop is not None


SMALL_TEXT = st.text(alphabet="ab", max_size=40)


@given(
    stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4).map(tuple),
    pieces=st.lists(st.text(alphabet="ab", max_size=4), max_size=20),
    include_stop=st.booleans(),
)
def test_any_split_equals_brute_force(stop, pieces, include_stop):
    assert feed(stop, pieces, include_stop) == brute_force(stop, "".join(pieces), include_stop)


@given(
    stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1).map(tuple),
    early=SMALL_TEXT,
    late=SMALL_TEXT,
)
def test_a_match_must_end_after_min_tokens(stop, early, late):
    matcher = StopStringMatcher(stop, include_stop=False)
    first = matcher.append(early, enabled=False)
    assert first.stop is None
    check = matcher.append(late)
    released = first.text + check.text + ("" if check.stop else matcher.flush())
    assert (released, check.stop) == brute_force(stop, early + late, False, disabled_length=len(early))


class _Watched(str):
    """Counts the looks at its characters."""

    num_looks = 0

    def __getitem__(self, place):
        self.num_looks += 1
        return super().__getitem__(place)


def test_a_long_stop_string_costs_by_the_text_not_by_its_own_length() -> None:
    stop = _Watched("ab" * 50_000)
    matcher = StopStringMatcher((stop,), include_stop=False)
    assert matcher.append("ababac").text == "ababac"
    assert stop.num_looks < 100
