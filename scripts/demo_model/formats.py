"""What each format costs in answers and in loss, through Headrace itself: ``python -m scripts.demo_model.formats``.

Every held-out sum is asked once in each format, greedily; held-out stories and dialogues are scored as `headrace bench
quality` scores a text. The same prompts and texts, so differences are the format's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

from tokenizers import Tokenizer

from headrace import LLM, SamplingParams
from headrace.bench.quality import FORMATS, REFERENCE, QualityFormat, TokenScore, compare, score_windows
from headrace.demo_model import demo_model_path
from scripts.demo_model import arithmetic
from scripts.demo_model.batches import encode
from scripts.demo_model.corpus import Document
from scripts.demo_model.held_out import held_out_dialogues, held_out_stories

NUM_DOCUMENTS = 100


def held_out_questions(seed: int = 0) -> list[tuple[str, str]]:
    """Every held-out pair in one wording, and its answer."""
    rng = Random(seed)
    pairs = sorted(arithmetic.held_out_pairs())
    return [(rng.choice(arithmetic.TEMPLATES).format(*pair), arithmetic.answer(pair)) for pair in pairs]


def load(quality_format: QualityFormat) -> LLM:
    return LLM(
        demo_model_path(),
        dtype=quality_format.dtype.value,
        quantize=quality_format.quantize.value,
        kv_cache_dtype=quality_format.kv_cache.value,
    )


def share_correct(llm: LLM, cases: list[tuple[str, str]]) -> float:
    conversations = [[{"role": "user", "content": question}] for question, _ in cases]
    outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=24))
    return sum(output.outputs[0].text == answer for output, (_, answer) in zip(outputs, cases, strict=True)) / len(
        cases
    )


def scores(llm: LLM, documents: list[Document]) -> list[TokenScore]:
    """Of all tokens but the first of each document, as in the evaluation's losses over all tokens."""
    tokenizer = Tokenizer.from_file(str(demo_model_path() / "tokenizer.json"))
    windows = [encode([document], tokenizer)[0] for document in documents]
    return score_windows(llm.engine, windows, lambda _: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the rows to a file")
    arguments = parser.parse_args()
    cases = held_out_questions()
    stories = [Document(text=story) for story in held_out_stories(NUM_DOCUMENTS)]
    dialogues = held_out_dialogues(NUM_DOCUMENTS)
    reference = load(REFERENCE)
    expected = scores(reference, stories), scores(reference, dialogues)
    rows = []
    print(f"{'format':<21}{'weights':>9}  {'held-out sums':>13}  {'stories':>8}  {'dialogues':>9}  {'same token':>10}")
    for quality_format in FORMATS:
        llm = load(quality_format)
        in_stories, in_dialogues = scores(llm, stories), scores(llm, dialogues)
        row = {
            "format": quality_format.name,
            "weight_bytes": llm.engine.model.weight_bytes,
            "share_correct": share_correct(llm, cases),
            "cases": len(cases),
            "stories_loss": compare(expected[0], in_stories).loss,
            "dialogues_loss": compare(expected[1], in_dialogues).loss,
            "same_token": compare([*expected[0], *expected[1]], [*in_stories, *in_dialogues]).agreement,
            "num_tokens": len(in_stories) + len(in_dialogues),
        }
        rows.append(row)
        print(
            f"{row['format']:<21}{row['weight_bytes'] / 1e6:>6.2f} MB  {row['share_correct']:>13.1%}  "
            f"{row['stories_loss']:>8.4f}  {row['dialogues_loss']:>9.4f}  {row['same_token']:>10.2%}",
            flush=True,
        )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
