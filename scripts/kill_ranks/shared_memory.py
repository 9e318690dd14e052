"""What programs leave in shared memory, told from what others on this machine are using."""

import re
import time
from contextlib import suppress
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")


def names_in_shared_memory() -> set[str]:
    return {entry.name for entry in _SHARED_MEMORY.iterdir()}


def left_in_shared_memory(before: set[str]) -> list[str]:
    """Names that are new and that no living process has mapped.

    A second look, since a program that starts or ends may have a name and no mapping for a moment.
    """
    left = names_in_shared_memory() - before - _mapped()
    if left:
        time.sleep(1.0)
        left = (left & names_in_shared_memory()) - _mapped()
    return sorted(left)


def _mapped() -> set[str]:
    """Of the processes that may be read."""
    names: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            names.update(re.findall(rf"{_SHARED_MEMORY}/(\S+)", maps.read_text()))
    return names
