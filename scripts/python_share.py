"""What Python takes of a decode step: `python -m scripts.python_share --model MODEL --quantize int4`.

A step's time less that of the recording it replays, layers and head in one. Medians over the steps of a round, and of
the rounds the best and the middle one. Asking for the time costs some microseconds of it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from headrace import LLM, SamplingParams
from headrace.engine.engine import Engine
from headrace.engine.local_executor import LocalExecutor

_PROMPT_TOKENS = 8
_WARM_UP_STEPS = 5


class Round(NamedTuple):
    python_s: float
    step_s: float

    @property
    def share(self) -> float:
        return self.python_s / self.step_s


class Replays:
    """Times the replays of steps of one size from now on."""

    def __init__(self, engine: Engine, num_seqs: int) -> None:
        self.seconds = 0.0
        executor = engine.model.executor
        if not isinstance(executor, LocalExecutor):
            raise SystemExit("only steps of one process are replayed from the caller's own thread")
        step = executor.worker.decode_step
        if num_seqs not in step._whole:
            raise SystemExit(f"steps are not replayed: {step.obstacle}")
        whole = step._whole[num_seqs]
        step._whole[num_seqs] = whole._replace(replay=self._timed(whole.replay))

    def _timed(self, replay: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            start_s = time.perf_counter()
            replay()
            self.seconds += time.perf_counter() - start_s

        return run


def measure(llm: LLM, num_seqs: int, num_steps: int, num_rounds: int) -> list[Round]:
    """Rounds of num_steps steps each, those with the smallest share first."""
    engine, rounds = llm.engine, []
    vocab_size = engine.model.config.vocab_size
    prompts = [[(7 * i + j) % vocab_size for j in range(_PROMPT_TOKENS)] for i in range(num_seqs)]
    start = SamplingParams(temperature=0, max_tokens=_WARM_UP_STEPS, ignore_eos=True)
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], start)
    replays = Replays(engine, num_seqs)
    params = replace(start, max_tokens=num_steps + 2 * _WARM_UP_STEPS)
    for _ in range(num_rounds):
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), prompt, params)
        for _ in range(_WARM_UP_STEPS):
            engine.step()
        steps = []
        for _ in range(num_steps):
            replays.seconds, start_s = 0.0, time.perf_counter()
            engine.step()
            step_s = time.perf_counter() - start_s
            steps.append((step_s - replays.seconds, step_s))
        rounds.append(Round(*map(statistics.median, zip(*steps, strict=True))))
        for i in range(num_seqs):
            engine.abort(str(i))
    return sorted(rounds, key=lambda found: found.share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--quantize", choices=["int8", "int4"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=240, help="of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    with LLM(args.model, quantize=args.quantize, num_threads=args.threads, max_num_seqs=max(args.batch_sizes)) as llm:
        for num_seqs in args.batch_sizes:
            rounds = measure(llm, num_seqs, args.steps, args.rounds)
            for name, found in (("best", rounds[0]), ("median", rounds[len(rounds) // 2])):
                times = f"{found.python_s * 1e6:4.0f} of {found.step_s * 1e6:5.0f} us"
                print(f"{num_seqs:3} sequences, {name:6} round: {times}, {found.share:.1%}")


if __name__ == "__main__":
    main()
