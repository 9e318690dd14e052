"""Server-sent events, from bytes in whatever pieces they come.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventTooLong(Exception):
    """More bytes without an end of line than anything honest sends."""


class SseParser:
    """Gives the data of events; their names and ids mean nothing to whoever reads completions.

    Lines end with LF, CR or CRLF; an event ends with an empty line. What has not ended is kept for the next piece.
    """

    def __init__(self, *, max_line_bytes: int = 16 << 20) -> None:
        self._max_line_bytes = max_line_bytes
        self._rest = b""
        self._data: list[bytes] = []
        self._is_first_line = True
        self._ended_with_cr = False

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of each event that ends in this piece.

        Raises:
            EventTooLong: a line of more than `max_line_bytes`.
        """
        if not piece:
            return []
        if self._ended_with_cr and piece.startswith(b"\n"):
            piece = piece[1:]  # the other half of a CRLF
        self._ended_with_cr = False
        text = self._rest + piece
        lines = text.splitlines(keepends=True)
        self._rest = lines.pop() if lines and not lines[-1].endswith((b"\n", b"\r")) else b""
        if len(self._rest) > self._max_line_bytes:
            raise EventTooLong(f"a line of an event stream has more than {self._max_line_bytes} bytes")
        self._ended_with_cr = not self._rest and text.endswith(b"\r")
        events: list[bytes] = []
        for line in lines:
            self._take_line(line.rstrip(b"\r\n"), events)
        return events

    def end(self) -> list[bytes]:
        """What an empty line would have ended: some servers leave the last one out."""
        events: list[bytes] = []
        if self._rest:
            self._take_line(self._rest, events)
            self._rest = b""
        self._take_line(b"", events)
        return events

    def _take_line(self, line: bytes, events: list[bytes]) -> None:
        if self._is_first_line:
            line = line.removeprefix(_BYTE_ORDER_MARK)
            self._is_first_line = False
        if not line:
            if self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        elif line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
        elif line == b"data":
            self._data.append(b"")
