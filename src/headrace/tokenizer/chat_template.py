"""From a list of chat messages to the text a model was trained to continue."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from headrace.config.refusals import shown
from headrace.errors import CheckpointError, RequestError, nearest_name
from headrace.tokenizer.chat_budget import BudgetError
from headrace.tokenizer.chat_sandbox import ChatEnvironment
from headrace.tokenizer.tokenizer_files import TokenizerConfig, read_json_object

_DEFAULT, _TOOL_USE = "default", "tool_use"
_ROLES = ("system", "user", "assistant", "tool")
"""Allowed with every template: many write whatever role there is, and name none."""


class ChatTemplate:
    """A checkpoint's chat template, run as transformers runs it, in a sandbox with a budget (`chat_sandbox`).

    source: one template, several by name (`tool_use` serves requests with tools, `default` the others), or None for a
        checkpoint without any, which only `render` complains about: it may still complete plain text.
    special_tokens: bos_token, eos_token, ... by name, as variables of the template.
    """

    def __init__(self, source: str | Mapping[str, str] | None, special_tokens: Mapping[str, str]) -> None:
        self._sources = {_DEFAULT: source} if isinstance(source, str) else dict(source or {})
        self._environment = ChatEnvironment()
        self._templates = {name: self._compile(name, text) for name, text in self._sources.items()}
        self._special_tokens = dict(special_tokens)

    @classmethod
    def from_folder(cls, path: Path) -> "ChatTemplate":
        """Take chat_template.jinja, else tokenizer_config.json's chat_template, else chat_template.json.

        Raises:
            CheckpointError: a file is broken, or the template is not valid Jinja.
        """
        tokens = TokenizerConfig.from_folder(path).named_tokens
        file = path / "chat_template.jinja"
        if file.is_file():
            return cls(_read_template(file), tokens)
        for name in ("tokenizer_config.json", "chat_template.json"):
            if template := read_json_object(path / name).get("chat_template"):
                return cls(_named_sources(template, path / name), tokens)
        return cls(None, tokens)

    @property
    def is_available(self) -> bool:
        return bool(self._templates)

    @property
    def tool_source(self) -> str:
        """The Jinja source that serves requests with tools; empty if there is none."""
        return self._sources.get(_TOOL_USE) or self._sources.get(_DEFAULT, "")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """The prompt's text, special tokens included: encode it with `add_special_tokens=False`.

        Content given as a list of text parts is joined by newlines. A developer's messages are the system's, unless the
        template names developers. `extra` are further variables of the template.

        Raises:
            RequestError: no template, a malformed message (its index is named), the template's own refusal, or a
                template that fails or exceeds its budget.
        """
        name = self._choose(has_tools=bool(tools))
        variables = self._special_tokens | {
            "messages": check_messages(messages, self._sources[name]),
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with self._environment.budget():
                text: str = self._templates[name].render(variables | extra)
        except BudgetError as error:
            raise RequestError(f"the chat template was stopped: {error}; send fewer or shorter messages") from error
        except TemplateError as error:
            raise RequestError(f"the chat template refused the messages: {error}") from error
        except Exception as error:  # a template is a program: it may raise anything
            raise RequestError(f"the chat template failed on these messages: {_describe(error)}") from error
        return text

    def _compile(self, name: str, source: str) -> Any:
        try:
            return self._environment.from_source(source)
        except RecursionError:
            raise CheckpointError(f"the checkpoint's chat template '{name}' is nested too deeply") from None
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"the checkpoint's chat template '{name}' is not valid Jinja: {error.message} in line {error.lineno}; "
                "give it a correct chat_template.jinja"
            ) from error

    def _choose(self, has_tools: bool) -> str:
        if not self._templates:
            raise RequestError(
                "this model has no chat template; use plain completion, or put a chat_template.jinja into its folder"
            )
        if has_tools and _TOOL_USE in self._templates:
            return _TOOL_USE
        if _DEFAULT not in self._templates:
            raise RequestError(f"this model has no chat template for this: {nearest_name(_DEFAULT, self._templates)}")
        return _DEFAULT


def _read_template(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as UTF-8 text: {error}") from None


def check_messages(messages: Sequence[Mapping[str, Any]], source: str) -> list[dict[str, Any]]:
    """Copies of the messages, content as text, for a template of this source.

    Raises:
        RequestError: says which message is wrong, and what it must be.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise RequestError(
            f"messages is a {type(messages).__name__}; it must be a list of objects with role and content"
        )
    if not messages:
        raise RequestError("messages is empty; a chat needs at least one message")
    return [_check_message(index, message, source) for index, message in enumerate(messages)]


def _check_message(index: int, message: Mapping[str, Any], source: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(
            f"messages[{index}] is a {type(message).__name__}; it must be an object with role and content"
        )
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f"messages[{index}] has the role {role!r}; it must be a string such as 'user'")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise RequestError(f"messages[{index}] has no content; give a string, or tool_calls")
    return {**message, "role": _known_role(index, role, source), "content": _content_text(index, content)}


def _known_role(index: int, role: str, source: str) -> str:
    """A misspelt role would otherwise be written into the prompt, and change the answer."""
    if role in _ROLES or f"'{role}'" in source or f'"{role}"' in source:
        return role
    if role == "developer":
        return "system"
    raise RequestError(
        f"messages[{index}] has the role {shown(role)}; allowed: {', '.join(_ROLES)}, developer, and others that this "
        "model's chat template names"
    )


def _content_text(index: int, content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise RequestError(
            f"messages[{index}].content is a {type(content).__name__}; it must be a string or a list of text parts"
        )
    return "\n".join(_part_text(f"messages[{index}].content[{number}]", part) for number, part in enumerate(content))


def _part_text(where: str, part: Any) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise RequestError(f"{where} is of type {kind!r}; only parts {{'type': 'text', 'text': ...}} can be read")
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{where} has no text; it must be a string")
    return str(part["text"])


def _named_sources(template: Any, path: Path) -> str | dict[str, str]:
    """A template, or a list of objects with `name` and `template`.

    Raises:
        CheckpointError: it is neither.
    """
    if isinstance(template, str):
        return template
    try:
        named = {str(entry["name"]): entry["template"] for entry in template}
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"chat_template in {path} is neither a text nor a list of named templates") from error
    if not all(isinstance(text, str) for text in named.values()):
        raise CheckpointError(f"a chat_template in {path} is not a text")
    return named


def _describe(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it calls itself without end"
    return f"{type(error).__name__}: {error}"
