"""Chat templates against transformers, and against templates that mean harm."""

import json
import time

import pytest

from headrace.errors import CheckpointError, RequestError
from headrace.tokenizer import ChatTemplate

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

CHATML = """
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content | trim ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

LLAMA2 = """
{%- set ns = namespace(system='') -%}
{%- if messages[0]['role'] == 'system' -%}
  {%- set ns.system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('roles must alternate user and assistant') -}}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {{- bos_token + '[INST] ' + (ns.system if loop.first else '') + message['content'].strip() + ' [/INST]' -}}
  {%- else -%}
    {{- ' ' + message['content'].strip() + ' ' + eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""

LLAMA3 = """
{{- bos_token }}
{%- if date_string is not defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- for message in messages %}
    {%- set header = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' %}
    {{- header + ('Today: ' + date_string + '\\n' if loop.first else '') + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if tools is not none %}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- "\\n" }}{%- endfor %}
{%- endif %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

MISTRAL = """
{%- macro tool_list(tools) -%}
  [AVAILABLE_TOOLS][
  {%- for tool in tools -%}
    {%- for key, value in tool.function.items() if key != 'return' -%}
      {{- '"' ~ key ~ '": ' ~ (value | tojson) ~ (', ' if not loop.last) -}}
    {%- endfor -%}
    {{- '' if loop.last else ', ' -}}
  {%- endfor -%}
  ][/AVAILABLE_TOOLS]
{%- endmacro -%}
{{- bos_token }}
{%- for message in messages -%}
  {%- if message.role == 'system' -%}{%- continue -%}{%- endif -%}
  {%- if message.role == 'user' -%}
    {{- tool_list(tools) if tools and loop.last }}{{ '[INST] %s[/INST]' | format(message.content) -}}
  {%- elif message.tool_calls -%}
    {{- '[TOOL_CALLS]' + message.tool_calls | map(attribute='function') | map('tojson') | join(', ') + eos_token -}}
  {%- else -%}
    {% generation %}{{ message.content + eos_token }}{% endgeneration %}
  {%- endif -%}
{%- endfor -%}
"""

GEMMA = """
{{ bos_token }}
{% for message in messages %}
    {% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
    {% if message['content'] is string %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | replace('<', '‹') | trim + '<end_of_turn>\\n' }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA}

USER = {"role": "user", "content": " héllo <b> & 'you' \n"}
CHATS = {
    "one": [USER],
    "system": [{"role": "system", "content": "Be kind."}, USER],
    "turns": [USER, {"role": "assistant", "content": "中文 🙂"}, {"role": "user", "content": "more"}],
    "tool_calls": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "ü"}}}]},
    ],
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "dø <it>", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def theirs():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **TOKENS)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_texts_are_those_of_transformers(theirs, template, chat, tools, add_generation_prompt):
    options = {"tools": tools, "add_generation_prompt": add_generation_prompt, "date_string": "1 Jan 2025"}
    expected = theirs.apply_chat_template(CHATS[chat], chat_template=TEMPLATES[template], tokenize=False, **options)
    assert ChatTemplate(TEMPLATES[template], TOKENS).render(CHATS[chat], **options) == expected


def test_strftime_now_knows_the_year():
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render([USER]) == time.strftime("%Y")


def test_text_parts_become_one_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert ChatTemplate("{{ messages[0].content }}", {}).render([{"role": "user", "content": parts}]) == "a\nb"


def test_the_messages_are_not_changed():
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    before = json.dumps(messages)
    ChatTemplate(CHATML, TOKENS).render(messages)
    assert json.dumps(messages) == before


class TestLoading:
    def test_the_jinja_file_comes_first(self, tmp_path):
        (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "config", "bos_token": {"content": "<s>"}}')
        (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
        assert ChatTemplate.from_folder(tmp_path).render([USER]) == "config"
        (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}jinja")
        assert ChatTemplate.from_folder(tmp_path).render([USER]) == "<s>jinja"
        (tmp_path / "chat_template.jinja").unlink()
        (tmp_path / "tokenizer_config.json").unlink()
        assert ChatTemplate.from_folder(tmp_path).render([USER]) == "json"

    def test_named_templates(self, tmp_path):
        named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
        template = ChatTemplate.from_folder(tmp_path)
        assert template.render([USER]) == "plain"
        assert template.render([USER], tools=TOOLS) == "tools"

    @pytest.mark.parametrize("value", [[1], [{"name": "default"}], 5, [{"name": "default", "template": 5}]])
    def test_neither_text_nor_named_texts(self, tmp_path, value):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
        with pytest.raises(CheckpointError, match="chat_template"):
            ChatTemplate.from_folder(tmp_path)

    def test_no_template(self, tmp_path):
        template = ChatTemplate.from_folder(tmp_path)
        assert not template.is_available
        with pytest.raises(
            RequestError, match=r"no chat template; use plain completion, or put a chat_template\.jinja"
        ):
            template.render([USER])

    def test_invalid_jinja(self):
        with pytest.raises(CheckpointError, match=r"not valid Jinja: .* in line 2"):
            ChatTemplate("line\n{% for %}", {})


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("text", "messages is a str"),
        ([], "messages is empty"),
        ([USER, "hello"], r"messages\[1\] is a str"),
        ([USER, {"content": "x"}], r"messages\[1\] has the role None"),
        ([{"role": 5, "content": "x"}], r"messages\[0\] has the role 5"),
        (
            [USER, {"role": "usr", "content": "x"}],
            r"messages\[1\] has the role 'usr'; allowed: system, user, assistant",
        ),
        ([USER, USER, {"role": "user"}], r"messages\[2\] has no content"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content is a int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\] is of type 'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\] has no text"),
        ([{"role": "user", "content": ["x"]}], r"content\[0\] is of type 'str'"),
    ],
)
def test_malformed_messages_are_named(messages, expected):
    with pytest.raises(RequestError, match=expected):
        ChatTemplate(CHATML, TOKENS).render(messages)


