"""Where a rank stands in the layout, and with whom it shares a group. Pure arithmetic."""

from dataclasses import dataclass

from headrace.config import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Place:
    """rank = stage * tensor_parallel_size + tp_rank, in the world of all ranks."""

    rank: int
    config: ParallelConfig

    @property
    def stage(self) -> int:
        return self.rank // self.config.tensor_parallel_size

    @property
    def tp_rank(self) -> int:
        return self.rank % self.config.tensor_parallel_size

    @property
    def tp_ranks(self) -> list[int]:
        """The ranks of this stage, which share its layers."""
        size = self.config.tensor_parallel_size
        return list(range(self.stage * size, (self.stage + 1) * size))

    @property
    def pp_ranks(self) -> list[int]:
        """The ranks of the same place in every stage, which hand hidden states on."""
        return list(range(self.tp_rank, self.config.world_size, self.config.tensor_parallel_size))

    def kv_ranks(self, num_kv_heads: int) -> list[int]:
        """The ranks that share this rank's KV head, where there are more ranks than KV heads."""
        size = max(1, self.config.tensor_parallel_size // num_kv_heads)
        start = self.tp_ranks[0] + self.tp_rank // size * size
        return list(range(start, start + size))

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.config.pipeline_parallel_size - 1

    @property
    def reports(self) -> bool:
        """Whether the tokens that this rank samples are those the engine takes."""
        return self.is_last_stage and self.tp_rank == 0

    def __str__(self) -> str:
        parts = [f"stage {self.stage}"] * (self.config.pipeline_parallel_size > 1)
        parts += [f"tensor-parallel rank {self.tp_rank}"] * (self.config.tensor_parallel_size > 1)
        return f"rank {self.rank}" + (f" ({', '.join(parts)})" if len(parts) > 1 else "")
