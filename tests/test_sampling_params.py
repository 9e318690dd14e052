"""Settings of a request: what is refused, what is normalized, and that they survive every way they travel."""

import copy
import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.config import SamplingParams
from headrace.errors import RequestError

HUGE = 10**5000

BAD_FLOATS = [math.nan, math.inf, -math.inf, "1", None, True, [1.0], 1j, HUGE]
OUT_OF_RANGE = {
    "temperature": [-0.1, -1e-9],
    "top_p": [0, 0.0, 1.0001, -0.5],
    "min_p": [-0.01, 1.01],
    "repetition_penalty": [0, -1.0],
    "presence_penalty": [-2.01, 2.01],
    "frequency_penalty": [-2.01, 2.01],
}
BAD_INTS = [1.0, "1", True, False, math.nan, [1]]
INT_LIMITS = {
    "top_k": [-2],
    "max_tokens": [0, -1],
    "min_tokens": [-1],
    "n": [0, -1, 129],
    "seed": [2**63, -(2**63) - 1, HUGE],
    "logprobs": [-1, 21],
    "prompt_logprobs": [-1, 21],
}
MAY_BE_NONE = {"max_tokens", "seed", "logprobs", "prompt_logprobs"}

REFUSED = [
    *((name, value) for name in OUT_OF_RANGE for value in BAD_FLOATS + OUT_OF_RANGE[name]),
    *((name, value) for name in INT_LIMITS for value in BAD_INTS + INT_LIMITS[name]),
    *((name, None) for name in INT_LIMITS if name not in MAY_BE_NONE),
    *(("stop", value) for value in ["", ["a", ""], [1], 5, None, b"end", {"a": 1}, [None], ["a", b"b"]]),
    *(("stop_token_ids", value) for value in [5, None, "12", b"12", {1: 2}, [-1], [1.0], [True], ["1"]]),
    *(("logit_bias", value) for value in [None, [1], "1", {-1: 0.0}, {"-1": 0.0}, {"a": 0.0}, {"1.0": 0.0}, {"": 1}]),
    *(("logit_bias", value) for value in [{1.0: 0.0}, {True: 0.0}, {"²": 0.0}, {"9" * 30: 0.0}, {1: 1, "1": 2}]),
    *(("logit_bias", {1: value}) for value in [100.5, -101, math.nan, math.inf, "1", None, True]),
    *((name, v) for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens") for v in [0, 1, None]),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=lambda x: x if isinstance(x, str) else str(type(x).__name__))
def test_refuses(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"{name}.* is .*; allowed: .+") as refusal:
        SamplingParams(**{name: value})
    assert len(str(refusal.value)) < 300
    with pytest.raises(RequestError):
        SamplingParams.from_mapping({name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", 1e-320),
        ("temperature", 1e308),
        ("top_k", -1),
        ("top_k", 0),
        ("top_k", 10**9),
        ("top_p", 1),
        ("top_p", 1e-300),
        ("min_p", 0),
        ("min_p", 1),
        ("repetition_penalty", 1e-6),
        ("presence_penalty", -2),
        ("frequency_penalty", 2),
        ("max_tokens", None),
        ("max_tokens", 1),
        ("min_tokens", 16),
        ("n", 128),
        ("seed", -(2**63)),
        ("seed", 2**63 - 1),
        ("logprobs", 0),
        ("prompt_logprobs", 20),
    ],
)
def test_accepts_the_ends_of_each_range(name: str, value: object) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


def test_says_what_was_given_and_what_is_allowed() -> None:
    with pytest.raises(RequestError, match=r"^top_p is 1\.5; allowed: a number above 0, up to 1$"):
        SamplingParams(top_p=1.5)
    with pytest.raises(RequestError, match=r"^logit_bias of token 7 is 200; allowed: a number from -100 to 100$"):
        SamplingParams(logit_bias={7: 200})
    with pytest.raises(RequestError, match=r"^min_tokens is 17; allowed: at most max_tokens, which is 16$"):
        SamplingParams(min_tokens=17)


def test_min_tokens_is_free_without_max_tokens() -> None:
    assert SamplingParams(min_tokens=1000, max_tokens=None).min_tokens == 1000


def test_normalizes_collections_and_numbers() -> None:
    params = SamplingParams(
        temperature=1, top_k=np.int64(5), stop="end", stop_token_ids=range(2), logit_bias={"12": 3, 4: np.float32(0.5)}
    )
    assert params.stop == ("end",)
    assert params.stop_token_ids == (0, 1)
    assert dict(params.logit_bias) == {12: 3.0, 4: 0.5}
    assert type(params.temperature) is float
    assert type(params.top_k) is int
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_nothing_can_be_changed_afterwards() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 50.0
    assert params.logit_bias[1] == 2.0
    with pytest.raises(TypeError):
        params.logit_bias[1] = 3.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_p = 0.5


def test_replace_checks_again() -> None:
    params = SamplingParams(logit_bias={1: 2.0}, stop="x")
    assert dataclasses.replace(params, n=3).logit_bias == params.logit_bias
    with pytest.raises(RequestError):
        dataclasses.replace(params, n=0)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("temprature", "did you mean 'temperature'"), ("qqq", "known: .*top_k"), (5, "known:"), ("x" * 10**6, "known:")],
)
def test_from_mapping_refuses_unknown_names(name: object, hint: str) -> None:
    with pytest.raises(RequestError, match=f"unknown sampling parameter .*{hint}") as refusal:
        SamplingParams.from_mapping({name: 1})
    assert len(str(refusal.value)) < 600


