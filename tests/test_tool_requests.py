"""What a request says of tools: checked, shown to the model by its chat template, and turned into a plan."""

import re

import pytest

from headrace.config import SamplingParams
from headrace.config.server import TOOL_FORMATS, ServerConfig
from headrace.errors import ConfigError, RequestError
from headrace.server.errors import InvalidParameter
from headrace.server.tools import (
    FORMATS,
    FunctionTool,
    finish_reason,
    parse_tool_choice,
    parse_tools,
    plan_tools,
    prepare_messages,
    resolve_tool_format,
    shows_tools,
)
from headrace.tokenizer import ChatTemplate

HERMES_TEMPLATE = """
{%- if tools %}{{- '<|im_start|>system\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' ~ tool | tojson }}{%- endfor %}
{{- '\\n</tools>\\nAnswer with\\n<tool_call>\\n{\\"name\\": <name>, \\"arguments\\": <object>}' }}
{{- '\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
    {{- '<|im_start|>user\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ call.function.arguments | tojson }}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
"""

LLAMA3_TEMPLATE = """
{%- for message in messages %}
    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' }}
    {%- if loop.first and tools is not none %}
        {{- 'Respond with {"name": function name, "parameters": dictionary of argument name and its value}.' }}
        {%- for tool in tools %}{{- tool | tojson(indent=4) }}{%- endfor %}
    {%- endif %}
    {%- if 'tool_calls' in message %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- "}" }}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
"""

QWEN_TEMPLATE = """
{%- for tool in tools or [] %}
    {{- '<function>\\n<name>' ~ tool.function.name ~ '</name>\\n' }}
    {%- for name, fields in tool.function.parameters.properties | items %}
        {{- '<parameter>' ~ name ~ ': ' ~ fields.type ~ '</parameter>\\n' }}
    {%- endfor %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>\\n<function=' ~ call.function.name ~ '>\\n' }}
        {%- for name, value in call.function.arguments | items %}
            {{- '<parameter=' ~ name ~ '>\\n' ~ value ~ '\\n</parameter>\\n' }}
        {%- endfor %}
        {{- '</function>\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
"""

PLAIN_TEMPLATE = "{%- for message in messages %}{{- message.content }}{%- endfor %}"
GLM_TEMPLATE = "{% for t in tools %}{{ t }}{% endfor %}<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>"

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name: str = "weather", **function):
    return {"type": "function", "function": {"name": name, **function}}


class NoTags:
    def token_to_id(self, token: str) -> int | None:
        return None


def test_tools_are_read():
    weather, now = parse_tools([tool(description="d", parameters=PARAMETERS, strict=True), tool("now", strict=None)])
    assert weather == FunctionTool(name="weather", description="d", parameters=PARAMETERS, strict=True)
    assert now == FunctionTool(name="now")
    assert weather.to_mapping() == tool(description="d", parameters=PARAMETERS)
    assert list(weather.to_mapping()["function"]) == ["name", "description", "parameters"]
    assert now.to_mapping() == tool("now")
    assert parse_tools([{"type": "function", "name": "now", "strict": False}], is_flat=True) == (now,)
    assert parse_tools(None) == parse_tools([]) == ()


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("x", "tools must be a list"),
        ({}, "tools must be a list"),
        ([tool(f"f{i}") for i in range(129)], "tools has 129 entries; at most 128"),
        ([1], r"tools\[0\] must be an object"),
        ([tool(), {"type": "web_search"}], r"tools\[1\].type is 'web_search'; only 'function'"),
        ([{"function": {}}], r"tools\[0\].type is absent"),
        ([{"type": "function"}], r"tools\[0\].function must be an object"),
        ([{**tool(), "name": "x"}], r"tools\[0\] has no field 'name'"),
        ([tool(paramters={})], r"tools\[0\].function has no field 'paramters'; did you mean 'parameters'"),
        ([tool("a b")], r"tools\[0\].function.name is 'a b'; it must be 1 to 64"),
        ([tool("é")], r"tools\[0\].function.name"),
        ([tool("a" * 65)], r"tools\[0\].function.name"),
        ([tool("f\n")], r"tools\[0\].function.name"),
        ([{"type": "function", "function": {}}], r"tools\[0\].function.name is absent"),
        ([tool(), tool("b"), tool()], r"tools\[2\] has the name 'weather' of tools\[0\]"),
        ([tool(description=1)], r"tools\[0\].function.description must be a string"),
        ([tool(strict="yes")], r"tools\[0\].function.strict must be true or false"),
        ([tool(parameters=[])], r"tools\[0\].function.parameters must be a JSON schema"),
        ([tool(parameters={"type": "array"})], r"tools\[0\].function.parameters.type is 'array'"),
        ([tool(parameters={"type": ["object"]})], r"tools\[0\].function.parameters.type is list"),
        ([tool(parameters={"properties": []})], r"tools\[0\].function.parameters.properties must be"),
        ([tool(parameters={"required": [1]})], r"tools\[0\].function.parameters.required must be"),
        ([tool(parameters={"required": "ab"})], r"tools\[0\].function.parameters.required must be"),
    ],
)
def test_a_bad_tool_is_named_by_its_index(tools, message):
    with pytest.raises(RequestError, match=message):
        parse_tools(tools)


