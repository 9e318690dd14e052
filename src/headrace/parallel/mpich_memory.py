"""What MPICH leaves behind, and need not."""

import re
from contextlib import suppress
from pathlib import Path


def unname_mpich_memory() -> None:
    """Take the name off the memory that MPICH's ranks on this host share, once they all have it or never will.

    MPICH does so itself when it ends in order; a program that is killed would leave the name behind, and the memory.
    """
    with suppress(OSError):
        mapped = Path("/proc/self/maps").read_text()
        for name in set(re.findall(r"/dev/shm/mpich\S*", mapped)):
            Path(name).unlink(missing_ok=True)
