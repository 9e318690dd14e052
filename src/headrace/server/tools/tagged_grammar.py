"""Grammars of the formats whose calls stand between tags, in text."""

from collections.abc import Sequence

from headrace.server.tools.lark import TokenNames, literal, tag

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_THOUGHT_TAGS = ("<think>", "</think>")
"""Tokens that models write around what they think before they answer; text alone could not hold them."""


def forced(call_rules: Sequence[str], tokenizer: TokenNames, *, is_single: bool) -> str:
    """
    call_rules: the rules of each function; the first of each is `call_<number>`, what stands between the tags' lines.
    """
    more = "" if is_single else r' ("\n" call)*'
    call = f'call: {tag(OPEN, tokenizer)} "\\n" ({_any_of(call_rules)}) "\\n" {tag(CLOSE, tokenizer)}'
    return "\n".join(["%llguidance {}", f"start: call{more}", call, *call_rules])


def free(call_rules: Sequence[str], tokenizer: TokenNames, *, is_single: bool) -> str:
    """Any text, with thoughts; after an opening tag, a call.

    The tag may be a token that text cannot hold, or text like any other, however it is cut into tokens; the first one
    that is complete counts.
    """
    opening, token = literal(OPEN), tag(OPEN, tokenizer)
    begin = "begin" if token == opening else f"(begin | TEXT {token})"
    thoughts = [tag(text, tokenizer) for text in _THOUGHT_TAGS if tokenizer.token_to_id(text) is not None]
    if is_single:
        start = "thought* (call | TEXT)" if thoughts else "call | TEXT"
    else:
        start = "(thought | call)* TEXT" if thoughts else "call* TEXT"
    return "\n".join(
        [
            "%llguidance {}",
            f"start: {start}",
            "TEXT: /(?s:.*)/",
            f"begin[lazy]: TEXT {opening}",
            f'call: {begin} "\\n" ({_any_of(call_rules)}) "\\n" {tag(CLOSE, tokenizer)}',
            *([f"thought: TEXT ({' | '.join(thoughts)})"] if thoughts else []),
            *call_rules,
        ]
    )


def _any_of(call_rules: Sequence[str]) -> str:
    return " | ".join(f"call_{number}" for number in range(len(call_rules)))
