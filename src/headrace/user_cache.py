"""Where Headrace keeps what it found out for this user."""

import os
from pathlib import Path


def user_cache_folder() -> Path:
    """As the XDG base directory specification places it; it may not exist yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "headrace"
