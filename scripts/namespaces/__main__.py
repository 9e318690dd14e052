"""Runs a command on hosts of its own: ``python -m scripts.namespaces --hosts 2 -- headrace generate --tp 2 ...``.

Each host is a network namespace of this machine, one rank on each, joined by MPI over TCP. What each has sent is
printed at the end.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from scripts.namespaces.mpi import mpiexec, why_not
from scripts.namespaces.network import CommandError, network


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.namespaces", description=__doc__)
    parser.add_argument("--hosts", type=int, default=2, metavar="N", help="ranks (default: %(default)s)")
    parser.add_argument(
        "--mbit-per-s", type=int, default=0, metavar="M", help="what a host can send (default: no limit)"
    )
    parser.add_argument("command", nargs="+", help="after --: the program and its arguments")
    args = parser.parse_args()
    if (reason := why_not()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    try:
        with network(args.hosts, args.mbit_per_s) as hosts:
            with mpiexec(hosts, args.command) as started:
                status: int = started.wait()
            for rank, counters in enumerate(hosts.counters()):
                print(
                    f"rank {rank} sent {counters.tx_bytes:,} bytes in {counters.tx_packets:,} frames", file=sys.stderr
                )
            return status
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    except (OSError, subprocess.SubprocessError) as error:
        print(f"error: cannot run mpiexec: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
