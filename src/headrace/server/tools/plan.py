"""What a request's tools mean for its prompt, its sampling and the reading of its answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headrace.config import SamplingParams
from headrace.server.errors import InvalidParameter
from headrace.server.tools.choice import ToolChoice
from headrace.server.tools.definitions import FunctionTool
from headrace.server.tools.formats import FORMATS, ToolFormat
from headrace.server.tools.lark import TokenNames
from headrace.server.tools.parser import ToolCallParser


@dataclass(frozen=True, kw_only=True)
class ToolPlan:
    """
    tools: those that the model is told of. grammar: Lark that the output must follow, None for none.
    """

    tools: tuple[FunctionTool, ...] = ()
    grammar: str | None = None
    format: ToolFormat | None = None

    @property
    def template_tools(self) -> list[dict[str, Any]] | None:
        """For `ChatTemplate.render`."""
        return [tool.to_mapping() for tool in self.tools] or None

    def apply(self, params: SamplingParams) -> SamplingParams:
        """The parameters of a request whose text this plan's parsers are to read."""
        if self.format is None:
            return params
        changes: dict[str, Any] = {"skip_special_tokens": False}  # the tags of calls may be special tokens
        if self.grammar is not None:
            changes["structured_outputs"] = {"grammar": self.grammar}
        return SamplingParams.from_mapping(params.to_mapping() | changes)

    def make_parser(self) -> ToolCallParser | None:
        """A parser for one output; None where text is only text."""
        return None if self.format is None else self.format.make_parser(self.tools)


NO_TOOLS = ToolPlan()


def plan_tools(
    choice: ToolChoice,
    tool_format: ToolFormat | None,
    tokenizer: TokenNames,
    *,
    shows_tools: bool,
    has_output_form: bool = False,
) -> ToolPlan:
    """
    tool_format, shows_tools: the model's format, and whether its chat template tells it of tools (see `formats`).
    has_output_form: the request asks for an output of a certain form besides.

    Raises:
        InvalidParameter: this model cannot serve tools, or not together with that form.
    """
    if not choice.tools:
        return NO_TOOLS
    if not shows_tools:
        raise InvalidParameter("tools", "the chat template of this model does not tell it of tools; leave tools out")
    if tool_format is None:
        raise InvalidParameter(
            "tools",
            "how this model writes tool calls is not known; leave tools out, or start the server with the tool format "
            f"of the model: {', '.join(FORMATS)}",
        )
    if has_output_form:
        raise InvalidParameter(
            "tools",
            "tools and a prescribed form of the output cannot be had together; leave out one of them, or set "
            "tool_choice to 'none'",
        )
    return ToolPlan(tools=choice.tools, grammar=_grammar(choice, tool_format, tokenizer), format=tool_format)


def _grammar(choice: ToolChoice, tool_format: ToolFormat, tokenizer: TokenNames) -> str | None:
    if choice.is_forced:
        return tool_format.forced_grammar(choice.tools, tokenizer, is_single=choice.is_single)
    if choice.is_single or _any_strict(choice.tools):
        return tool_format.free_grammar(choice.tools, tokenizer, is_single=choice.is_single)
    return None


def _any_strict(tools: Sequence[FunctionTool]) -> bool:
    return any(tool.strict for tool in tools)


def finish_reason(reason: str | None, num_calls: int) -> str | None:
    """OpenAI's finish_reason of an answer with calls."""
    return "tool_calls" if reason == "stop" and num_calls else reason
