"""What the commands print beside their result: tables, notes, numbers with units. Plain unless a person is watching."""

import os
import sys
from collections.abc import Sequence
from typing import TextIO

_DIM, _BOLD, _RESET = "\x1b[2m", "\x1b[1m", "\x1b[0m"


def has_color(stream: TextIO) -> bool:
    """A terminal that does not refuse color (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def dim(text: str, stream: TextIO) -> str:
    return f"{_DIM}{text}{_RESET}" if has_color(stream) else text


def bold(text: str, stream: TextIO) -> str:
    return f"{_BOLD}{text}{_RESET}" if has_color(stream) else text


def note(text: str) -> None:
    """A remark for the person at the terminal, apart from the result."""
    print(dim(text, sys.stderr), file=sys.stderr, flush=True)


def is_watched() -> bool:
    """Both streams are a terminal, so a progress display disturbs nobody."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def aligned(rows: Sequence[Sequence[str]], *, num_left: int = 1) -> list[str]:
    """Rows as lines of equal columns: the first `num_left` flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def plural(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def format_ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.{_digits(seconds * 1e3)}f} ms"


def format_rate(per_s: float | None) -> str:
    """A number of things per second, without its unit."""
    return "-" if per_s is None else f"{per_s:,.{_digits(per_s)}f}"


def format_bytes(num_bytes: int) -> str:
    size, units = float(num_bytes), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} bytes" if units[0] == "bytes" else f"{size:.1f} {units[0]}"


def _digits(value: float) -> int:
    return 2 if value < 10 else 1 if value < 1000 else 0
