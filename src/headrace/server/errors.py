"""What a server says when it does not do what was asked: exceptions, and OpenAI's error objects for them.

An error object is {"error": {"message", "type", "param", "code"}}; `param` names the field that is at fault.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from headrace.config.refusals import shown
from headrace.errors import ContextLengthError, EngineStopped, HeadraceError, RequestError

_FIELD_NAME = re.compile(r"(?!(str|int|float|bool|dict)$)\w+")
"""pydantic puts the types of a union between the names: `str`, `list[str]`, `constrained-int`."""


_WANTED = "Input should be "


class ServerError(HeadraceError):
    """Why the server, rather than the request, is at fault; retry_after_s: when to ask again."""

    status = 500
    kind = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Overloaded(ServerError):
    """The queue is full."""

    status, kind, code = 429, "rate_limit_error", "queue_full"


class Unavailable(ServerError):
    """The engine is starting, ending, or was lost with its requests."""

    status, kind, code = 503, "service_unavailable_error", "unavailable"


class TimedOut(ServerError):
    status, kind, code = 504, "timeout_error", "timeout"


class ClientLeft(ServerError):
    """Nobody is there any more to read an answer. 499 is what web servers write into their logs then."""

    status, kind, code = 499, "client_closed_request", "client_left"


class ModelNotFound(RequestError):
    """A request for another model than the one that is served."""


class InvalidParameter(RequestError):
    """A request's fault, in a field that can be named."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message, param=param)


@contextmanager
def blaming(param: str) -> Iterator[None]:
    """What is a request's fault in here, and names no field, is this one's."""
    try:
        yield
    except RequestError as error:
        error.param = error.param or param
        raise


def error_object(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def status_of(error: HeadraceError) -> int:
    """The HTTP status that an error is answered with."""
    if isinstance(error, ServerError):
        return error.status
    if isinstance(error, ModelNotFound):
        return 404
    if isinstance(error, RequestError):
        return 400
    return 503 if isinstance(error, EngineStopped) else 500


def object_of(error: HeadraceError) -> dict[str, Any]:
    """The error object of an exception that Headrace raises on purpose."""
    message = str(error)
    if isinstance(error, ServerError):
        return error_object(message, error.kind, code=error.code)
    if isinstance(error, ContextLengthError):
        return error_object(message, "invalid_request_error", param=error.param, code="context_length_exceeded")
    if isinstance(error, ModelNotFound):
        return error_object(message, "invalid_request_error", param="model", code="model_not_found")
    if isinstance(error, RequestError):
        return error_object(message, "invalid_request_error", param=error.param)
    kind = Unavailable.kind if isinstance(error, EngineStopped) else ServerError.kind
    return error_object(message, kind)


def headers_of(error: HeadraceError) -> dict[str, str]:
    retry_after_s = getattr(error, "retry_after_s", None)
    return {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}


def explain_validation(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """One sentence on what is wrong with a body, and the name of the first field at fault.

    errors: as pydantic lists them.
    """
    first = errors[0]
    param = ".".join(_field(first)) or None
    if first.get("type") == "unsupported":
        return str(first["msg"]), ".".join([*_field(first), first["ctx"]["name"]])
    if first.get("type") == "extra_forbidden":
        return f"'{param}' is not a field that this server knows; leave it out", param
    if first.get("type") == "json_invalid":
        reason = (first.get("ctx") or {}).get("error", "it cannot be parsed")
        return f"the body is not valid JSON: {reason}", None
    what = param or "the body"
    if first.get("type") == "missing":
        return (f"{param} is missing; send it" if param else "the body is empty; send a JSON object"), param
    # A field of several types has an error for each of them, of the field or of an item that it may have.
    of_field = [error for error in errors if _field(error) == _field(first)]
    reasons = dict.fromkeys(map(_reason, of_field))
    wanted = [reason.removeprefix(_WANTED) for reason in reasons if reason.startswith(_WANTED)]
    if len(wanted) < len(reasons):
        return f"{what}: {', or '.join(reasons)}", param
    given = {_given(error.get("input")) for error in of_field}
    is_given = f"{what} is {given.pop()}; it" if len(given) == 1 else what
    return f"{is_given} should be {', or '.join(wanted)}", param


def _field(error: Mapping[str, Any]) -> list[str]:
    """Where an error lies, by the names of fields and the places in lists, without those of types."""
    field: list[str] = []
    for part in error.get("loc", ()):
        if isinstance(part, str) and not _FIELD_NAME.fullmatch(part):
            break
        if part not in ("body", "query"):
            field.append(str(part))
    return field


def _given(value: Any) -> str:
    """Of a list or an object only that it is one: the reason lies in it as a whole."""
    if isinstance(value, list | dict):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value) if value is None or isinstance(value, bool) else shown(value)


def _reason(error: Mapping[str, Any]) -> str:
    return str(error.get("msg", "it is not valid")).removeprefix("Value error, ")
