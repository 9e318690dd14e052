"""The process that runs units, one after another, and writes a line for all that happens.

One whose GPU no longer answers ends, and whoever started it starts another one for the units that are left.
"""

from __future__ import annotations

import gc
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.gpu_check.context import Context, describe
from scripts.gpu_check.figures import Trouble, figure_entry, trouble_entry
from scripts.gpu_check.scale import DRY, FULL
from scripts.gpu_check.units import Unit, all_units

_LEAST_S = 15.0
"""A unit is not begun with less time left."""

Write = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is started with. compiles_only: see `Context`."""

    units: tuple[str, ...]
    file: Path
    folder: Path
    deadline_s: float
    is_dry: bool
    compiles_only: bool


def work(job: Job) -> int:
    """0 when all units were tried, 1 when the device has given up."""
    torch.manual_seed(0)
    device = torch.device("cpu" if job.is_dry else "cuda:0")
    context = Context(
        device=device,
        dtype=torch.float32 if job.is_dry else torch.bfloat16,
        scale=DRY if job.is_dry else FULL,
        folder=job.folder,
        deadline_s=job.deadline_s,
        compiles_only=job.compiles_only,
    )
    with job.file.open("a") as lines:

        def write(entry: Mapping[str, Any]) -> None:
            lines.write(json.dumps(entry) + "\n")
            lines.flush()

        units = all_units(context.scale)
        for unit in (units[name] for name in job.units):
            _run(context, unit, write)
            if not _is_alive(context):
                return 1
    return 0


def _run(context: Context, unit: Unit, write: Write) -> None:
    write({"kind": "begin", "unit": unit.name})

    def report(part: str, message: str, is_failure: bool) -> None:
        write(trouble_entry(Trouble(unit=f"{unit.name}: {part}", message=message, is_failure=is_failure)))

    context.unit, context.report = unit.name, report
    if context.seconds_left() < _LEAST_S:
        write(trouble_entry(Trouble(unit=unit.name, message="no time was left", is_failure=False)))
    else:
        try:
            for figure in unit.run(context):
                write(figure_entry(figure))
        except Exception as error:
            write(trouble_entry(Trouble(unit=unit.name, message=describe(error), details=traceback.format_exc())))
    write({"kind": "done", "unit": unit.name})
    _give_back_memory(context)


def _give_back_memory(context: Context) -> None:
    gc.collect()
    if context.device.type == "cuda" and _is_alive(context):
        torch.cuda.empty_cache()


def _is_alive(context: Context) -> bool:
    """After an error of the device every call raises it again."""
    try:
        context.synchronize()
    except RuntimeError:
        return False
    return True


def lines_of(file: Path, start: int) -> tuple[Sequence[dict[str, Any]], int]:
    """The whole lines from a place on, and the place after them."""
    if not file.exists():
        return [], start
    with file.open("rb") as opened:
        opened.seek(start)
        text = opened.read()
    end = text.rfind(b"\n") + 1
    return [json.loads(line) for line in text[:end].splitlines()], start + end
