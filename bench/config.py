"""Which engines are compared, read from a TOML file that `bench.setup_peers` writes or a person does.

    checkpoint = "models/tinyllama"     # the Hugging Face folder that all others were converted from
    threads = 2

    [[engine]]
    engine = "headrace"                 # runs in this environment
    format = "int4"                     # int4, int8 or none, as --quantize takes them
    batch_invariant = false             # for --no-batch-invariant; a row of its own

    [[engine]]
    engine = "llamacpp"                 # a module of bench/peers
    format = "q4_0"                     # a name for the table
    python = "envs/llamacpp/bin/python"
    model = "models/tinyllama-q4_0.gguf"

Paths are relative to the file.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADRACE = "headrace"
PEERS = ("llamacpp", "onnxruntime", "openvino", "ctranslate2", "transformers")


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """One row of the comparison.

    python: the interpreter of the engine's own environment, None for this one. batch_invariant: Headrace's own setting.
    """

    engine: str
    format: str
    model: Path
    python: Path | None = None
    batch_invariant: bool = True

    @property
    def format_name(self) -> str:
        """For the table."""
        return self.format if self.batch_invariant else f"{self.format}, not batch invariant"

    @property
    def key(self) -> str:
        return f"{self.engine} {self.format_name}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    checkpoint: Path
    threads: int
    engines: tuple[EngineSpec, ...]


def read_comparison(file: Path) -> Comparison:
    """
    Raises:
        SystemExit: the file says something that cannot be compared.
    """
    data = tomllib.loads(file.read_text(encoding="utf-8"))
    folder = file.resolve().parent
    checkpoint = folder / _text(data, "checkpoint", file)
    engines = tuple(_engine(entry, folder, checkpoint, file) for entry in _entries(data, file))
    keys = [engine.key for engine in engines]
    if len(set(keys)) < len(keys):
        raise SystemExit(f"{file}: two engines have the same name and format: {', '.join(sorted(keys))}")
    threads = data.get("threads", 1)
    if not isinstance(threads, int) or threads < 1:
        raise SystemExit(f"{file}: threads is {threads!r}; it must be a whole number of at least 1")
    return Comparison(checkpoint=checkpoint, threads=threads, engines=engines)


def _entries(data: Mapping[str, Any], file: Path) -> Sequence[Mapping[str, Any]]:
    entries = data.get("engine")
    if not isinstance(entries, list) or not entries:
        raise SystemExit(f"{file}: there is no [[engine]] to run")
    return entries


def _engine(entry: Mapping[str, Any], folder: Path, checkpoint: Path, file: Path) -> EngineSpec:
    engine = _text(entry, "engine", file)
    if engine == HEADRACE:
        batch_invariant = entry.get("batch_invariant", True)
        if not isinstance(batch_invariant, bool):
            raise SystemExit(f"{file}: batch_invariant is {batch_invariant!r}; it must be true or false")
        return EngineSpec(
            engine=engine,
            format=_text(entry, "format", file),
            model=checkpoint,
            batch_invariant=batch_invariant,
        )
    if engine not in PEERS:
        raise SystemExit(f"{file}: engine '{engine}' is unknown; allowed: {', '.join((HEADRACE, *PEERS))}")
    return EngineSpec(
        engine=engine,
        format=_text(entry, "format", file),
        model=folder / _text(entry, "model", file),
        # Not resolved: a virtual environment's interpreter is a link, and knows its place by its own name.
        python=folder / _text(entry, "python", file),
    )


def _text(entry: Mapping[str, Any], name: str, file: Path) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not value:
        raise SystemExit(f"{file}: {name} is {value!r} in {dict(entry)!r:.100}; give a text")
    return value
