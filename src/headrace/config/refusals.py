"""How a request's values are refused: what was given, cut to a size that fits a line, and what is allowed."""

import reprlib

from headrace.errors import RequestError

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 80


def refusal(name: str, given: object, allowed: str, *, param: str | None = None) -> RequestError:
    """
    name: a field, or what it is of one; then param is the field.
    """
    param = param or (name if name.isidentifier() else None)
    return RequestError(f"{name} is {shown(given)}; allowed: {allowed}", param=param)


def shown(given: object) -> str:
    """A short picture of any value; Python refuses to print integers of thousands of digits."""
    try:
        return _SHOWN.repr(given)
    except ValueError:
        return f"a huge {type(given).__name__}"


def clipped(name: object) -> str:
    """At most 80 characters, so that comparing a hostile name with the known ones stays cheap."""
    return str(name)[:80]
