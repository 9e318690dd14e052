"""A worker of scripts/gpu_check that crashes, hangs or fails as the names of its units say; without torch."""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker")
    parser.add_argument("--worker-file", type=Path)
    options, _ = parser.parse_known_args()
    with options.worker_file.open("a") as lines:

        def write(entry: dict[str, Any]) -> None:
            lines.write(json.dumps(entry) + "\n")
            lines.flush()

        for unit in options.worker.split(","):
            if unit == "never begins":
                print("no such device", file=sys.stderr)
                return 3
            write({"kind": "begin", "unit": unit})
            if unit == "crashes":
                write(_figure("before the crash"))
                print("an illegal memory access", file=sys.stderr, flush=True)
                os.abort()
            if unit == "hangs":
                time.sleep(600)
            if unit == "fails":
                write({"kind": "trouble", "trouble": {"unit": unit, "message": "ValueError: no", "is_failure": True}})
            else:
                write(_figure(unit))
            write({"kind": "done", "unit": unit})
            if unit == "breaks the device":
                return 1
    return 0


def _figure(name: str) -> dict[str, Any]:
    return {"kind": "figure", "figure": {"group": "some", "labels": {"name": name}, "seconds": 1.0}}


if __name__ == "__main__":
    sys.exit(main())