def test_the_field_at_fault_is_named():
    with pytest.raises(InvalidParameter) as refused:
        parse_tools([tool(), tool("f", strict=1)])
    assert refused.value.param == "tools[1].function.strict"
    with pytest.raises(InvalidParameter) as refused:
        prepare_messages([{"role": "assistant", "tool_calls": [call("{")]}])
    assert refused.value.param == "messages[0].tool_calls[0].function.arguments"


def test_flat_tools_are_named_flat():
    with pytest.raises(RequestError, match=r"tools\[0\].name is 'a b'"):
        parse_tools([{"type": "function", "name": "a b"}], is_flat=True)


TOOLS = parse_tools([tool(), tool("now"), tool("then")])


@pytest.mark.parametrize(
    ("given", "parallel", "names", "is_forced", "is_single"),
    [
        (None, None, "weather now then", False, False),
        ("auto", True, "weather now then", False, False),
        ("auto", False, "weather now then", False, True),
        ("none", None, "", False, False),
        ("required", None, "weather now then", True, False),
        ("required", False, "weather now then", True, True),
        ({"type": "function", "function": {"name": "now"}}, None, "now", True, True),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool("then"), tool()]}},
            None,
            "weather then",
            False,
            False,
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [tool("now")]}},
            None,
            "now",
            True,
            False,
        ),
    ],
)
def test_choices(given, parallel, names, is_forced, is_single):
    choice = parse_tool_choice(given, TOOLS, parallel)
    assert " ".join(tool.name for tool in choice.tools) == names
    assert (choice.is_forced, choice.is_single) == (is_forced, is_single)


def test_flat_choices():
    choice = parse_tool_choice({"type": "function", "name": "now"}, TOOLS, is_flat=True)
    assert [tool.name for tool in choice.tools] == ["now"]
    given = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]}
    choice = parse_tool_choice(given, TOOLS, is_flat=True)
    assert [tool.name for tool in choice.tools] == ["now"]
    assert choice.is_forced


def test_without_tools_there_is_nothing_to_choose():
    for given in (None, "auto", "none"):
        assert parse_tool_choice(given, ()).tools == ()


@pytest.mark.parametrize(
    ("given", "tools", "message"),
    [
        ("any", TOOLS, "tool_choice is 'any'; allowed: 'none', 'auto', 'required'"),
        ("required", (), "tool_choice is 'required', but there is no tool"),
        (3, TOOLS, "tool_choice: allowed"),
        ({}, TOOLS, "tool_choice: allowed"),
        ({"type": "mcp"}, TOOLS, "tool_choice has the type 'mcp'; allowed"),
        ({"type": "function"}, TOOLS, "tool_choice.function must be an object"),
        ({"type": "function", "function": {}}, TOOLS, "tool_choice.function.name must be the name"),
        ({"type": "function", "function": {"name": "wether"}}, TOOLS, "not one of tools; did you mean 'weather'"),
        ({"type": "function", "function": {"name": "f"}}, (), "tool_choice.function.name is 'f', but there are no"),
        ({"type": "allowed_tools", "allowed_tools": {"tools": []}}, TOOLS, "allowed_tools.mode must be"),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
            TOOLS,
            "tools must be a list of at",
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool("f")]}},
            TOOLS,
            r"allowed_tools.tools\[0\].name is not one of tools",
        ),
    ],
)
def test_bad_choices(given, tools, message):
    with pytest.raises(RequestError, match=message):
        parse_tool_choice(given, tools)


def call(arguments, name="weather"):
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATION = [
    {"role": "user", "content": "Weather in Rome?"},
    {"role": "assistant", "content": None, "tool_calls": [call('{"city": "Rome", "n": 2}')]},
    {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"},
]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (HERMES_TEMPLATE, '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "n": 2}}\n</tool_call>'),
        (LLAMA3_TEMPLATE, '{"name": "weather", "parameters": {"city": "Rome", "n": 2}}<|eot_id|>'),
        (
            QWEN_TEMPLATE,
            "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=n>\n2\n</parameter>\n"
            "</function>\n</tool_call>",
        ),
    ],
    ids=["hermes", "llama3", "qwen"],
)
def test_templates_show_tools_calls_and_results(template, expected):
    tools = [tool.to_mapping() for tool in parse_tools([tool(description="d", parameters=PARAMETERS)])]
    text = ChatTemplate(template, {}).render(prepare_messages(CONVERSATION), tools)
    assert expected in text
    assert "Sunny" in text
    assert "city" in text.split("Weather in Rome?")[0] or template is LLAMA3_TEMPLATE
    assert "weather" in text


