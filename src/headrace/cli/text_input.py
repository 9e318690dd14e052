"""Text from arguments, files and pipes: UTF-8 and not empty, or one clear line about what is wrong."""

import sys
from collections.abc import Sequence
from pathlib import Path

from headrace.calibration_text import calibration_text
from headrace.errors import ConfigError


def read_file(name: str) -> str:
    """The whole of a file, or of standard input for `-`, without a byte order mark and the last line's end.

    Raises:
        ConfigError: it cannot be read, is empty, or is not UTF-8.
    """
    if name == "-":
        return check_text(_decode(sys.stdin.buffer.read(), "standard input"), "standard input")
    try:
        data = Path(name).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read '{name}': {error.strerror or error}") from None
    return check_text(_decode(data, f"'{name}'"), f"'{name}'")


def read_texts(files: Sequence[str] | None) -> list[str]:
    """Each file's text; without files, the plain English inside the package.

    Raises:
        ConfigError: as `read_file` does.
    """
    return [read_file(file) for file in files] if files else [calibration_text()]


def check_text(text: str, name: str) -> str:
    """The text itself.

    Raises:
        ConfigError: nothing but white space, or characters that were not UTF-8 when the system passed them in.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} is not UTF-8 text") from None
    if not text.strip():
        raise ConfigError(f"{name} is empty; give at least one word to go on from")
    return text


def _decode(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8 text (byte {error.start}); convert it first") from None
    return text.removesuffix("\n").removesuffix("\r")
