"""Command line: many trials in a row, a table of what they took, and every problem."""

import argparse
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from signal import Signals
from typing import Any

from headrace.demo_model import demo_model_path
from scripts.kill_ranks.trial import MOMENTS, Outcome, Trial, run_trial

_MAX_DELAY_S = {"loading": 4.0, "idle": 0.5, "prefill": 0.5, "decode": 0.5}


def main() -> int:
    arguments = _parser().parse_args()
    settings = {
        "model": arguments.model,
        "tensor_parallel_size": arguments.tp,
        "pipeline_parallel_size": arguments.pp,
        "transport": arguments.transport,
        "deadline_s": arguments.deadline,
        "num_threads": 1,
    }
    started_s, outcomes = time.monotonic(), []
    trials = random_trials(
        settings, arguments.trials, arguments.stop_share, arguments.seed, is_launched=arguments.transport == "mpi"
    )
    for number, trial in enumerate(trials):
        outcomes.append(run_trial(trial))
        print(f"{number + 1:4} {describe(outcomes[-1])}", flush=True)
    print(f"\n{summary(outcomes)}\n{len(outcomes)} trials in {time.monotonic() - started_s:.0f} s")
    num_bad = sum(bool(outcome.problems) for outcome in outcomes)
    print(f"{num_bad} with problems")
    return int(num_bad > 0)


def random_trials(
    settings: dict[str, Any], count: int, stop_share: float, seed: int, *, is_launched: bool = False
) -> Iterator[Trial]:
    """Any rank, at any moment; every tenth program loads another engine afterwards."""
    draw = random.Random(seed)
    for number in range(count):
        moment = draw.choice(MOMENTS)
        yield Trial(
            settings=settings,
            victim=draw.randrange(settings["tensor_parallel_size"] * settings["pipeline_parallel_size"]),
            moment=moment,
            delay_s=draw.uniform(0, _MAX_DELAY_S[moment]),
            signal=Signals.SIGSTOP if draw.random() < stop_share else Signals.SIGKILL,
            loads_again=number % 10 == 9 and not is_launched,
            is_launched=is_launched,
        )


def describe(outcome: Outcome) -> str:
    trial = outcome.trial
    what = f"{trial.signal.name} to rank {trial.victim}, {trial.moment} + {trial.delay_s:.2f} s"
    ended = "never" if outcome.ended_s is None else f"{outcome.ended_s:.2f} s"
    lines = [f"{what:45} others ended after {ended:8} {outcome.error.get('message', '')}"]
    return "\n       PROBLEM: ".join([*lines, *outcome.problems])


def summary(outcomes: list[Outcome]) -> str:
    """Seconds from the signal until all other ranks had ended and until the caller had its error."""
    groups = defaultdict(list)
    for outcome in outcomes:
        who = "rank 0" if outcome.trial.victim == 0 else "another"
        groups[outcome.trial.signal.name, who, outcome.trial.moment].append(outcome)
    lines = ["signal   to       moment   trials  ended: median   max    error: median   max   problems"]
    for (name, who, moment), group in sorted(groups.items()):
        ended = _median_and_max([o.ended_s for o in group if o.ended_s is not None])
        error = _median_and_max([o.error_s for o in group if o.error_s is not None and o.trial.victim])
        problems = sum(bool(outcome.problems) for outcome in group)
        lines.append(f"{name:8} {who:8} {moment:8} {len(group):6}  {ended:>20} {error:>21} {problems:10}")
    return "\n".join(lines)


def _median_and_max(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} {max(values):6.2f}" if values else "-"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.kill_ranks", description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--transport", choices=("auto", "gloo", "mpi"), default="auto", help="mpi: ranks of mpiexec")
    parser.add_argument("--deadline", type=float, default=4.0, help="seconds until a silent rank is given up")
    parser.add_argument("--stop-share", type=float, default=0.3, help="of trials, that stop a rank instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=str(demo_model_path()))
    return parser


if __name__ == "__main__":
    sys.exit(main())
