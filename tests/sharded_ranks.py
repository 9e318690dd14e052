"""Ranks that sample together, as threads, beside what they are compared with."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from thread_group import ThreadGroup, on_ranks, thread_groups
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from headrace.config import SamplingParams
from headrace.costs.candidates import RowRecord, row_record
from headrace.costs.sharding import shard_vocabulary, vocabulary_shard_sizes
from headrace.engine.device_memory import Retrying
from headrace.engine.logits import AnyLargest, DeviceLargest, Largest
from headrace.engine.plan import StepResult
from headrace.engine.sampler import SamplingRow
from headrace.engine.sharded_sampler import ShardedSampler
from headrace.kernels import KernelChoice, Kernels, resolve_kernels
from headrace.parallel.group import Group

DEVICE = resolve_kernels(KernelChoice.REFERENCE)
"""The CPU, standing for a device."""


def sampler_on_device(group: Group, vocab_size: int, retrying: Retrying, _: Kernels | None) -> ShardedSampler:
    """In the place of a worker's own, which takes the CPU for no device."""
    return ShardedSampler(group, vocab_size, retrying, DEVICE)


EOS = 3
VOCAB_SIZES = (1, 5, 16, 17, 33, 131, 257, 1000, 4099)


def make_row(seq_id=0, prompt=(), output=(), seed=0, **params) -> SamplingRow:
    return SamplingRow(
        seq_id=seq_id,
        params=SamplingParams(**{"max_tokens": None, **params}),
        seed=seed,
        prompt_token_ids=prompt,
        output_token_ids=output,
        eos_token_ids=(EOS,),
    )


class Waits:
    """Counts copies to the host, where a device would be waited for. Whatever else would wait is refused."""

    def __init__(self) -> None:
        self.count = 0
        self._calls, self._ops = _Calls(self), _Ops()

    def __enter__(self) -> "Waits":
        self._calls.__enter__()
        self._ops.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ops.__exit__(*error)
        self._calls.__exit__(*error)


class _Calls(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._waits.count += func is torch.Tensor.cpu
        return func(*args, **(kwargs or {}))


class _Ops(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"), name
        if name in ("aten::index", "aten::index_put_", "aten::index_put"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a mask is read by the host"
        return func(*args, **(kwargs or {}))


class Ranks:
    """Samplers of all ranks of a group, called together. Each must say the same.

    kernels: of the device that shards are read on, None has the host read them.
    """

    def __init__(self, world_size: int, vocab_size: int, kernels: Kernels | None = None) -> None:
        self.groups = thread_groups(world_size)
        self.vocab_size, self._kernels = vocab_size, kernels
        self.samplers = [ShardedSampler(group, vocab_size, kernels=kernels) for group in self.groups]

    def shard(self, group: ThreadGroup, logits: torch.Tensor) -> torch.Tensor:
        ids = shard_vocabulary(self.vocab_size, group.rank, group.world_size)
        return logits[:, ids.start : ids.stop].contiguous()

    def sample(
        self,
        logits: np.ndarray,
        rows: Sequence[SamplingRow],
        *,
        knows_largest: bool = False,
        counts_waits: bool = False,
    ) -> StepResult:
        whole = torch.from_numpy(np.array(logits, np.float32))

        def run(group: ThreadGroup) -> StepResult:
            shard = self.shard(group, whole)
            sampler = self.samplers[group.rank]
            largest = largest_of(shard, is_on_device=self._kernels is not None) if knows_largest else None
            if not counts_waits:
                return sampler.sample(shard, rows, largest)
            with Waits() as waits:
                outcome = sampler.sample(shard, rows, largest)
            assert waits.count == 1
            return outcome

        first, *others = on_ranks(self.groups, run)
        assert all(other == first for other in others)
        return first

    @property
    def fallback_rows(self) -> int:
        (count,) = {sampler.fallback_rows for sampler in self.samplers}
        return count

    def payload_bytes(self, site: str) -> list[int]:
        """What each rank brought."""
        return [sum(r.payload_bytes for r in group.ledger_rows() if r.site == site) for group in self.groups]

    def count(self, site: str) -> int:
        (count,) = {sum(r.count for r in group.ledger_rows() if r.site == site) for group in self.groups}
        return count


def largest_of(shard: torch.Tensor, *, is_on_device: bool) -> AnyLargest:
    """As a recorded argmax leaves it; a rank without tokens has none."""
    ids, logits = torch.zeros(len(shard), dtype=torch.int64), torch.full((len(shard),), -torch.inf)
    if shard.shape[1]:
        ids = shard.argmax(dim=1)
        logits = shard.gather(1, ids[:, None])[:, 0]
    return DeviceLargest(ids, logits) if is_on_device else Largest(ids.numpy(), logits.numpy())


def record_of(row: SamplingRow, vocab_size: int, world_size: int) -> RowRecord:
    largest_shard = vocabulary_shard_sizes(vocab_size, world_size)[0]
    return row_record(row.params, changes_logits=row.changes_logits, vocab_size=vocab_size, largest_shard=largest_shard)


def assert_same(found: StepResult, expected: StepResult) -> None:
    assert found.failed == expected.failed
    assert [(s.seq_id, s.token_id) for s in found.sampled] == [(s.seq_id, s.token_id) for s in expected.sampled]
    for mine, theirs in zip(found.sampled, expected.sampled, strict=True):
        assert [(p.token_id, p.rank) for p in mine.logprobs] == [(p.token_id, p.rank) for p in theirs.logprobs]
        for p, q in zip(mine.logprobs, theirs.logprobs, strict=True):
            assert p.logprob == q.logprob or abs(p.logprob - q.logprob) < 1e-5


PARAMS = {
    "temperature": st.sampled_from([0, 0, 1e-3, 0.5, 1.0, 1.0, 3.0, 1e30, 1e300]),
    "top_k": st.sampled_from([-1, 0, 0, 1, 2, 7, 50, 10**6]),
    "top_p": st.sampled_from([1.0, 1.0, 1e-12, 0.3, 0.9, 0.9999]),
    "min_p": st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
    "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3, 0.7, 1e-3]),
    "presence_penalty": st.sampled_from([0.0, 0.0, 0.8, -2.0]),
    "frequency_penalty": st.sampled_from([0.0, 0.0, 1.1, -0.4]),
    "min_tokens": st.sampled_from([0, 0, 9]),
    "logprobs": st.sampled_from([None, None, 0, 1, 5, 20]),
}
PLAIN = {"temperature": 0}
