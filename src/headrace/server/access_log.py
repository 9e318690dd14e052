"""The access log: one line for each request that has ended, for people or for programs."""

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from headrace.config.observability import LogFormat
from headrace.errors import ConfigError
from headrace.server.line_writer import LineWriter
from headrace.server.request_record import RequestRecord

_QUIET_PATHS = frozenset({"/health", "/metrics", "/stats"})
"""Asked for all the time by programs that watch the server, and worth a line only when that fails."""


class AccessLog:
    """Appends to a file or to stderr, and drops lines rather than wait for either. Neither a key nor a query nor a body
    is ever in a line.

    api_keys: which a line names by the first 8 digits of their SHA-256.

    Raises:
        ConfigError: the file cannot be written to.
    """

    def __init__(self, log_format: LogFormat, file: Path | None, api_keys: Sequence[str]) -> None:
        self._format = _FORMATS[log_format]
        self._key_names = [key_name(key) for key in api_keys]
        self._num_dropped = 0
        try:
            self._writer = LineWriter(None if file is None else file.open("a", encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot write the access log to {file}: {error.strerror or error}") from None

    def write(self, record: RequestRecord) -> None:
        if record.path in _QUIET_PATHS and record.status == 200:
            return
        key = None if record.api_key is None else self._key_names[record.api_key]
        fields = _fields(record, key)
        if self._num_dropped:
            fields["dropped_before"] = self._num_dropped
        self._num_dropped = 0 if self._writer.put(self._format(fields)) else self._num_dropped + 1

    def close(self) -> None:
        self._writer.close()


def key_name(key: str) -> str:
    """What a key is called in logs, from which nobody gets it back."""
    return f"sha256:{sha256(key.encode()).hexdigest()[:8]}"


def _fields(record: RequestRecord, api_key: str | None) -> dict[str, Any]:
    """Counts and times of the engine are null for a request that nothing ran for."""
    has_run = bool(record.metrics)
    return {
        "time": datetime.fromtimestamp(record.started_ns / 1e9, UTC).isoformat(timespec="milliseconds"),
        "request_id": record.request_id,
        "client": record.client,
        "api_key": api_key,
        "method": record.method,
        "path": record.path,
        "status": record.status or None,
        "disconnected": record.is_disconnected,
        "duration_s": round(record.duration_s, 6),
        "queue_s": _rounded(record.queue_s),
        "ttft_s": _rounded(record.ttft_s),
        "prompt_tokens": record.num_prompt_tokens if has_run else None,
        "cached_tokens": record.num_cached_tokens if has_run else None,
        "completion_tokens": record.num_completion_tokens if has_run else None,
        "finish_reasons": record.finish_reasons,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _as_text(fields: dict[str, Any]) -> str:
    # A path may have any characters, line feeds among them.
    path = fields["path"].encode("unicode_escape").decode()
    parts = [fields["time"], fields["client"], fields["method"], path, str(fields["status"] or "-")]
    parts.append(f"{fields['duration_s']:.3f}s")
    if fields["prompt_tokens"] is not None:
        parts.append(f"{fields['prompt_tokens']}+{fields['completion_tokens']} tokens")
    if fields["ttft_s"] is not None:
        parts.append(f"first after {fields['ttft_s']:.3f}s")
    if fields["finish_reasons"]:
        parts.append(",".join(fields["finish_reasons"]))
    if fields["disconnected"]:
        parts.append("client left")
    if fields["api_key"] is not None:
        parts.append(fields["api_key"])
    if "dropped_before" in fields:
        parts.append(f"(after {fields['dropped_before']} lines that could not be written in time)")
    return " ".join([*parts, fields["request_id"]])


_FORMATS: dict[LogFormat, Callable[[dict[str, Any]], str]] = {LogFormat.JSON: json.dumps, LogFormat.TEXT: _as_text}
