"""A clock that stands still unless a test moves it."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest


def set_engine_clock(monkeypatch: pytest.MonkeyPatch, monotonic: Callable[[], float]) -> None:
    """What engines take for the time, in seconds."""
    for module in ("engine", "steps_in_flight"):
        monkeypatch.setattr(f"headrace.engine.{module}.time", SimpleNamespace(monotonic=monotonic))