@pytest.mark.parametrize("quote", "'\"")
def test_roles_of_the_template_are_allowed(quote):
    source = f"{{% if messages[0].role == {quote}usr{quote} %}}yes{{% endif %}}"
    assert ChatTemplate(source, {}).render([{"role": "usr", "content": "x"}]) == "yes"


def test_a_developer_is_the_system_unless_the_template_knows_better():
    message = {"role": "developer", "content": "x"}
    assert ChatTemplate("{{ messages[0].role }}", {}).render([message]) == "system"
    assert ChatTemplate("{{ messages[0].role }}{# 'developer' #}", {}).render([message]) == "developer"


def test_the_template_may_refuse():
    with pytest.raises(RequestError, match="roles must alternate user and assistant"):
        ChatTemplate(LLAMA2, TOKENS).render([USER, USER])


def test_a_failing_template_is_a_request_error():
    with pytest.raises(RequestError, match="failed on these messages: ZeroDivisionError"):
        ChatTemplate("{{ 1 / 0 }}", {}).render([USER])


DOUBLE = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x | length }}"
HOSTILE = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "mutation": "{{ messages.append(1) }}",
    "import": "{% import 'os' as os %}",
    "huge range": "{{ range(10**9) | list | length }}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for x in [[1, 1]] recursive %}{{ loop([x, x]) }}{{ loop([x, x]) }}{% endfor %}",
    "filtered loop": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "fork bomb": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "product": "{{ 'a' * 10000000000 }}",
    "list product": "{{ [1] * 10000000000 }}",
    "power": "{{ 10 ** 10000000 }}",
    "squares": "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "plus": DOUBLE.replace("STEP", "ns.x + ns.x"),
    "tilde": DOUBLE.replace("STEP", "ns.x ~ ns.x"),
    "replace": DOUBLE.replace("STEP", "ns.x.replace('a', ns.x)"),
    "replace filter": DOUBLE.replace("STEP", "ns.x|replace('a', ns.x)"),
    "join": DOUBLE.replace("STEP", "[ns.x, ns.x]|join"),
    "join method": DOUBLE.replace("STEP", "ns.x.join([ns.x, ns.x])"),
    "format filter": DOUBLE.replace("STEP", "'%s%s'|format(ns.x, ns.x)"),
    "percent": DOUBLE.replace("STEP", "'%s%s' % (ns.x, ns.x)"),
    "format method": DOUBLE.replace("STEP", "'{0}{0}'.format(ns.x)"),
    "nested lists": DOUBLE.replace("STEP", "[ns.x, ns.x]").replace("| length", "| tojson"),
    "nested output": DOUBLE.replace("STEP", "[ns.x, ns.x]").replace("| length", ""),
    "nested string": DOUBLE.replace("STEP", "[ns.x, ns.x]").replace("| length", "| string"),
    "block set": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}{% endfor %}",
    "width": "{{ 'a'.ljust(10000000000) }}",
    "format width": "{{ '{:10000000000}'.format(1) }}",
    "computed width": "{{ '{:{}}'.format(1, 10000000000) }}",
    "percent width": "{{ '%10000000000d' % 1 }}",
    "star width": "{{ '%*d' % (10000000000, 1) }}",
    "indent": "{{ 'a'|indent(10000000000, true) }}",
    "json indent": "{{ [1]|tojson(indent=10000000000) }}",
    "long output": "{% for i in range(99999) %}" + "x" * 10_000 + "{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_in_time(name):
    start = time.perf_counter()
    with pytest.raises(RequestError, match=r"chat template (was stopped|refused|failed)"):
        ChatTemplate(HOSTILE[name], TOKENS).render([USER])
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "name",
    [
        "lipsum",
        "cycler.__init__",
        "self._TemplateReference__context",
        "raise_exception.__globals__",
        "(''|attr('__class__'))",
    ],
)
def test_internals_are_undefined(name):
    assert ChatTemplate("{{ " + name + " }}", {}).render([USER]) == ""
    with pytest.raises(RequestError):
        ChatTemplate("{{ " + name + ".x.y }}", {}).render([USER])


def test_a_long_honest_chat_is_within_the_budget():
    messages = [{"role": "user", "content": "x" * 2000}] * 3000
    assert len(ChatTemplate(CHATML, TOKENS).render(messages)) > 6_000_000


def test_each_rendering_has_its_own_budget():
    template = ChatTemplate("{% for i in range(9000) %}{% for j in range(70) %}{% endfor %}{% endfor %}", {})
    for _ in range(2):
        template.render([USER])


def test_the_source_for_tools_is_that_of_the_template_which_renders_them():
    assert ChatTemplate("a", TOKENS).tool_source == "a"
    assert ChatTemplate({"default": "a", "tool_use": "b"}, TOKENS).tool_source == "b"
    assert ChatTemplate({"rag": "c"}, TOKENS).tool_source == ""
    assert ChatTemplate(None, TOKENS).tool_source == ""
