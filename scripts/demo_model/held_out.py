"""Held-out text from a seed of its own: for losses here, and as input for perplexity checks of the engine.

``python -m scripts.demo_model.held_out held_out.txt`` writes some tens of kilobytes, one document per blank-line
separated block. No document of it occurs in the training text word for word, apart from short ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.demo_model.corpus import Corpus, Document, document_text
from scripts.demo_model.stories import any_character, tell

HELD_OUT_SEED = "held out"


def held_out_stories(count: int) -> list[str]:
    """Stories from a seed that training never uses."""
    rng = Corpus(f"{HELD_OUT_SEED} stories").rng
    return [tell(any_character(rng), rng) for _ in range(count)]


def held_out_dialogues(count: int) -> list[Document]:
    """Conversations from a seed that training never uses."""
    corpus = Corpus(f"{HELD_OUT_SEED} dialogues")
    return [corpus.conversation() for _ in range(count)]


def held_out_text(stories: int = 50, dialogues: int = 120) -> str:
    """About 50 KB of stories and dialogues."""
    blocks = [*held_out_stories(stories), *map(document_text, held_out_dialogues(dialogues))]
    return "\n\n".join(blocks) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the held-out text.")
    parser.add_argument("output", type=Path)
    output: Path = parser.parse_args().output
    output.write_text(held_out_text(), encoding="utf-8")
    print(f"wrote {output.stat().st_size} bytes to {output}")


if __name__ == "__main__":
    main()
