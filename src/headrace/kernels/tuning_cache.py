"""What was measured on this user's machine, kept for later starts: one file for each machine, a section for each kind.

A kind of measurement says with a `Section` how its results are written; the cache does the rest alike for all.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Generic, TypeVar

from headrace.user_cache import user_cache_folder

K = TypeVar("K")
V = TypeVar("V")

_SECTIONS = ("linear", "attention", "prefill", "mixture")
"""In the file's order."""


@dataclass(frozen=True, kw_only=True)
class TuningKey:
    """What a measurement holds for. kernels: a digest of the compiled kernels."""

    cpu: str
    num_threads: int
    instruction_set: str
    kernels: str


@dataclass(frozen=True, kw_only=True)
class DeviceTuningKey:
    """The same for a GPU. toolkit: version of CUDA or ROCm; kernels: a digest of the sources of the kernels."""

    device: str
    toolkit: str
    torch: str
    triton: str
    kernels: str


def _later(earlier: V, later: V) -> V:  # noqa: ARG001
    return later


@dataclass(frozen=True, kw_only=True)
class Section(Generic[K, V]):
    """A kind of measurement: what it is of (a shape, say), and what was found.

    from_json: the inverse of to_json; of what is broken a ValueError, KeyError, TypeError or AttributeError.
    join: an earlier and a later result of the same; the later one alone, if none is given.
    """

    name: str
    to_json: Callable[[K, V], dict[str, Any]]
    from_json: Callable[[dict[str, Any]], tuple[K, V]]
    join: Callable[[V, V], V] = _later


class TuningCache:
    """Measurements of this user's machine, one file for each key.

    A file, or a section of it, that cannot be read counts as none: what it held can be measured again.
    """

    def __init__(self, key: TuningKey | DeviceTuningKey, folder: Path | None = None) -> None:
        self._key = asdict(key)
        name = sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()[:16]
        self.file = (folder or default_folder()) / f"{name}.json"

    def load(self, section: Section[K, V]) -> dict[K, V]:
        """What was kept."""
        try:
            return dict(map(section.from_json, self._read(section.name)))
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}

    def keep(self, section: Section[K, V], found: Mapping[K, V]) -> bool:
        """Save for the next start, beside all else that is kept; whether that was possible. A cache that cannot be
        written is no reason to fail."""
        known = self.load(section)
        for key, value in found.items():
            known[key] = section.join(known[key], value) if key in known else value
        entries = [section.to_json(*item) for item in known.items()]
        try:
            self._write({name: self._read(name) for name in _SECTIONS} | {section.name: entries})
        except OSError:
            return False
        return True

    def _read(self, name: str) -> list[dict[str, Any]]:
        """The entries of a section as JSON has them; none if the file or the section is missing or broken."""
        try:
            entries = json.loads(self.file.read_text())[name]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        return entries if isinstance(entries, list) else []

    def _write(self, sections: Mapping[str, list[dict[str, Any]]]) -> None:
        """Beside the file and moved over it, so that a reader never sees half of one."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(f".{os.getpid()}.part")
        partial.write_text(json.dumps({"key": self._key, **sections}, indent=1))
        partial.replace(self.file)


def default_folder() -> Path:
    return user_cache_folder() / "tuning"