def test_messages_are_copied():
    before = [dict(message) for message in CONVERSATION]
    prepared = prepare_messages(CONVERSATION)
    assert before == CONVERSATION
    assert prepared[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome", "n": 2}
    assert prepared[0] == CONVERSATION[0]


@pytest.mark.parametrize("arguments", ["", None, "{}", {}])
def test_no_arguments(arguments):
    [message] = prepare_messages([{"role": "assistant", "content": "", "tool_calls": [call(arguments)]}])
    assert message["tool_calls"][0]["function"]["arguments"] == {}


def test_empty_tool_calls_are_none():
    assert prepare_messages([{"role": "assistant", "content": "x", "tool_calls": []}]) == [
        {"role": "assistant", "content": "x"}
    ]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "assistant", "tool_calls": "x"}, "messages[0].tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": [1]}, "messages[0].tool_calls[0] must be an object"),
        ({"role": "assistant", "tool_calls": [call("{"), call("{}")]}, "messages[0].tool_calls[0].function.arguments"),
        (
            {"role": "assistant", "tool_calls": [call("{}"), call("[1]")]},
            "messages[0].tool_calls[1].function.arguments",
        ),
        ({"role": "assistant", "tool_calls": [call('{"a": NaN}')]}, "messages[0].tool_calls[0].function.arguments"),
        ({"role": "assistant", "tool_calls": [call(3)]}, "messages[0].tool_calls[0].function.arguments"),
        ({"role": "assistant", "tool_calls": [call("{}", name=1)]}, "messages[0].tool_calls[0].function.name"),
        ({"role": "assistant", "tool_calls": [{**call("{}"), "type": "custom"}]}, "messages[0].tool_calls[0].type"),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id"),
        ({"role": "function", "name": "f", "content": "x"}, "messages[0] is of the old functions API"),
        ({"role": "assistant", "function_call": {}}, "messages[0] is of the old functions API"),
    ],
)
def test_bad_calls_in_messages(message, expected):
    with pytest.raises(RequestError, match=re.escape(expected)):
        prepare_messages([message])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (HERMES_TEMPLATE, "hermes"),
        (LLAMA3_TEMPLATE, "llama3"),
        (QWEN_TEMPLATE, "qwen"),
        (PLAIN_TEMPLATE, None),
        (PLAIN_TEMPLATE + '<tool_call>"arguments"', None),
        ("", None),
        (GLM_TEMPLATE, None),
        ("{{ tools }}", None),
    ],
)
def test_the_format_is_found_in_the_template(template, expected):
    found = resolve_tool_format("auto", template)
    assert (found.name if found else None) == expected
    assert shows_tools(template) is ("tools" in template)


def test_a_format_by_name():
    assert list(TOOL_FORMATS) == ["auto", *FORMATS]
    with pytest.raises(ConfigError, match="tool_format is 'herms'; allowed: auto, hermes"):
        ServerConfig(tool_format="herms")
    assert resolve_tool_format("llama3", HERMES_TEMPLATE) is FORMATS["llama3"]
    with pytest.raises(ConfigError, match="no tool format 'herms'; did you mean 'hermes'"):
        resolve_tool_format("herms", "")


PARAMS = SamplingParams(seed=3, max_tokens=None)


def plan(choice=None, style="hermes", tools=TOOLS, parallel=None, **options):
    found = parse_tool_choice(choice, tools, parallel)
    return plan_tools(found, FORMATS.get(style), NoTags(), **{"shows_tools": True, **options})


def test_a_plan_without_tools_changes_nothing():
    for nothing in (plan("none"), plan(tools=()), plan(tools=(), style=None, shows_tools=False)):
        assert nothing.template_tools is None
        assert nothing.grammar is None
        assert nothing.apply(PARAMS) is PARAMS
        assert nothing.make_parser() is None


@pytest.mark.parametrize("style", list(FORMATS))
def test_plans(style):
    free = plan(style=style)
    assert [tool["function"]["name"] for tool in free.template_tools] == ["weather", "now", "then"]
    assert free.grammar is None
    assert free.apply(PARAMS) == SamplingParams(seed=3, max_tokens=None, skip_special_tokens=False)
    assert free.make_parser() is not free.make_parser()
    named = plan({"type": "function", "function": {"name": "now"}}, style)
    assert [tool["function"]["name"] for tool in named.template_tools] == ["now"]
    assert named.grammar == FORMATS[style].forced_grammar(TOOLS[1:2], NoTags(), is_single=True)
    assert plan("required", style).grammar == FORMATS[style].forced_grammar(TOOLS, NoTags(), is_single=False)
    assert plan(None, style, parallel=False).grammar == FORMATS[style].free_grammar(TOOLS, NoTags(), is_single=True)
    strict = parse_tools([tool(strict=True), tool("now")])
    assert plan(None, style, strict).grammar == FORMATS[style].free_grammar(strict, NoTags(), is_single=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": None}, "how this model writes tool calls is not known; .*hermes, llama3, qwen"),
        ({"shows_tools": False}, "does not tell it of tools"),
        ({"has_output_form": True}, "cannot be had together"),
    ],
)
def test_tools_that_cannot_be_served_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        plan(**options)
    assert plan("none", **options).make_parser() is None


def test_finish_reasons():
    assert finish_reason("stop", 1) == "tool_calls"
    assert finish_reason("stop", 0) == "stop"
    assert finish_reason("length", 1) == "length"
    assert finish_reason(None, 1) is None
