"""Finding stop strings in text that arrives piece by piece."""

from dataclasses import dataclass

from headrace.errors import RequestError


@dataclass(frozen=True)
class StopCheck:
    """text: what may be released now; stop: the stop string that ended the output, None to go on."""

    text: str
    stop: str | None = None


class StopStringMatcher:
    """Releases text as soon as it can no longer be part of a stop string.

    The text decides where it stops, not the way it was split: reading one character after another, the first stop
    string to be complete wins, and of several that are complete at the same character the longest (it started first).
    vLLM agrees wherever one token completes one stop string; where one token completes several, it takes the first in
    its list, so that the same text may stop elsewhere with another tokenizer.

    Text appended with `enabled=False` (before min_tokens) cannot complete a stop string, but one that begins in it may
    be completed by enabled text, as in vLLM.

    Invariant: text released + text held == text appended, until a stop string is found.
    """

    def __init__(self, stop: tuple[str, ...], include_stop: bool) -> None:
        if "" in stop:
            raise RequestError("a stop string is empty; each must have at least one character")
        self._automata = [_Automaton(string) for string in dict.fromkeys(stop)]
        self._include_stop = include_stop
        self._held = ""
        self._is_stopped = False

    def append(self, piece: str, enabled: bool = True) -> StopCheck:
        """Take the next piece; after a stop string was found, everything is swallowed."""
        if self._is_stopped or not self._automata:
            return StopCheck("" if self._is_stopped else piece)
        for position, character in enumerate(piece):
            completed = [automaton.string for automaton in self._automata if automaton.advance(character)]
            if completed and enabled:
                return self._stop(piece[: position + 1], max(completed, key=len))
        text = self._held + piece
        num_released = len(text) - max(automaton.matched for automaton in self._automata)
        self._held = text[num_released:]
        return StopCheck(text[:num_released])

    def flush(self) -> str:
        """The output has ended without a stop string: release what was held."""
        held, self._held = self._held, ""
        return held

    def _stop(self, piece: str, string: str) -> StopCheck:
        text = self._held + piece
        self._held, self._is_stopped = "", True
        return StopCheck(text if self._include_stop else text[: len(text) - len(string)], string)


class _Automaton:
    """Knuth-Morris-Pratt: `matched` is the length of the longest proper prefix of `string` that ends the text so far.

    Amortised constant time per character, so that a long stop string cannot slow an engine step down.
    """

    def __init__(self, string: str) -> None:
        self.string = string
        self.matched = 0
        self._fallback = _prefix_function(string)

    def advance(self, character: str) -> bool:
        """Read one character; true if it completes the string."""
        while self.matched and self.string[self.matched] != character:
            self.matched = self._fallback[self.matched - 1]
        if self.string[self.matched] == character:
            self.matched += 1
        if self.matched < len(self.string):
            return False
        self.matched = self._fallback[-1]
        return True


def _prefix_function(string: str) -> list[int]:
    """For each prefix of `string`, the length of its longest proper prefix that is also its suffix."""
    lengths = [0] * len(string)
    length = 0
    for end in range(1, len(string)):
        while length and string[end] != string[length]:
            length = lengths[length - 1]
        length += string[end] == string[length]
        lengths[end] = length
    return lengths
