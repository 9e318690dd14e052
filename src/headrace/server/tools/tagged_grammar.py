"""Grammars of the formats whose calls stand between tags, in text."""

from collections.abc import Sequence

from headrace.server.tools.lark import TokenNames, is_special, literal, tag

OPEN, CLOSE = "<tool_call>", "</tool_call>"
TEXT = r"TEXT: /(?s:.*)/"


def forced(call_rules: Sequence[str], tokenizer: TokenNames, *, is_single: bool) -> str:
    """
    call_rules: the rules of each function; the first of each is `call_<number>`, what stands between the tags' lines.
    """
    more = "" if is_single else r' ("\n" call)*'
    call = f'call: {tag(OPEN, tokenizer)} "\\n" ({_any_of(call_rules)}) "\\n" {tag(CLOSE, tokenizer)}'
    return "\n".join(["%llguidance {}", f"start: call{more}", call, *call_rules])


def free(call_rules: Sequence[str], tokenizer: TokenNames, *, is_single: bool) -> str:
    """Any text; after an opening tag, a call."""
    rest = f'"\\n" ({_any_of(call_rules)}) "\\n" {tag(CLOSE, tokenizer)}'
    rules = ["%llguidance {}", TEXT]
    if is_special(OPEN, tokenizer):
        rules += [
            f"start: TEXT {'(call)?' if is_single else '(call TEXT)*'}",
            f"call: {tag(OPEN, tokenizer)} {rest}",
        ]
    else:  # the tag is text like any other, however it is cut into tokens, and the first one that is complete counts
        rules += [
            f"start: {'call | TEXT' if is_single else 'call* TEXT'}",
            f"begin[lazy]: TEXT {literal(OPEN)}",
            f"call: begin {rest}",
        ]
    return "\n".join([*rules, *call_rules])


def _any_of(call_rules: Sequence[str]) -> str:
    return " | ".join(f"call_{number}" for number in range(len(call_rules)))
