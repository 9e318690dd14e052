"""``python -m scripts.gpu_check``: see the package."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scripts.gpu_check.supervisor import Say, Settings
    from scripts.gpu_check.units import Unit

_ROOT = Path(__file__).resolve().parents[2]
_ALL_STAGES = ("tests", "limits", "linear", "attention", "model", "peers", "ablation")
_TEST_SHARE, _TEST_SHARE_ALONE, _COMPILE_SHARE = 0.3, 0.95, 0.2
_NUM_COMPILERS = 6
_CHECKPOINT_BYTES = 20 * 10**9


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    sys.path[:0] = [str(_ROOT / "src"), str(_ROOT)]
    if options.worker is not None:
        return _work(options)
    return _supervise(options)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.gpu_check",
        description="Test and measure the GPU backend; the table comes last.",
        epilog="Stages run in the order of that list. What a run had no time for is left out and named: give another "
        "run those stages, and --merge with the first one's results.json for one table of both.",
    )
    parser.add_argument(
        "--stages", default=",".join(_ALL_STAGES), help="a list with commas (default: %(default)s)", metavar="STAGES"
    )
    parser.add_argument("--units", default="", help="only those whose names contain this", metavar="TEXT")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="a folder (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="for caches; libraries are loaded from it (default: in /tmp)")
    parser.add_argument("--models", type=Path, help="for a checkpoint of 13.5 GB (default: where there is room)")
    parser.add_argument(
        "--merge", type=Path, nargs="+", default=[], metavar="FILE", help="results.json of earlier runs"
    )
    parser.add_argument("--no-compile-ahead", action="store_true", help="compile kernels where they are measured")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU: does all of this code run?")
    for name in ("--worker", "--worker-file", "--worker-deadline"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--compiles-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.stages = options.stages.split(",")
    if unknown := set(options.stages) - set(_ALL_STAGES):
        parser.error(f"--stages has {', '.join(sorted(unknown))}; allowed: {', '.join(_ALL_STAGES)}")
    if options.minutes <= 0:
        parser.error(f"--minutes is {options.minutes}; it must be above 0")
    name = f"headrace-gpu-check-{os.getuid()}"
    options.folder = options.folder or Path(tempfile.gettempdir()) / name
    options.models = options.models or _roomy_folder() / name
    return options


def _roomy_folder() -> Path:
    """Memory if there is enough of it, since a checkpoint is written and read several times."""
    folders = [path for path in (Path("/dev/shm"), Path(tempfile.gettempdir()), Path.cwd()) if path.is_dir()]
    free = {path: shutil.disk_usage(path).free for path in folders}
    return next((path for path in folders if free[path] >= _CHECKPOINT_BYTES), max(folders, key=lambda p: free[p]))


def _work(options: argparse.Namespace) -> int:
    from scripts.gpu_check.worker import Job, work

    return work(
        Job(
            units=tuple(options.worker.split(",")),
            file=Path(options.worker_file),
            folder=options.models,
            deadline_s=float(options.worker_deadline),
            is_dry=options.dry_run,
            compiles_only=options.compiles_only,
        )
    )


def _supervise(options: argparse.Namespace) -> int:
    from scripts.gpu_check import report
    from scripts.gpu_check.facts import collect
    from scripts.gpu_check.figures import merged
    from scripts.gpu_check.suites import run_suites
    from scripts.gpu_check.supervisor import Settings, run_units

    start_s = time.time()
    options.out.mkdir(parents=True, exist_ok=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        folder=options.folder.resolve(),
        models=options.models.resolve(),
        out=options.out.resolve(),
        deadline_s=start_s + 60 * options.minutes,
        is_dry=options.dry_run,
    )
    results = merged(options.merge)
    tuning = settings.folder / "cache" / "headrace" / "tuning"
    for file in options.merge:
        _copy_folder(file.parent / "tuning", tuning)

    def save() -> None:
        (options.out / "results.json").write_text(json.dumps(results.to_json(), indent=1))
        (options.out / "gpu.md").write_text(report.markdown(results))

    def say(line: str) -> None:
        print(f"[{time.time() - start_s:5.0f} s] {line}", flush=True)

    results.facts |= collect(settings)
    say(report.headline(results))
    say(f"caches in {settings.folder}, checkpoint in {settings.models}, results in {settings.out}")
    if results.facts["device"] is None and not options.dry_run:
        say("torch sees no GPU here; --dry-run runs everything on the CPU in tiny sizes")
        return 2
    if "tests" in options.stages:
        share = _TEST_SHARE if set(options.stages) - {"tests"} else _TEST_SHARE_ALONE
        results.tests |= run_suites(settings, 60 * options.minutes * share, say)
        save()
    units = _chosen_units(options)
    if not (options.no_compile_ahead or options.dry_run):
        _compile_ahead(options, units, settings, say)
    run_units(units, results, settings, say, save)
    save()
    _copy_folder(tuning, options.out / "tuning")
    print(report.text(results))
    return 1 if _has_failed(results) else 0


def _copy_folder(source: Path, target: Path) -> None:
    """What linear layers' measurements found goes from one run to the next."""
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)


def _chosen_units(options: argparse.Namespace) -> dict[str, Unit]:
    from scripts.gpu_check.scale import DRY, FULL
    from scripts.gpu_check.units import all_units

    units = all_units(DRY if options.dry_run else FULL)
    return {name: u for name, u in units.items() if u.stage in options.stages and options.units in name}


def _compile_ahead(options: argparse.Namespace, units: Mapping[str, Unit], settings: Settings, say: Say) -> None:
    from scripts.gpu_check.supervisor import compile_units

    names = [name for name, unit in units.items() if unit.has_kernels]
    if names:
        limit_s = 60 * options.minutes * _COMPILE_SHARE
        compile_units(names, settings, _NUM_COMPILERS, limit_s, say)


def _has_failed(results: object) -> bool:
    from scripts.gpu_check.figures import Results

    assert isinstance(results, Results)
    has_trouble = any(trouble.is_failure for trouble in results.troubles.values())
    has_failed_tests = any(found["failed"] or found["is_cut"] for found in results.tests.values())
    return has_trouble or has_failed_tests or any(not figure.is_right for figure in results.figures.values())


if __name__ == "__main__":
    sys.exit(main())
