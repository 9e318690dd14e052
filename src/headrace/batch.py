"""One forward pass over a flat batch of tokens, as plain tensors."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """The tokens of all sequences of a step, laid end to end; sequence i owns rows cu_seqlens_q[i] to [i + 1].

    Shapes:
        input_ids:    [num_tokens] int64
        positions:    [num_tokens] int64, place of each token in its sequence
        slot_mapping: [num_tokens] int64, block_id * block_size + offset where its keys and values go
        block_tables: [num_seqs, max_blocks_per_seq] int32, -1 padded
        context_lens: [num_seqs] int32, tokens visible to attention, this step's included; 0 for a row that stands for
            nobody, in a step that is padded to more rows than it has sequences
        cu_seqlens_q: [num_seqs + 1] int32, exclusive prefix sum of tokens per sequence
        owned_blocks: [num_seqs, max_blocks_per_seq + 1] int32, how many of a sequence's first i blocks this rank has,
            where ranks share contexts; slot_mapping (NOT_STORED for tokens of others) and block_tables then name this
            rank's blocks alone, by its own ids. None where each rank has all.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    context_lens: Tensor
    cu_seqlens_q: Tensor
    owned_blocks: Tensor | None = None
