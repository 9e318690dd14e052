"""The form that a request prescribes for its output, in any of the ways in which clients say it."""

from typing import Any

from headrace.config import StructuredOutputs
from headrace.errors import RequestError
from headrace.server.errors import InvalidParameter
from headrace.server.protocol.sampling import ResponseFormat, SamplingFields

_ANYTHING: dict[str, Any] = {}
"""The schema of any JSON."""


def structured_outputs_of(request: SamplingFields) -> StructuredOutputs | None:
    """`response_format`, vLLM's `structured_outputs`, and the older `guided_...`: one of them, or none.

    Raises:
        RequestError: several, or one that cannot be used.
    """
    found = {name: form for name, form in _forms(request).items() if form is not None}
    if len(found) > 1:
        names = " and ".join(found)
        raise InvalidParameter(min(found), f"{names} each prescribe the output's form; give one of them")
    for name, form in found.items():
        try:
            return StructuredOutputs.from_mapping(form)
        except RequestError as error:
            # As the client called it.
            error.param = name
            raise
    return None


def form_field_of(request: SamplingFields) -> str | None:
    """The field that prescribes a form, if one does; of a request that `structured_outputs_of` takes."""
    return next((name for name, form in _forms(request).items() if form is not None), None)


def _forms(request: SamplingFields) -> dict[str, dict[str, Any] | None]:
    own = request.structured_outputs
    return {
        "response_format": None if request.response_format is None else response_form(request.response_format),
        "structured_outputs": None if own is None else own.model_dump(by_alias=True, exclude_none=True),
        "guided_json": _named("json", request.guided_json),
        "guided_regex": _named("regex", request.guided_regex),
        "guided_choice": _named("choice", request.guided_choice),
        "guided_grammar": _named("grammar", request.guided_grammar),
    }


def response_form(given: ResponseFormat) -> dict[str, Any] | None:
    """
    Raises:
        InvalidParameter: type json_schema without a schema, or a schema without that type.
    """
    if (given.type == "json_schema") != (given.json_schema is not None):
        raise InvalidParameter("response_format", "response_format: json_schema goes with the type 'json_schema'")
    if given.type == "json_object":
        return {"json_object": True}
    if given.json_schema is None:
        return None
    schema = given.json_schema.schema_
    if schema is False:
        raise InvalidParameter("response_format", "response_format.json_schema.schema is false, which allows nothing")
    return {"json": _ANYTHING if schema in (None, True) else schema}


def _named(name: str, value: Any) -> dict[str, Any] | None:
    return None if value is None else {name: value}
