"""Messages typed at a prompt or read from a pipe, one per line; a backslash at a line's end continues it."""

import sys
from contextlib import suppress

from headrace.errors import RequestError

_PROMPT, _MORE = ">>> ", "... "


class LineInput:
    """Lines with history and editing where the terminal and Python have them.

    is_interactive: a person types; otherwise nothing is printed but the answers.
    """

    def __init__(self) -> None:
        self.is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if self.is_interactive:
            with suppress(ImportError):
                import readline  # noqa: F401 - importing it is what gives input() its line editing

    def read(self) -> str | None:
        """The next message, None when there are no more.

        Raises:
            RequestError: the line is not UTF-8.
        """
        lines: list[str] = []
        while True:
            line = self._read_line(_MORE if lines else _PROMPT)
            if line is None:
                return "\n".join(lines) if lines else None
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                return "\n".join(lines)

    def _read_line(self, prompt: str) -> str | None:
        if not self.is_interactive:
            # Line by line and as bytes: one bad line must not take its neighbours along.
            data = sys.stdin.buffer.readline()
            return _decoded(data).removesuffix("\n").removesuffix("\r") if data else None
        try:
            return _checked(input(prompt))
        except EOFError:
            return None
        except UnicodeDecodeError:
            raise _not_utf8() from None


def _decoded(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise _not_utf8() from None


def _checked(text: str) -> str:
    """Bytes that are no UTF-8 reach Python as lone surrogates where the locale is lenient."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _not_utf8() from None
    return text


def _not_utf8() -> RequestError:
    return RequestError("that line is not UTF-8 text")
