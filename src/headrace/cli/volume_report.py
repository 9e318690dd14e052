"""What `headrace volume` compares, and its JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from headrace.config import ParallelConfig
from headrace.costs.exchanges import LITERAL_RULES, LITERAL_TO_ALL_RULES, Layout
from headrace.costs.published import (
    PipelineParallelVolume,
    TensorParallelVolume,
    published_pipeline_parallel,
    published_tensor_parallel,
)
from headrace.costs.sites import Phase
from headrace.costs.steps import RequestShape
from headrace.costs.summary import SummaryRow, summarize, wire_bytes_by_phase
from headrace.costs.volume import Counted, differences, predict_request


@dataclass(frozen=True, kw_only=True)
class Account:
    """What one engine exchanges; ranks: its rows, rank 0 first."""

    key: str
    title: str
    ranks: Sequence[Sequence[Counted]]

    @property
    def total_wire_bytes(self) -> int:
        return sum(wire_bytes_by_phase(self.ranks).values())

    @property
    def total_payload_bytes(self) -> int:
        """Of all ranks; what was received is what another one has sent."""
        return sum(row.payload_bytes for rows in self.ranks for row in rows if row.operation != "recv")


@dataclass(frozen=True, kw_only=True)
class VolumeReport:
    """The published formulas, an engine that follows them to the letter, and Headrace, for the same requests.

    dtype: of activations. counted: the ledgers of all ranks after just these requests, rank 0 first; None if nothing
    was run.
    """

    model_name: str
    dtype: str
    layout: Layout
    request: RequestShape
    max_num_batched_tokens: int
    counted: Sequence[Sequence[Counted]] | None = None

    def accounts(self) -> list[Account]:
        """The literal engine first, in the two variants that were in use; then Headrace, predicted and counted."""
        predicted = [
            self._account("literal", "literal: boundaries in slices, logits to the root", literal(self.layout)),
            self._account(
                "literal_whole", "literal: boundaries whole, logits to each rank", _literal_whole(self.layout)
            ),
            self._account("headrace", "headrace", self.layout),
        ]
        if self.counted is None:
            return predicted
        return [*predicted, Account(key="counted", title="headrace, counted", ranks=self.counted)]

    def differences(self) -> list[str]:
        """Where the ledgers disagree with the prediction; empty if they agree to the byte, or nothing was run."""
        if self.counted is None:
            return []
        predicted = predict_request(self.layout, self.request, self.max_num_batched_tokens)
        return [
            f"rank {rank}: {line}"
            for rank, (mine, its) in enumerate(zip(predicted, self.counted, strict=True))
            for line in differences(mine, its)
        ]

    def to_json(self) -> dict[str, Any]:
        tensor, pipeline = self.tensor_parallel(), self.pipeline_parallel()
        model, parallel = self.layout.model, self.layout.parallel
        return {
            "model": self.model_name,
            "num_hidden_layers": model.num_hidden_layers,
            "hidden_size": model.hidden_size,
            "vocab_size": model.vocab_size,
            "dtype": self.dtype,
            "layout": {
                "tensor_parallel_size": parallel.tensor_parallel_size,
                "pipeline_parallel_size": parallel.pipeline_parallel_size,
                "pipeline_layers": [len(layers) for layers in self.layout.stages()],
                "all_reduce_dtype": parallel.all_reduce_dtype.value,
                "kv_sharding": parallel.kv_sharding.value,
                **{name: getattr(parallel, name) for name in _FLAGS},
            },
            "request": asdict(self.request),
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "published": {
                "v_tp": {
                    "num_all_reduces": tensor.num_all_reduces,
                    "num_tokens": tensor.num_tokens,
                    "ring_factor": float(tensor.ring_factor),
                    "all_reduce_bytes": _number(tensor.all_reduce_bytes),
                    "gather_bytes": _number(tensor.gather_bytes),
                    "total_bytes": _number(tensor.total_bytes),
                },
                "v_pp": asdict(pipeline),
            },
            "accounts": {account.key: self._account_to_json(account) for account in self.accounts()},
            "differences": None if self.counted is None else self.differences(),
        }

    def _account(self, key: str, title: str, layout: Layout) -> Account:
        return Account(key=key, title=title, ranks=predict_request(layout, self.request, self.max_num_batched_tokens))

    def _account_to_json(self, account: Account) -> dict[str, Any]:
        by_phase = wire_bytes_by_phase(account.ranks)
        return {
            "rows": [asdict(row) | {"phase": row.phase.value} for row in self.summary(account)],
            "wire_bytes_of_ranks": [sum(row.wire_bytes for row in rows) for rows in account.ranks],
            "total_payload_bytes": account.total_payload_bytes,
            "total_wire_bytes": {phase.value: by_phase[phase] for phase in Phase} | {"all": sum(by_phase.values())},
        }

    def summary(self, account: Account) -> list[SummaryRow]:
        return summarize(account.ranks, self.layout.callers)

    def tensor_parallel(self) -> TensorParallelVolume:
        layout = self.layout
        size = layout.parallel.tensor_parallel_size
        return published_tensor_parallel(layout.model, size, self.request, layout.activation_bytes)

    def pipeline_parallel(self) -> PipelineParallelVolume:
        layout = self.layout
        size = layout.parallel.pipeline_parallel_size
        return published_pipeline_parallel(layout.model, size, self.request, layout.activation_bytes)


_FLAGS = ("shard_embedding", "send_residual", "slice_boundary", "gather_logits")


def literal(layout: Layout) -> Layout:
    """The same ranks, exchanging what the published formulas count."""
    return replace(layout, parallel=_literal_parallel(layout.parallel, slice_boundary=True), rules=LITERAL_RULES)


def _literal_whole(layout: Layout) -> Layout:
    parallel = _literal_parallel(layout.parallel, slice_boundary=False)
    return replace(layout, parallel=parallel, rules=LITERAL_TO_ALL_RULES)


def _literal_parallel(parallel: ParallelConfig, *, slice_boundary: bool) -> ParallelConfig:
    return ParallelConfig(
        tensor_parallel_size=parallel.tensor_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        pipeline_layers=parallel.pipeline_layers,
        shard_embedding=True,
        send_residual=True,
        slice_boundary=slice_boundary,
        gather_logits=True,
    )


def _number(value: Fraction) -> int | float:
    return value.numerator if value.denominator == 1 else float(value)
