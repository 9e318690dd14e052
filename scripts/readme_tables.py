"""Writes the README's tables from what the measuring commands wrote: ``python -m scripts.readme_tables``.

    python -m scripts.demo_model.evaluate --json runs/evaluation.json
    python -m scripts.demo_model.formats --json runs/formats.json
    headrace bench --json > runs/bench.json
    python -m bench.compare comparison.toml --json runs/peers.json
    python -m bench.serve_compare --model MODEL --quantize int4 --json runs/load.json ...
    python -m scripts.readme_tables

A table stands between `<!-- name -->` and `<!-- /name -->`; everything else in the README is left as it is, and so is a
table whose command has not been run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.report import table as peers
from bench.serve_report import table as load

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RUNS = ROOT / "runs"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def evaluation(data: dict[str, Any]) -> str:
    rows = []
    for measure in data["measures"]:
        is_share = measure["unit"] == "share"
        value = (
            f"{measure['value']:.1%}" if is_share else f"{measure['value']:.3f} {measure['unit'].replace('/', ' per ')}"
        )
        rows.append([measure["name"], str(measure["cases"]), value])
    return markdown(["greedy answers of the shipped model", "cases", "result"], rows)


def formats(rows: list[dict[str, Any]]) -> str:
    cells = [
        [
            row["format"],
            f"{row['weight_bytes'] / 1e6:.2f} MB",
            f"{row['share_correct']:.1%}",
            f"{row['stories_loss']:.4f}",
            f"{row['dialogues_loss']:.4f}",
            f"{row['same_token']:.2%}",
        ]
        for row in rows
    ]
    sums, losses = f"{rows[0]['cases']} held-out sums right", ["loss, stories", "loss, dialogues"]
    return markdown(["format", "weights", sums, *losses, "same token as bfloat16"], cells)


def bench(data: dict[str, Any]) -> str:
    rows = []
    for key, floor in data["limits"]["floors"].items():
        size = key.rpartition("_")[2]
        rate = data["batched_decode"][size] if key.startswith("batched_decode") else data[key]
        rows.append([key.replace("_", " "), f"{rate:,.1f}", floor["bound"], f"{floor['share_of_limit']:.1%}"])
    limits, machine = data["limits"], data["machine"]
    peaks = ", ".join(f"{value:,.0f} Gop/s {name}" for name, value in limits["multiply_gops"].items())
    date = datetime.fromisoformat(data["date"]).astimezone(UTC).date()
    caption = (
        f"{data['model']}, {data['formats']['linear']}, {limits['num_threads']} threads of {machine['cpu']}, {date}; "
        f"limits measured in the same run: {limits['read_gb_per_s']:.1f} GB/s read, {peaks}."
    )
    return markdown(["", "tokens/s", "bound by", "share of limit"], rows) + "\n\n" + caption


def fill(text: str, name: str, table: str) -> str:
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", flags=re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no <!-- {name} --> ... <!-- /{name} -->")
    return pattern.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text)


TABLES: dict[str, Callable[[Any], str]] = {
    "evaluation": evaluation,
    "formats": formats,
    "bench": bench,
    "peers": peers,
    "peers-135m": peers,
    "load": load,
}


def main() -> None:
    text = README.read_text(encoding="utf-8")
    for name, render in TABLES.items():
        file = RUNS / f"{name}.json"
        if file.exists():
            text = fill(text, name, render(json.loads(file.read_text(encoding="utf-8"))))
        else:
            print(f"{file.relative_to(ROOT)} is not there; its table stays as it is")
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
