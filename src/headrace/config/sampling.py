"""How the next token is chosen, and when a request ends. Names and defaults are vLLM's where it has them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, Self

from headrace.config.refusals import clipped, refusal, shown
from headrace.config.structured_outputs import StructuredOutputs, checked_structured_outputs
from headrace.errors import RequestError, nearest_name

MAX_LOGPROBS = 20
MAX_OUTPUTS = 128
GREEDY_TEMPERATURE = 1e-5


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Settings of one request.

    temperature: 0 is greedy; otherwise logits are divided by it. Below 1e-5 counts as 0; above, it is used as given.
    top_k: keep the k most likely tokens, of equals those with the smallest ids; 0 or -1 keeps all.
    top_p: keep the smallest set of most likely tokens whose probabilities sum to at least top_p.
    min_p: drop tokens less likely than min_p times the most likely one.
    repetition_penalty: r > 1 divides positive and multiplies negative logits of tokens seen in prompt or output.
    presence_penalty, frequency_penalty: subtracted once, or once per occurrence, from tokens seen in the output.
    logit_bias: added to the logits of given token ids, in [-100, 100]; read-only, ids may be given as digit strings.
    stop: strings that end the output; the text is cut before them unless include_stop_str_in_output. One string or a
        sequence of them may be given; kept as a tuple.
    stop_token_ids: tokens that end the output, beside the model's end-of-sequence tokens.
    max_tokens: at most, and never past the model's length; None generates up to that.
    min_tokens: no stop token and no stop string ends the output before this many tokens. Until then the
        end-of-sequence tokens and stop_token_ids cannot be chosen, with ignore_eos too (as in vLLM).
    ignore_eos: an end-of-sequence token does not end the output.
    n: independent outputs for one prompt.
    seed: fixes the draws of this request, whatever else is in the batch; None draws a fresh seed.
    logprobs: report the chosen token's log probability and this many most likely tokens; taken from the raw logits.
    prompt_logprobs: the same for each prompt token.
    structured_outputs: the form that the output must have; a mapping of `StructuredOutputs`' fields may be given. An
        output whose form is complete ends, before min_tokens too. Until then an end-of-sequence token can be chosen
        only where the form allows the end, and with ignore_eos never.

    Not hashable (logit_bias is a mapping); can be compared, pickled, deep-copied and turned into JSON and back.

    Raises:
        RequestError: a value outside its range; the message says what is allowed.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    n: int = 1
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        self._normalize_numbers()
        self._normalize_collections()
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise refusal(name, getattr(self, name), "true or false")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise refusal("min_tokens", self.min_tokens, f"at most max_tokens, which is {self.max_tokens}")

    def _normalize_numbers(self) -> None:
        for name, (is_allowed, allowed) in _FLOAT_RULES.items():
            given = getattr(self, name)
            number = _as_float(given)
            if number is None or not is_allowed(number):
                raise refusal(name, given, allowed)
            self._set(name, number)
        for name, (low, high, allowed) in _INT_RULES.items():
            given = getattr(self, name)
            if given is not None or name not in _MAY_BE_NONE:
                self._set(name, _checked_int(name, given, low, high, allowed))

    def _normalize_collections(self) -> None:
        self._set("stop", _checked_stop(self.stop))
        self._set("stop_token_ids", _checked_token_ids(self.stop_token_ids))
        self._set("structured_outputs", checked_structured_outputs(self.structured_outputs))
        self._set("logit_bias", MappingProxyType(_checked_bias(self.logit_bias)))

    def _set(self, name: str, value: object) -> None:
        """Store a normalized value while the object is being made; the dataclass is frozen for everyone else."""
        object.__setattr__(self, name, value)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    def check_against_vocab(self, vocab_size: int) -> None:
        """Refuse token ids that the model's logits do not have.

        Raises:
            RequestError: an id of logit_bias or stop_token_ids is vocab_size or more.
        """
        for name, token_ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            largest = max(token_ids, default=0)
            if largest >= vocab_size:
                message = f"{name} names token {largest}; this model's token ids are 0 to {vocab_size - 1}"
                raise RequestError(message, param=name)

    def to_mapping(self) -> dict[str, Any]:
        """Plain data, fit for JSON: the settings that differ from their defaults. `from_mapping` reads it back."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != _DEFAULTS[f.name]}
        for name in changed.keys() & {"stop", "stop_token_ids"}:
            changed[name] = list(changed[name])
        if "logit_bias" in changed:
            changed["logit_bias"] = {str(token_id): bias for token_id, bias in changed["logit_bias"].items()}
        if self.structured_outputs is not None:
            changed["structured_outputs"] = self.structured_outputs.to_mapping()
        return changed

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> Self:
        """Settings from names and values, such as a JSON object.

        Raises:
            RequestError: an unknown name, with the nearest known one; or a value outside its range.
        """
        if not isinstance(given, Mapping):
            raise refusal("sampling parameters", given, "a mapping of names to values")
        for name in given:
            if name not in _DEFAULTS:
                raise RequestError(
                    f"unknown sampling parameter {shown(name)}; {nearest_name(clipped(name), _DEFAULTS)}"
                )
        return cls(**given)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied by value: a read-only mapping cannot be pickled itself."""
        return type(self).from_mapping, (self.to_mapping(),)


_FLOAT_RULES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: 0 <= x < math.inf, "a finite number, 0 or more"),
    "top_p": (lambda x: 0 < x <= 1, "a number above 0, up to 1"),
    "min_p": (lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "repetition_penalty": (lambda x: 0 < x < math.inf, "a finite number above 0"),
    "presence_penalty": (lambda x: -2 <= x <= 2, "a number from -2 to 2"),
    "frequency_penalty": (lambda x: -2 <= x <= 2, "a number from -2 to 2"),
}

_INT_RULES: dict[str, tuple[int, int | None, str]] = {
    "top_k": (-1, None, "a whole number, 1 or more; 0 or -1 keeps all tokens"),
    "max_tokens": (1, None, "a whole number, 1 or more, or none"),
    "min_tokens": (0, None, "a whole number, 0 or more"),
    "n": (1, MAX_OUTPUTS, f"a whole number from 1 to {MAX_OUTPUTS}"),
    "seed": (-(2**63), 2**63 - 1, "a signed 64-bit whole number, or none"),
    "logprobs": (0, MAX_LOGPROBS, f"a whole number from 0 to {MAX_LOGPROBS}, or none; -1 for all is not offered"),
    "prompt_logprobs": (
        0,
        MAX_LOGPROBS,
        f"a whole number from 0 to {MAX_LOGPROBS}, or none; -1 for all is not offered",
    ),
}

_MAY_BE_NONE = frozenset({"max_tokens", "seed", "logprobs", "prompt_logprobs"})


def _as_float(given: object) -> float | None:
    if isinstance(given, bool) or not isinstance(given, Real):
        return None
    try:
        return float(given)
    except OverflowError:
        return None


def _as_int(given: object) -> int | None:
    return None if isinstance(given, bool) or not isinstance(given, Integral) else int(given)


def _checked_int(name: str, given: object, low: int, high: int | None, allowed: str) -> int:
    number = _as_int(given)
    if number is None or number < low or (high is not None and number > high):
        raise refusal(name, given, allowed, param=name.rpartition(" ")[2])
    return number


def _checked_stop(given: object) -> tuple[str, ...]:
    strings = (given,) if isinstance(given, str) else given
    if not isinstance(strings, Sequence) or isinstance(strings, bytes | bytearray):
        raise refusal("stop", given, "a string or a list of strings")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise refusal("an item of stop", string, "a string of at least one character", param="stop")
    return tuple(strings)


def _checked_token_ids(given: object) -> tuple[int, ...]:
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | bytearray | Mapping):
        raise refusal("stop_token_ids", given, "a list of token ids")
    return tuple(_checked_int("an item of stop_token_ids", i, 0, None, "a token id, 0 or more") for i in given)


def _checked_bias(given: object) -> dict[int, float]:
    if not isinstance(given, Mapping):
        raise refusal("logit_bias", given, "a mapping of token ids to numbers from -100 to 100")
    checked: dict[int, float] = {}
    for key, value in given.items():
        token_id = _checked_bias_key(key)
        bias = _as_float(value)
        if bias is None or not -100 <= bias <= 100:
            raise refusal(f"logit_bias of token {token_id}", value, "a number from -100 to 100", param="logit_bias")
        if token_id in checked:
            raise refusal("logit_bias", key, f"token {token_id} once")
        checked[token_id] = bias
    return checked


def _checked_bias_key(given: object) -> int:
    # Ids fit 64 bits by far; a longer run of digits is refused before int() is asked to read it.
    is_digits = isinstance(given, str) and given.isascii() and given.isdigit() and len(given) <= 19
    return _checked_int(
        "a key of logit_bias", int(str(given)) if is_digits else given, 0, None, "a token id, 0 or more"
    )


_DEFAULTS: dict[str, Any] = {
    f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(SamplingParams)
}
