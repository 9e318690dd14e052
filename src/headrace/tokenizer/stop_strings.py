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

    Amortised constant time per character of the text, and none before there is any: a long stop string cannot slow an
    engine step down, however many outputs wait for it.
    """

    def __init__(self, string: str) -> None:
        self.string = string
        self.matched = 0
        self._fallback: list[int] = []
        """For each prefix that was matched so far, the length of its longest proper prefix that is also its suffix."""

    def advance(self, character: str) -> bool:
        """Read one character; true if it completes the string."""
        while self.matched and self.string[self.matched] != character:
            self.matched = self._fallback[self.matched - 1]
        if self.string[self.matched] == character:
            self.matched += 1
            if self.matched > len(self._fallback):
                self._fallback.append(self._next_fallback())
        if self.matched < len(self.string):
            return False
        self.matched = self._fallback[-1]
        return True

    def _next_fallback(self) -> int:
        """Of the prefix that is one longer than those known."""
        end = len(self._fallback)
        if end == 0:
            return 0
        length = self._fallback[end - 1]
        while length and self.string[end] != self.string[length]:
            length = self._fallback[length - 1]
        return length + (self.string[end] == self.string[length])
