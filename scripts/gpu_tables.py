"""Writes the tables of docs/gpu.md: ``python -m scripts.gpu_tables``.

    cd tests && python -m triton_variants --all | sort > ../runs/gpu_resources.jsonl  # for GPUs not here too
    python -m scripts.gpu_check  # on the GPU that is here

A table stands between `<!-- name -->` and `<!-- /name -->`; what has not been run stays as it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.readme_tables import ROOT, RUNS, fill, markdown

PAGE = ROOT / "docs" / "gpu.md"
RESOURCES = RUNS / "gpu_resources.jsonl"
MEASURED = RUNS / "gpu_check" / "gpu.md"


def resources(reports: Sequence[Mapping[str, Any]]) -> str:
    """For each kernel and GPU: registers of a thread, shared memory of a program, what spills to memory, and the
    instructions for each weight where they were counted.

    A variant that did not compile has its error named in its place.
    """
    targets = sorted({str(report["target"]) for report in reports})
    found = {(report["variant"], report["target"]): report for report in reports}
    rows = []
    for variant in dict.fromkeys(report["variant"] for report in reports):
        rows.append([variant, *(_cell(found.get((variant, target))) for target in targets)])
    return markdown(["kernel", *targets], rows)


def _cell(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return ""
    if "error" in report:
        return "does not compile"
    stack = report.get("stack_bytes", 0)
    spills = f", {stack} B on the stack" if stack else ""
    work = f", {report['instructions_per_weight']:.1f} a weight" if "instructions_per_weight" in report else ""
    return f"{report.get('registers', '?')} / {report['shared_bytes'] / 1024:.1f} KiB{work}{spills}"


def main(page: Path = PAGE, compiled: Path = RESOURCES, measured: Path = MEASURED) -> int:
    text = page.read_text(encoding="utf-8")
    if compiled.exists():
        reports = [json.loads(line) for line in compiled.read_text(encoding="utf-8").splitlines()]
        text = fill(text, "resources", resources(reports))
    if measured.exists():
        text = fill(text, "measured", "\n" + measured.read_text(encoding="utf-8"))
    for file in (compiled, measured):
        if not file.exists():
            print(f"{file} is not there; its table stays as it is")
    page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
