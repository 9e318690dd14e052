"""What an engine has planned, and the exchanges that follow from it alone: the prediction that ledgers are held to."""

from collections import Counter
from dataclasses import dataclass, field

from headrace import LLM
from headrace.config import ModelConfig, ParallelConfig
from headrace.costs.candidates import candidates_payload_bytes, draws_payload_bytes, row_record
from headrace.costs.exchanges import Layout, WireRules
from headrace.costs.sharding import vocabulary_shard_sizes
from headrace.costs.sites import Phase
from headrace.costs.steps import ForwardPass, Run, SampledRows, WholeRows
from headrace.costs.volume import differences, predict_run
from headrace.engine.plan import NewSequence, StepPlan
from headrace.parallel.ledger import LedgerRow

PROMPT_ROWS = 64
"""Rows of whole logits that exist at once where prompts are scored."""


def record_plans(llm: LLM) -> list[StepPlan]:
    """Every plan that the engine hands out from here on."""
    executor = llm.engine.model.executor
    submit, plans = executor.submit, []

    def recorded(plan: StepPlan) -> None:
        plans.append(plan)
        submit(plan)

    executor.submit = recorded
    return plans


@dataclass(kw_only=True)
class _Live:
    new: NewSequence
    output_token_ids: list[int] = field(default_factory=list)

    @property
    def changes_logits(self) -> bool:
        params = self.new.params
        return bool(params.logit_bias) or params.has_penalties or len(self.output_token_ids) < params.min_tokens


def run_of(plans: list[StepPlan], vocab_size: int, tensor_parallel_size: int) -> Run:
    """Rows whose candidates do not suffice are not foreseen: a plan does not tell."""
    largest_shard = vocabulary_shard_sizes(vocab_size, tensor_parallel_size)[0]
    live: dict[int, _Live] = {}
    run: Run = Counter()
    for plan in plans:
        for seq_id, token_id in plan.sampled:
            live[seq_id].output_token_ids.append(token_id)
        for seq_id in plan.finished:
            del live[seq_id]
        live |= {new.seq_id: _Live(new=new) for new in plan.new}
        if not plan.chunks:
            continue
        num_tokens = sum(chunk.num_tokens for chunk in plan.chunks)
        phase = Phase.DECODE if plan.num_decode_tokens == num_tokens else Phase.PREFILL
        run[ForwardPass(phase, num_tokens)] += 1
        for chunk in plan.chunks:
            new = live[chunk.seq_id].new
            if new.params.prompt_logprobs is not None:
                num_scored = len(new.prompt_token_ids[chunk.start + 1 : chunk.start + chunk.num_tokens + 1])
                for start in range(0, num_scored, PROMPT_ROWS):
                    run[WholeRows(phase, min(PROMPT_ROWS, num_scored - start))] += 1
        sampled = [live[chunk.seq_id] for chunk in plan.chunks if chunk.samples]
        if sampled:
            masked = dict(plan.masks)
            records = [
                row_record(
                    row.new.params,
                    changes_logits=row.changes_logits or row.new.seq_id in masked,
                    vocab_size=vocab_size,
                    largest_shard=largest_shard,
                )
                for row in sampled
            ]
            run[SampledRows(phase, len(sampled), candidates_payload_bytes(records), draws_payload_bytes(records))] += 1
    return run


def assert_ledgers_as_predicted(
    ledgers: list[list[LedgerRow]],
    plans: list[StepPlan],
    model: ModelConfig,
    parallel: ParallelConfig,
    rules: WireRules,
    activation_bytes: int = 4,
) -> None:
    """Every rank's ledger has the calls and bytes that the plans ask for: no more, no less, nowhere else."""
    layout = Layout(model=model, parallel=parallel, activation_bytes=activation_bytes, rules=rules)
    predicted = predict_run(layout, run_of(plans, model.vocab_size, parallel.tensor_parallel_size))
    assert len(ledgers) == len(predicted) == parallel.world_size
    for rank, (expected, rows) in enumerate(zip(predicted, ledgers, strict=True)):
        assert rows, f"rank {rank} has exchanged nothing"
        found = list(differences(expected, rows))
        assert not found, "\n".join([f"rank {rank}:", *found])
