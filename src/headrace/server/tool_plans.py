"""From a request's tools and the model that is served to a plan."""

from collections.abc import Mapping, Sequence
from typing import Any

from headrace.engine.json_schema import check_json_schema
from headrace.errors import RequestError
from headrace.server.context import ServerContext
from headrace.server.errors import InvalidParameter
from headrace.server.prompts import tokenizer_of
from headrace.server.tools import (
    NO_TOOLS,
    FunctionTool,
    ToolPlan,
    parse_tool_choice,
    parse_tools,
    plan_tools,
    resolve_tool_format,
    shows_tools,
)


def tool_plan(
    context: ServerContext,
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any] | None,
    parallel_tool_calls: bool | None,
    *,
    has_output_form: bool,
    is_flat: bool = False,
) -> ToolPlan:
    """What a route needs to know of a request's tools.

    The prompt is rendered with `plan.template_tools`, of messages from `prepare_messages`; the sampling parameters go
    through `plan.apply`; and each output's text goes through a parser of its own from `plan.make_parser`, if there is
    one, whose calls change the `finish_reason`.

    is_flat: the Responses API's shapes. has_output_form: the request prescribes the output's form, too.

    Raises:
        RequestError: the tools are wrong, or this model cannot serve them.
    """
    parsed = parse_tools(tools, is_flat=is_flat)
    choice = parse_tool_choice(tool_choice, parsed, parallel_tool_calls, is_flat=is_flat)
    if not choice.tools:
        return NO_TOOLS
    _check_strict(parsed, "parameters" if is_flat else "function.parameters")
    model = context.model
    tokenizer = tokenizer_of(model)
    source = model.chat_template.tool_source if model.chat_template else ""
    return plan_tools(
        choice,
        resolve_tool_format(context.config.tool_format, source),
        tokenizer,
        shows_tools=shows_tools(source),
        has_output_form=has_output_form,
    )


def _check_strict(tools: Sequence[FunctionTool], field: str) -> None:
    """Refuse here what would be refused when the calls' grammar is compiled, where no field's name is known."""
    for index, tool in enumerate(tools):
        if tool.strict:
            where = f"tools[{index}].{field}"
            try:
                check_json_schema(tool.schema)
            except RequestError as error:
                raise InvalidParameter(where, f"{where}: {error}") from None
