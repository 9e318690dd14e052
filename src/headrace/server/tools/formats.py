"""The formats by name, and which one a model was trained on."""

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from headrace.errors import ConfigError, nearest_name
from headrace.server.tools.definitions import FunctionTool
from headrace.server.tools.hermes import HermesFormat
from headrace.server.tools.lark import TokenNames
from headrace.server.tools.llama3 import Llama3Format
from headrace.server.tools.parser import ToolCallParser
from headrace.server.tools.qwen import QwenFormat

AUTO = "auto"


class ToolFormat(Protocol):
    """How a family of models writes calls."""

    @property
    def name(self) -> str: ...

    def make_parser(self, tools: Sequence[FunctionTool]) -> ToolCallParser:
        """A parser for one output."""

    def forced_grammar(self, tools: Sequence[FunctionTool], tokenizer: TokenNames, *, is_single: bool) -> str:
        """Lark whose language is one call, or several, of these functions and nothing else."""

    def free_grammar(self, tools: Sequence[FunctionTool], tokenizer: TokenNames, *, is_single: bool) -> str:
        """Lark whose language is any text, in which calls, once begun, are of these functions.

        Arguments of strict functions follow their schema.
        """


FORMATS: Mapping[str, ToolFormat] = {f.name: f for f in (HermesFormat(), Llama3Format(), QwenFormat())}

_NAMES_TOOLS = re.compile(r"\btools\b")
_HERMES_KEY = re.compile(r"""\\?["']arguments\\?["']""")
_LLAMA3_KEY = re.compile(r"""\\?["']parameters\\?["']""")


def shows_tools(template_source: str) -> bool:
    """Whether a chat template tells the model of tools at all."""
    return bool(_NAMES_TOOLS.search(template_source))


def resolve_tool_format(name: str, template_source: str) -> ToolFormat | None:
    """The format of a name; of 'auto', that which the chat template teaches the model.

    None: 'auto' cannot tell. Such a model can still answer, but requests with tools are refused.

    Raises:
        ConfigError: there is no format of that name.
    """
    if name == AUTO:
        found = detect_tool_format(template_source)
        return None if found is None else FORMATS[found]
    if name not in FORMATS:
        raise ConfigError(f"there is no tool format '{name}'; {nearest_name(name, [AUTO, *FORMATS])}")
    return FORMATS[name]


def detect_tool_format(template_source: str) -> str | None:
    if not shows_tools(template_source):
        return None
    if "<function=" in template_source and "<parameter=" in template_source:
        return "qwen"
    if "<tool_call>" in template_source:  # GLM writes tags between these, and no JSON
        return "hermes" if _HERMES_KEY.search(template_source) else None
    if "<|start_header_id|>" in template_source and _LLAMA3_KEY.search(template_source):
        return "llama3"
    return None
