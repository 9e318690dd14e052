"""Grammars of the formats whose calls stand between tags, in text."""

from collections.abc import Sequence

from headrace.server.tools.lark import TokenNames, literal, tag

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def forced(call_rules: Sequence[str], tokenizer: TokenNames, *, is_single: bool) -> str:
    """
    call_rules: the rules of each function; the first of each is `call_<number>`, what stands between the tags' lines.
    """
    more = "" if is_single else r' ("\n" call)*'
    call = f'call: {tag(OPEN, tokenizer)} "\\n" ({_any_of(call_rules)}) "\\n" {tag(CLOSE, tokenizer)}'
    return "\n".join(["%llguidance {}", f"start: call{more}", call, *call_rules])


def free(call_rules: Sequence[str], tokenizer: TokenNames, *, is_single: bool) -> str:
    """Any text; after an opening tag, a call.

    The tag may be a token that text cannot hold, or text like any other, however it is cut into tokens; the first one
    that is complete counts.
    """
    start = "call | TEXT" if is_single else "call* TEXT"
    opening, token = literal(OPEN), tag(OPEN, tokenizer)
    return "\n".join(
        [
            "%llguidance {}",
            f"start: {start}",
            "TEXT: /(?s:.*)/",
            f"begin[lazy]: TEXT {opening}",
            f'call: {"begin" if token == opening else f"(begin | TEXT {token})"} "\\n" ({_any_of(call_rules)}) "\\n" '
            + tag(CLOSE, tokenizer),
            *call_rules,
        ]
    )


def _any_of(call_rules: Sequence[str]) -> str:
    return " | ".join(f"call_{number}" for number in range(len(call_rules)))
