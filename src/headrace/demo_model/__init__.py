"""A small Llama-architecture chat model as package data, so that every command can run without a download.

It was trained from scratch by ``scripts/demo_model``: it answers short questions about language-model inference and
common facts, adds numbers of up to two digits and tells short stories.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["DEMO", "demo_model_path"]

DEMO = "demo"
"""Names the model wherever a folder or a hub id does; a folder called demo is ./demo."""


def demo_model_path() -> Path:
    """The folder with ``config.json``, ``model.safetensors`` and the tokenizer files."""
    return Path(__file__).resolve().parent
