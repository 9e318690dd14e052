"""Tool calls: what a request may ask for, how a model is told, and its text read back as OpenAI's tool calls."""

from headrace.server.tools.choice import ToolChoice, parse_tool_choice
from headrace.server.tools.definitions import FunctionTool, parse_tools
from headrace.server.tools.deltas import ToolCallDelta, ToolDelta
from headrace.server.tools.formats import FORMATS, ToolFormat, resolve_tool_format, shows_tools
from headrace.server.tools.messages import prepare_messages
from headrace.server.tools.parser import ToolCallParser
from headrace.server.tools.plan import NO_TOOLS, ToolPlan, finish_reason, plan_tools
from headrace.server.tools.whole import ToolCall, parse_whole

__all__ = [
    "FORMATS",
    "NO_TOOLS",
    "FunctionTool",
    "ToolCall",
    "ToolCallDelta",
    "ToolCallParser",
    "ToolChoice",
    "ToolDelta",
    "ToolFormat",
    "ToolPlan",
    "finish_reason",
    "parse_tool_choice",
    "parse_tools",
    "parse_whole",
    "plan_tools",
    "prepare_messages",
    "resolve_tool_format",
    "shows_tools",
]
