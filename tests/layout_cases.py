"""Layouts, checkpoints for every family, and what an engine on several ranks has to show on them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from checkpoints import RECIPES, Recipe, random_tokens
from planned_run import assert_ledgers_as_predicted, record_plans

from headrace import LLM, RequestOutput, SamplingParams
from headrace.config import Transport
from headrace.config.settings import parallel_config
from headrace.costs.exchanges import rules_of

NUM_TOKENS = 24
SHARED_PREFIX = random_tokens(24, seed=1)
PROMPTS = (
    SHARED_PREFIX + random_tokens(9, seed=2),
    random_tokens(23, seed=3),
    SHARED_PREFIX + random_tokens(5, seed=4),
)
ORDER = (0, 1, 2, 0, 2, 1, 1)
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
MAX_MODEL_LEN = 64
CROWDED = {
    "max_model_len": MAX_MODEL_LEN,
    "block_size": 8,
    "num_blocks": 14,
    "max_num_batched_tokens": 12,
    "max_num_seqs": 4,
    "num_threads": 1,
}
"""Prompts come in chunks beside sequences that decode, share prefixes, and have too few blocks for all."""

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_parallel_size": 2},
    "tp4": {"tensor_parallel_size": 4},
    "pp2": {"pipeline_parallel_size": 2},
    "pp1-2": {"pipeline_parallel_size": 2, "pipeline_layers": (1, 2)},
    "pp3": {"pipeline_parallel_size": 3},
    "tp2-pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
}


def deep_enough(recipe: Recipe) -> Recipe:
    """The recipe with three layers, one for each stage, if it has fewer."""
    if recipe.settings["num_hidden_layers"] >= 3:
        return recipe
    finish = recipe.finish
    if isinstance(finish, partial) and "num_hidden_layers" in finish.keywords:
        finish = partial(finish.func, **finish.keywords | {"num_hidden_layers": 3})
    return replace(recipe, settings=recipe.settings | {"num_hidden_layers": 3}, finish=finish)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A checkpoint of three layers or more, and the tokens of each prompt by itself in one process."""

    folder: Path
    tokens: list[list[int]]
    num_layers: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Subject":
        return cls(**fields | {"folder": Path(fields["folder"])})

    def settings(self, layout: str) -> dict[str, Any]:
        """Of a crowded engine with this layout."""
        settings = CROWDED | LAYOUTS[layout]
        if "pipeline_layers" in settings:
            settings["pipeline_layers"] = (1, self.num_layers - 1)
        return settings


def make_subject(recipe: Recipe, folder: Path) -> Subject:
    deep_enough(recipe).write(folder)
    llm = LLM(str(folder), dtype="float32", num_threads=1, max_model_len=MAX_MODEL_LEN)
    tokens = [tokens_of(llm.generate(as_prompts([prompt]), GREEDY))[0] for prompt in PROMPTS]
    return Subject(folder=folder, tokens=tokens, num_layers=llm.engine.model.config.num_hidden_layers)


def as_prompts(token_lists) -> list[dict[str, Any]]:
    return [{"prompt_token_ids": tokens} for tokens in token_lists]


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@contextmanager
def closing(llm: LLM) -> Iterator[LLM]:
    try:
        yield llm
    finally:
        llm.close()


def assert_crowd(llm: LLM, subject: Subject, settings: dict[str, Any], transport: Transport) -> None:
    """All that can happen to a request happens, tokens are those of one process, bytes those predicted."""
    plans = record_plans(llm)
    outputs = llm.generate(as_prompts(PROMPTS[i] for i in ORDER), GREEDY)
    assert tokens_of(outputs) == [subject.tokens[i] for i in ORDER]
    assert any(output.metrics.num_cached_tokens > 0 for output in outputs), "no prefix was shared"
    assert llm.engine.metrics().num_preemptions > 0
    assert any(0 < plan.num_decode_tokens < plan.num_tokens for plan in plans), "no step had prompts beside outputs"
    llm.engine.check_integrity()
    executor, model = llm.engine.model.executor, llm.engine.model.config
    assert_ledgers_as_predicted(executor.ledger_rows(), plans, model, parallel_config(**settings), rules_of(transport))


FAMILIES = tuple({recipe.architecture: recipe for recipe in reversed(RECIPES)}.values())[::-1]
"""The first recipe of each."""
