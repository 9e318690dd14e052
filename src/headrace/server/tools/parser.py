"""Tool calls out of a model's text, while it is being written.

A format's parser is a generator that is sent one character after another, so that how a text was cut into pieces cannot
matter. What turns out not to be a call is content, character by character as it was. A call has begun once its name and
the beginning of its arguments were read; from then on its pieces are given as they come, so that it stays a call even
if it is never completed. The arguments are the model's own words: a client has to check them, as with OpenAI's API.
A name is not compared with the tools of the request: a client can answer a call of an unknown function, and the model
learns from it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import TypeVar

from headrace.server.tools.deltas import DeltaBuilder, ToolDelta, new_call_id

T = TypeVar("T")
Reading = Generator[None, str, T]  # is sent the next character, "" at the end of the text

SPACES = frozenset(" \t\r\n")


class ToolCallParser(ABC):
    """Feed it one output's text in pieces of any size, then finish.

    Owns the text that may yet become part of a call. num_calls: the calls begun so far.
    """

    def __init__(self, make_id: Callable[[], str] = new_call_id) -> None:
        self._out = DeltaBuilder(make_id)
        self._next = ""  # the character to be read next, "" at the end of the text
        self._is_in_text = False  # the character to come is content, unless it is "<"
        self._taken: list[str] = []  # read, and not yet known to be content or a call
        self._reading = self._read()
        next(self._reading)

    @property
    def num_calls(self) -> int:
        return self._out.num_calls

    def feed(self, text: str) -> ToolDelta:
        self._send(text)
        return self._out.take()

    def finish(self, text: str = "") -> ToolDelta:
        """The last text, and what was held back, as no more follows."""
        self._send(text)
        try:
            self._reading.send("")
        except StopIteration:
            self._out.finish()
            return self._out.take()
        raise AssertionError("a parser asked for more after the end of the text")

    def _send(self, text: str) -> None:
        start = 0
        while start < len(text):
            if self._is_in_text:  # only a bracket means anything, so that what is before it is given at once
                stop = text.find("<", start)
                stop = len(text) if stop < 0 else stop
                self._out.text(text[start:stop])
                start = stop
            if start < len(text):
                self._reading.send(text[start])
                start += 1

    @abstractmethod
    def _read(self) -> Reading[None]:
        """Read the whole text; ends when it is sent the end of the text."""

    def _advance(self) -> Reading[None]:
        self._taken.append(self._next)
        self._next = yield

    def _content(self) -> Reading[None]:
        """A character that is content."""
        self._out.text(self._next)
        self._is_in_text = True
        self._next = yield
        self._is_in_text = False

    def _literal(self, text: str) -> Reading[bool]:
        for character in text:
            if self._next != character:
                return False
            yield from self._advance()
        return True

    def _spaces(self, others: frozenset[str] = frozenset()) -> Reading[None]:
        while self._next in SPACES or self._next in others:
            yield from self._advance()

    def _until(self, end: str, forbidden: frozenset[str]) -> Reading[str | None]:
        """The text before `end`, which is read too; None if a forbidden character or no more text comes first."""
        characters: list[str] = []
        while self._next != end:
            if not self._next or self._next in forbidden:
                return None
            characters.append(self._next)
            yield from self._advance()
        yield from self._advance()
        return "".join(characters)

    def _drop(self) -> None:
        """What was taken was syntax."""
        self._taken.clear()

    def _give_back(self) -> None:
        """What was taken is content."""
        self._out.text("".join(self._taken))
        self._taken.clear()


class TaggedParser(ToolCallParser):
    """Calls between <tool_call> and </tool_call>, text around them. The closing tag may be missing."""

    def _read(self) -> Reading[None]:
        self._next = yield
        is_open = False
        while self._next:
            if self._next != "<":
                yield from self._content()
                continue
            yield from self._advance()
            if is_open and self._next == "/":
                is_open = not (yield from self._literal("/tool_call>"))
                self._give_back() if is_open else self._drop()
            elif (yield from self._literal("tool_call>")) and (yield from self._call()):
                is_open = True
            else:
                self._give_back()

    @abstractmethod
    def _call(self) -> Reading[bool]:
        """Read what follows an opening tag; False if it is not a call."""
