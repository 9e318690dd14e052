"""Where chat templates run: jinja2's immutable sandbox, with a budget.

A template is a program from a checkpoint. The sandbox keeps it from Python's internals; the budget keeps it from
taking the server's time and memory:

- steps: iterations of loops and calls of macros (there is no other way to repeat anything),
- characters: everything a loop writes, and every string or list an operator, filter or method builds,
- seconds: looked at between steps. No operation can be interrupted, but each is bounded by the characters.

Steps and characters are exact, so that the same chat always passes or never does; the time limit is a last resort.
Operators, filters and methods pay here; loops and macros by what `chat_metering` adds to them.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import filters, nodes, pass_context, pass_eval_context
from jinja2.ext import loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headrace.tokenizer.chat_budget import Budget, BudgetError
from headrace.tokenizer.chat_globals import GenerationTag, PlainNamespace, make_dict, raise_exception, strftime_now
from headrace.tokenizer.chat_metering import Instrument, Metered

_ITEM_CHARACTERS = 256
_MAX_WIDTH = 256
_MAX_INTEGER_BITS = 4096
_MAX_POWER_BITS = 20
# Not used by chat templates, and each can build a large text or loop from a small input.
_DROPPED_FILTERS = ("center", "pprint", "random", "urlize", "wordwrap", "xmlattr")
_GROWING_METHODS = ("center", "expandtabs", "format", "format_map", "join", "ljust", "rjust", "translate", "zfill")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The functions, filters and tags that transformers gives to chat templates, each paying into a budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, loopcontrols],
            optimized=False,  # no constant is computed before there is a budget
            finalize=self._pay_for_output,
        )
        self._budget: ContextVar[Budget | None] = ContextVar("budget", default=None)
        self.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": strftime_now,
            "dict": make_dict,
            "namespace": PlainNamespace,
        }
        self.globals.pop("lipsum")
        for name in _DROPPED_FILTERS:
            del self.filters[name]
        self.filters |= {
            "tojson": self._tojson,
            "replace": self._replace,
            "join": self._join,
            "indent": self._indent,
            "format": self._format,
            "string": lambda value: str(self.spend_text(value)),
        }

    @contextmanager
    def budget(self) -> Iterator[None]:
        """Give whatever runs inside a fresh budget."""
        token = self._budget.set(Budget())
        try:
            yield
        finally:
            self._budget.reset(token)

    def from_source(self, source: str) -> Any:
        """A compiled template whose loops and macros pay for each turn."""
        tree = Instrument().visit(self.parse(source))
        return self.template_class.from_code(self, self.compile(tree), self.make_globals(None))

    def spend(self, characters: int, steps: int = 0) -> None:
        if budget := self._budget.get():
            budget.spend(characters, steps)

    def spend_text(self, value: Any) -> Any:
        """Pay for the text of a value, before that text exists: lists may hold one another many times over."""
        pending = [value]
        while pending:
            item = pending.pop()
            if isinstance(item, Mapping):
                pending.extend(item.keys())
                pending.extend(item.values())
            elif isinstance(item, (list, tuple, set, frozenset)):
                pending.extend(item)
            self.spend(_ITEM_CHARACTERS + (len(item) if isinstance(item, (str, bytes)) else 0))
        return value

    def metered(self, values: Any, literal: int) -> Metered:
        """What a loop runs over, each item at the price of a step and of the literal text in the loop."""
        return Metered(self.spend, values, literal)

    @pass_context
    def _pay_for_output(self, _context: Context, value: Any) -> Any:
        # With a context, because jinja2 would otherwise compute constant outputs at compile time, without a budget.
        return self.spend_text(value)

    def concat_checked(self, *values: Any) -> str:
        """The `~` operator."""
        return "".join(str(self.spend_text(value)) for value in values)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, (str, bytes)):
            return self._format(left, *(right if isinstance(right, tuple) else (right,)))
        self._pay_for_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(called, "__wrapped__", called)  # the sandbox wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, (str, bytes)):
            args = tuple(list(arg) if name == "join" else arg for arg in args)  # an iterator can be read only once
            self._pay_for_method(owner, name, args, kwargs)
        return super().call(context, called, *args, **kwargs)

    def _pay_for_operator(self, operator: str, left: Any, right: Any) -> None:
        if isinstance(left, (int, float)) and isinstance(right, (int, float)):
            bits = sum(value.bit_length() for value in (left, right) if isinstance(value, int))
            if bits > (_MAX_POWER_BITS if operator == "**" else _MAX_INTEGER_BITS):
                raise BudgetError("it computes with huge numbers")
        elif operator == "*":
            number = next((value for value in (left, right) if isinstance(value, int)), 1)
            self.spend(max(_length(left), _length(right)) * max(0, number))
        elif operator == "+":
            self.spend(_length(left) + _length(right))

    def _pay_for_method(self, owner: str | bytes, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.spend(len(owner))
        if name in ("format", "format_map"):
            self._pay_for_format(owner, [*args, *kwargs.values()])
        elif name == "replace" and len(args) > 1:
            self.spend(owner.count(args[0]) * _length(args[1]))
        elif name in _GROWING_METHODS:
            if any(isinstance(value, int) and value > _MAX_WIDTH for value in args):
                raise BudgetError(f"it calls {name}() with a number above {_MAX_WIDTH}")
            self.spend(len(owner) * max(map(_length, args), default=1))
            self.spend_text(args)

    def _pay_for_format(self, template: str | bytes, args: Iterable[Any]) -> None:
        text = template if isinstance(template, str) else template.decode("latin-1")
        if re.search(r"\d{4}|\*|\{[^}]*\{", text):
            raise BudgetError("it formats a text with a width of four digits or a computed one")
        num_fields = 1 + text.count("{") + text.count("%")
        self.spend(1000 * num_fields)
        for arg in args:
            for _ in range(num_fields):
                self.spend_text(arg)

    def _format(self, template: Any, *args: Any, **kwargs: Any) -> Any:
        self._pay_for_format(template if isinstance(template, bytes) else str(template), [*args, *kwargs.values()])
        return template % (kwargs or args)

    def _replace(self, value: Any, old: str, new: str, count: int = -1) -> str:
        text = str(self.spend_text(value))
        self.spend(text.count(old) * len(new))
        return text.replace(old, new, count)

    @pass_eval_context
    def _join(self, context: nodes.EvalContext, value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
        items = list(value)
        self.spend_text(items)
        self.spend(len(str(d)) * len(items))
        return str(filters.sync_do_join(context, items, d, attribute))

    def _indent(self, s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        width_characters = len(width) if isinstance(width, str) else width
        self.spend(len(s) + (1 + s.count("\n")) * width_characters)
        return str(filters.do_indent(s, width, first, blank))

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        width = indent if isinstance(indent, int) else _length(indent)
        if width > _MAX_WIDTH:
            raise BudgetError(f"it indents JSON by more than {_MAX_WIDTH} characters")
        self.spend_text(value)
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple, Mapping)) else 1
