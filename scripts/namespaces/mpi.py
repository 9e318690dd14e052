"""A program on every host of a network, started by mpiexec and joined by TCP."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from scripts.namespaces.network import INTERFACE, Network, in_namespace
from scripts.namespaces.network import why_not as why_no_network

_ENTER = Path(__file__).parent / "enter"
_MPIEXEC = Path(sys.executable).parent / "mpiexec"
_OVER_TCP = {
    # MPICH takes namespaces for one host, and would join their ranks through shared memory.
    "MPIR_CVAR_NOLOCAL": "1",
    "UCX_TLS": "tcp,self",
    "FI_PROVIDER": "tcp",
}
_END_S = 5.0


def why_not() -> str | None:
    """Why ranks cannot be started in namespaces here; None if they can."""
    if (reason := why_no_network()) is not None:
        return reason
    return None if _MPIEXEC.exists() else f"there is no {_MPIEXEC}; pip install mpi4py mpich"


def mpiexec_command(hosts: Network, command: Sequence[str]) -> list[str]:
    """One rank on each host, rank 0 on the first, where mpiexec runs as well."""
    where = [
        "-launcher",
        "ssh",
        "-launcher-exec",
        str(_ENTER),
        "-iface",
        INTERFACE,
        "-hosts",
        ",".join(hosts.namespaces),
    ]
    size = len(hosts.namespaces)
    return in_namespace(
        hosts.namespaces[0], [str(_MPIEXEC), "-genvall", *where, "-ppn", "1", "-n", str(size), *command]
    )


@contextmanager
def mpiexec(hosts: Network, command: Sequence[str], **how: object) -> Iterator[subprocess.Popen[str]]:
    """The program while it runs; how: as for Popen. Afterwards it has ended, by itself or not."""
    started = subprocess.Popen(  # type: ignore[call-overload]
        mpiexec_command(hosts, command), env=os.environ | _OVER_TCP, text=True, start_new_session=True, **how
    )
    try:
        yield started
    finally:
        _end(started)


def _end(started: subprocess.Popen[str]) -> None:
    if started.poll() is None:
        os.killpg(started.pid, signal.SIGTERM)
        try:
            started.wait(_END_S)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()
