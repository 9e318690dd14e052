"""What each weight format costs in answers, through Headrace itself: ``python -m scripts.demo_model.formats``.

Every held-out sum is asked once in each format, greedily. The same prompts, so differences are the format's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

from headrace import LLM, SamplingParams
from headrace.demo_model import demo_model_path
from scripts.demo_model import arithmetic

FORMATS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantize": "int8"},
    "int4": {"dtype": "bfloat16", "quantize": "int4"},
}


def held_out_questions(seed: int = 0) -> list[tuple[str, str]]:
    """Every held-out pair in one wording, and its answer."""
    rng = Random(seed)
    pairs = sorted(arithmetic.held_out_pairs())
    return [(rng.choice(arithmetic.TEMPLATES).format(*pair), arithmetic.answer(pair)) for pair in pairs]


def measure(name: str, cases: list[tuple[str, str]]) -> dict[str, object]:
    llm = LLM(model=demo_model_path(), **FORMATS[name])
    conversations = [[{"role": "user", "content": question}] for question, _ in cases]
    outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=24))
    correct = sum(output.outputs[0].text == answer for output, (_, answer) in zip(outputs, cases, strict=True))
    return {
        "format": name,
        "weight_bytes": llm.engine.model.weight_bytes,
        "share_correct": correct / len(cases),
        "cases": len(cases),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the rows to a file")
    arguments = parser.parse_args()
    cases, rows = held_out_questions(), []
    print(f"{'format':<10}{'weights':>12}  {'held-out sums':>13}")
    for name in FORMATS:
        row = measure(name, cases)
        rows.append(row)
        print(f"{name:<10}{row['weight_bytes'] / 1e6:>9.2f} MB  {row['share_correct']:>13.1%}", flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
