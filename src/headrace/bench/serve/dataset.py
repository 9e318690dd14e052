"""Prompts from a file of a person's own.

JSON lines of {"prompt": text or token ids} or {"messages": [...]}, with "output_tokens" where a line has an output
length of its own; or ShareGPT's JSON, a list of {"conversations": [{"from": ..., "value": ...}, ...]}, of which the
first two turns are the prompt and what was answered.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.bench.serve.prompts import Prompt
from headrace.errors import ConfigError


@dataclass(frozen=True)
class Sample:
    """Of prompt and messages exactly one is there. output_tokens: None if the file has none for it."""

    prompt: Prompt | None = None
    messages: list[dict[str, Any]] | None = None
    output_tokens: int | None = None


def read_samples(file: Path) -> list[Sample]:
    """
    Raises:
        ConfigError: a line that is no prompt; says which.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is no text in UTF-8: {error}") from None
    if text.lstrip().startswith("["):
        entries = list(_share_gpt(_parse(text, str(file)), file))
    else:
        entries = [
            (f"{file}, line {i}", _parse(line, f"{file}, line {i}"))
            for i, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    samples = [_sample(entry, where) for where, entry in entries]
    if not samples:
        raise ConfigError(f"{file} has no prompts")
    return samples


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _share_gpt(entries: list[Any], file: Path) -> Iterator[tuple[str, Any]]:
    """Conversations that have no first question are left out, as everybody does who measures with that file."""
    for i, entry in enumerate(entries, start=1):
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list):
            yield f"{file}, entry {i}", entry
        elif turns and isinstance(turns[0], dict) and turns[0].get("value"):
            yield f"{file}, entry {i}", {"prompt": turns[0]["value"]}


def _sample(entry: Any, where: str) -> Sample:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} is {entry!r:.80}; give an object with a prompt or messages")
    output_tokens = entry.get("output_tokens")
    if output_tokens is not None and not (_is_whole(output_tokens) and output_tokens > 0):
        raise ConfigError(f"{where}: output_tokens is {output_tokens!r:.80}; give a whole number of at least 1")
    prompt, messages = entry.get("prompt"), entry.get("messages")
    if (prompt is None) == (messages is None):
        raise ConfigError(f"{where}: give a prompt or messages")
    if messages is not None:
        if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
            raise ConfigError(f"{where}: messages are {messages!r:.80}; give a list of objects")
        return Sample(messages=messages, output_tokens=output_tokens)
    is_text = isinstance(prompt, str) and bool(prompt)
    is_ids = isinstance(prompt, list) and bool(prompt) and all(_is_whole(i) and i >= 0 for i in prompt)
    if not (is_text or is_ids):
        raise ConfigError(f"{where}: the prompt is {prompt!r:.80}; give a text or a list of token ids")
    return Sample(prompt=prompt, output_tokens=output_tokens)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
