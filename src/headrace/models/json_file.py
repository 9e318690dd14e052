"""JSON objects that come with a model. No torch."""

import json
from pathlib import Path
from typing import Any

from headrace.errors import CheckpointError


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, not UTF-8, not JSON, not an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} has no {file.name}; a model folder needs one") from None
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a {type(value).__name__}; it must hold a JSON object")
    return value
