"""Whether the wire agrees with the predicted bytes: ``python -m scripts.namespaces.wire``.

Every rank runs on a host of its own. What its interface has sent, read before and after a known piece of work and less
what the control channel has sent, stands beside what `costs.volume` predicts. Frames carry headers, so that the ratio
is above 1; docs/communication.md says what is in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.namespaces.meter import Sent
from scripts.namespaces.mpi import mpiexec, why_not
from scripts.namespaces.network import CommandError, Network, network
from scripts.namespaces.random_model import write_random_model

_LAYOUTS = ((2, 1), (4, 1), (1, 2), (2, 2))
_RANK_MODULE = "scripts.namespaces.wire_rank"
_TIMEOUT_S = 50


@dataclass(frozen=True, kw_only=True)
class Line:
    """One rank's account of a piece of work.

    predicted_bytes: in closed form; counted_bytes: by the ledger; sent: by the interface.
    """

    layout: str
    work: str
    rank: int
    predicted_bytes: int
    counted_bytes: int
    sent: Sent

    @property
    def data_bytes(self) -> int:
        """On the wire, without the control channel."""
        return self.sent.all_bytes - self.sent.control_bytes

    @property
    def ratio(self) -> float | None:
        """None for a rank that only receives: what it sends is acknowledgements."""
        return self.data_bytes / self.predicted_bytes if self.predicted_bytes else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"data_bytes": self.data_bytes, "ratio": self.ratio}


def measure_layout(
    folder: Path, tensor_parallel_size: int, pipeline_parallel_size: int, mbit_per_s: int = 0
) -> list[Line]:
    """A model's requests. folder: of `write_random_model`."""
    sizes = [str(tensor_parallel_size), str(pipeline_parallel_size)]
    with network(tensor_parallel_size * pipeline_parallel_size, mbit_per_s) as hosts:
        return list(_run(hosts, f"TP {sizes[0]}, PP {sizes[1]}", "model", str(folder), *sizes))


def measure_operations(num_ranks: int, mbit_per_s: int = 0, *, smallest_bytes: int = 8) -> list[Line]:
    """Collectives and sends without a model, of several sizes."""
    with network(num_ranks, mbit_per_s) as hosts:
        return list(_run(hosts, f"{num_ranks} ranks", "operations", str(smallest_bytes)))


def _run(hosts: Network, layout: str, program: str, *arguments: str) -> Iterator[Line]:
    with tempfile.NamedTemporaryFile(suffix=".json") as output:
        command = [sys.executable, "-m", _RANK_MODULE, program, output.name, ",".join(hosts.namespaces), *arguments]
        with mpiexec(hosts, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as started:
            said, _ = started.communicate(timeout=_TIMEOUT_S)
        if started.returncode != 0:
            raise CommandError(f"the ranks of {layout} have failed:\n{said}")
        results = json.loads(Path(output.name).read_text())
    for result in results:
        ranks = zip(result["predicted_bytes"], result["counted_bytes"], result["sent"], strict=True)
        for rank, (predicted_bytes, counted_bytes, sent) in enumerate(ranks):
            yield Line(
                layout=layout,
                work=result["work"],
                rank=rank,
                predicted_bytes=predicted_bytes,
                counted_bytes=counted_bytes,
                sent=Sent(**sent),
            )


def table(lines: Sequence[Line]) -> str:
    header = ["layout", "work", "rank", "predicted", "on the wire", "ratio", "frames", "control"]
    rows = [
        [
            line.layout,
            line.work,
            str(line.rank),
            f"{line.predicted_bytes:,}",
            f"{line.data_bytes:,}",
            "-" if line.ratio is None else f"{line.ratio:.4f}",
            f"{line.sent.num_frames:,}",
            f"{line.sent.control_bytes:,}",
        ]
        for line in lines
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.namespaces.wire", description=__doc__)
    parser.add_argument(
        "--mbit-per-s", type=int, default=0, metavar="M", help="what a host can send (default: no limit)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    args = parser.parse_args()
    if (reason := why_not()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    try:
        lines = measure_operations(2, args.mbit_per_s)
        with tempfile.TemporaryDirectory() as folder:
            model = write_random_model(Path(folder))
            for layout in _LAYOUTS:
                lines += measure_layout(model, *layout, args.mbit_per_s)
    except (CommandError, subprocess.TimeoutExpired) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(
        json.dumps({"mbit_per_s": args.mbit_per_s, "lines": [line.to_json() for line in lines]})
        if args.json
        else table(lines)
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
