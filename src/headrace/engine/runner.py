"""One stage of the model, run on rows of token ids and block tables."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.batch import ForwardBatch
from headrace.cache.kv_pool import KvPool
from headrace.cache.kv_share import KvShare
from headrace.engine.decode_step import MAX_DECODE_STEP_SEQS, DecodeStep
from headrace.engine.logits import Logits
from headrace.engine.rows import Row, build_forward_batch
from headrace.models.boundary import Boundary
from headrace.models.decoder import Decoder


class ModelRunner:
    """One stage's decoder and the cache it writes to.

    max_model_len: the longest sequence that will come.
    boundary: to the stages before and after; None for a model that is one stage.
    share: the cache blocks this rank has, if not all; the pool then has room for those alone.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv_pool: KvPool,
        max_model_len: int,
        boundary: Boundary | None = None,
        share: KvShare | None = None,
    ) -> None:
        self._decoder = decoder
        self._boundary = boundary
        self._kv_pool = kv_pool
        self._share = share
        self._decode_step = DecodeStep(
            decoder.kernels,
            self._forward,
            decoder.compute_logits,
            block_size=kv_pool.spec.block_size,
            max_model_len=max_model_len,
            share=share,
        )

    @property
    def decode_step(self) -> DecodeStep:
        return self._decode_step

    @property
    def has_head(self) -> bool:
        """The last stage computes logits; the others hand their hidden states on and keep none."""
        return self._decoder.lm_head is not None

    @property
    def vocab_size(self) -> int:
        return self._decoder.config.vocab_size

    def run(self, rows: Sequence[Row]) -> Tensor:
        """Hidden states of all rows' tokens, laid end to end: [num_tokens, hidden_size]. Valid until the next run."""
        if len(rows) <= MAX_DECODE_STEP_SEQS and all(len(row.token_ids) == 1 for row in rows):
            return self._decode_step.run(rows)
        return self._forward(build_forward_batch(rows, self._kv_pool.spec.block_size, self._share))

    def logits(self, hidden_states: Tensor) -> Logits:
        """Logits of what `run` returned, or of some rows of that. Valid until the next call of either."""
        replayed = self._decode_step.logits(hidden_states)
        return Logits(self._decoder.compute_logits(hidden_states)) if replayed is None else replayed

    # Not around a whole step: a replayed one has nothing that torch could track, and entering the mode costs as much as
    # several ops do.
    @torch.inference_mode()
    def _forward(self, batch: ForwardBatch) -> Tensor:
        decoder, boundary = self._decoder, self._boundary
        if decoder.embedding is not None:
            stream = decoder.embed(batch)
        else:
            assert boundary is not None, "a later stage has one before it"
            stream = boundary.receive(len(batch.input_ids))
        decoder.run_layers(stream, batch, self._kv_pool.layers)
        if self.has_head:
            return stream.total(decoder.kernels)
        assert boundary is not None, "an earlier stage has one after it"
        boundary.send(stream)
        return stream.hidden_states
