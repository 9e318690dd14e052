"""Evaluates an exported folder: ``python -m scripts.demo_model.evaluate``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from scripts.demo_model.generation import Oracle
from scripts.demo_model.measures import Measure, all_measures
from scripts.demo_model.train import PACKAGE_FOLDER

SAMPLE_CONVERSATION = (
    "Hello!",
    "What is the largest ocean?",
    "What is a KV cache?",
    "What is 37 + 45?",
    "And 58 plus 67?",
    "Who is the president of Belarus?",
    "Tell me a short story about a fox.",
    "Thank you!",
    "What is asynchronized softmax?",
    "Name the capital of Norway.",
    "Another story, please.",
    "Goodbye!",
)
SAMPLE_PROMPTS = ("Once upon a time", "What is the largest ocean?", "12 + 30 =", "The capital of Japan is")


def format_row(measure: Measure) -> str:
    value = f"{measure.value:7.1%}" if measure.unit == "share" else f"{measure.value:7.3f} nats/token"
    return f"{measure.name:<36}{measure.cases:>7}  {value}"


def print_table(oracle: Oracle, shown_misses: int) -> list[Measure]:
    """Print each row as it is measured, then a few wrong answers."""
    print(f"{'measure':<36}{'cases':>7}  {'value':>7}")
    measures = []
    for measure in all_measures(oracle):
        print(format_row(measure), flush=True)
        measures.append(measure)
    for measure in measures:
        for miss in measure.misses[:shown_misses]:
            print(f"  wrong, {measure.name}: {miss}")
    return measures


def print_samples(oracle: Oracle) -> list[tuple[str, str]]:
    """Print one conversation of several turns and some continued plain prompts."""
    samples = list(zip(SAMPLE_CONVERSATION, oracle.converse(SAMPLE_CONVERSATION), strict=True))
    for question, reply in samples:
        print(f"\nuser:      {question}\nassistant: {reply}")
    begin = oracle.tokenizer.bos_token
    for prompt in SAMPLE_PROMPTS:
        continued = oracle.complete([begin + prompt], 160)[0]
        samples.append((prompt, continued))
        print(f"\nplain:     {prompt}[]{continued}")
    return samples


def write_json(path: Path, measures: Sequence[Measure], samples: Sequence[tuple[str, str]]) -> None:
    content = {"measures": [asdict(measure) for measure in measures], "samples": samples}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate the demo model under greedy decoding.")
    parser.add_argument("--model", type=Path, default=PACKAGE_FOLDER, help="exported folder (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write measures and samples to this file")
    parser.add_argument(
        "--misses", type=int, default=5, help="wrong answers to show per measure (default: %(default)s)"
    )
    arguments = parser.parse_args()
    oracle = Oracle(arguments.model)
    measures = print_table(oracle, arguments.misses)
    samples = print_samples(oracle)
    if arguments.json:
        write_json(arguments.json, measures, samples)


if __name__ == "__main__":
    main()