@pytest.mark.parametrize("given_instead", [None, [], "temperature", 3])
def test_from_mapping_wants_a_mapping(given_instead: object) -> None:
    with pytest.raises(RequestError, match="allowed: a mapping"):
        SamplingParams.from_mapping(given_instead)


def test_to_mapping_holds_what_differs_from_the_defaults() -> None:
    assert SamplingParams().to_mapping() == {}
    params = SamplingParams(top_p=0.9, stop="x", stop_token_ids=(3,), logit_bias={5: 1}, max_tokens=None)
    expected = {"top_p": 0.9, "stop": ["x"], "stop_token_ids": [3], "logit_bias": {"5": 1.0}, "max_tokens": None}
    assert params.to_mapping() == expected


def floats(low: float, high: float, **kwargs: bool) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, **kwargs)


ANY_PARAMS = st.builds(
    SamplingParams,
    temperature=floats(0, 1e300),
    top_k=st.integers(-1, 10**6),
    top_p=floats(0, 1, exclude_min=True),
    min_p=floats(0, 1),
    repetition_penalty=floats(0, 1e300, exclude_min=True),
    presence_penalty=floats(-2, 2),
    frequency_penalty=floats(-2, 2),
    logit_bias=st.dictionaries(st.integers(0, 10**6), floats(-100, 100), max_size=4),
    stop=st.lists(st.text(min_size=1), max_size=3) | st.text(min_size=1),
    stop_token_ids=st.lists(st.integers(0, 10**6), max_size=3),
    include_stop_str_in_output=st.booleans(),
    max_tokens=st.none() | st.integers(9, 10**6),
    min_tokens=st.integers(0, 9),
    ignore_eos=st.booleans(),
    n=st.integers(1, 128),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    skip_special_tokens=st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(ANY_PARAMS)
def test_travels_unchanged(params: SamplingParams) -> None:
    """logit_bias is a mappingproxy, which neither pickle nor deepcopy can handle by itself."""
    assert SamplingParams.from_mapping(json.loads(json.dumps(params.to_mapping()))) == params
    assert pickle.loads(pickle.dumps(params)) == params
    assert copy.deepcopy(params) == params
    assert copy.copy(params) == params


def test_check_against_vocab() -> None:
    SamplingParams(logit_bias={99: 1}, stop_token_ids=[99]).check_against_vocab(100)
    SamplingParams().check_against_vocab(1)
    with pytest.raises(RequestError, match="logit_bias names token 100; this model's token ids are 0 to 99"):
        SamplingParams(logit_bias={3: 1, 100: 1}).check_against_vocab(100)
    with pytest.raises(RequestError, match="stop_token_ids names token 5"):
        SamplingParams(stop_token_ids=[5]).check_against_vocab(5)


def test_reads_its_own_settings() -> None:
    assert SamplingParams(temperature=0).is_greedy
    assert SamplingParams(temperature=9e-6).is_greedy
    assert not SamplingParams(temperature=1e-5).is_greedy
    assert not SamplingParams().has_penalties
    for name, value in (("repetition_penalty", 0.5), ("presence_penalty", -1), ("frequency_penalty", 1)):
        assert SamplingParams(**{name: value}).has_penalties
