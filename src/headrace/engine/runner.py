"""One stage of the model, run on rows of token ids and block tables."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.batch import ForwardBatch
from headrace.cache.kv_pool import KvPool
from headrace.cache.kv_share import KvShare
from headrace.engine.decode_step import DecodeStep
from headrace.engine.logits import DeviceLargest, Logits
from headrace.engine.rows import Row, build_forward_batch
from headrace.engine.step_inputs import StepInputs
from headrace.engine.step_sizes import StepSizes, exact_sizes
from headrace.kernels import Kernels, SoftmaxCounts
from headrace.models.boundary import Boundary
from headrace.models.decoder import Decoder


class ModelRunner:
    """One stage's decoder and the cache it writes to.

    max_model_len: the longest sequence that will come. sizes: of the decode steps that are recorded.
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
        sizes: StepSizes | None = None,
    ) -> None:
        self._decoder = decoder
        self._boundary = boundary
        self._kv_pool = kv_pool
        self._share = share
        sizes = sizes or exact_sizes()
        inputs = StepInputs(
            max_num_seqs=sizes.largest,
            block_size=kv_pool.spec.block_size,
            max_model_len=max_model_len,
            share=share,
            device=decoder.kernels.device,
        )
        self.has_head = decoder.lm_head is not None
        """The last stage computes logits; the others hand their hidden states on and keep none."""
        head = decoder.compute_logits if self.has_head else None
        self._decode_step = DecodeStep(decoder.kernels, self._forward, head, inputs, sizes)

    @property
    def decode_step(self) -> DecodeStep:
        return self._decode_step

    @property
    def kernels(self) -> Kernels:
        return self._decoder.kernels

    @property
    def vocab_size(self) -> int:
        return self._decoder.config.vocab_size

    def softmax_counts(self) -> SoftmaxCounts:
        """Rows of attention in all layers of the stage; waits for a GPU."""
        counts = self._kv_pool.softmax_counts()
        return SoftmaxCounts(
            num_rows=sum(count.num_rows for count in counts),
            num_recomputed_rows=sum(count.num_recomputed_rows for count in counts),
        )

    def num_rows(self, num_tokens: int, num_seqs: int) -> int:
        """Rows that a step of so many tokens computes, and exchanges."""
        return self._decode_step.num_rows(num_seqs) if num_tokens == num_seqs else num_tokens

    def num_logits_rows(self, num_tokens: int, num_seqs: int, num_sampled: int) -> int:
        """Rows of logits that such a step computes, and may exchange, if num_sampled of its sequences are sampled."""
        return self._decode_step.num_logits_rows(num_seqs) if num_tokens == num_seqs == num_sampled else num_sampled

    def run(self, rows: Sequence[Row]) -> Tensor:
        """Hidden states of all rows' tokens, laid end to end: [num_tokens, hidden_size]. Valid until the next run."""
        num_tokens = sum([len(row.token_ids) for row in rows])
        if num_tokens == len(rows) <= self._decode_step.sizes.largest:
            return self._decode_step.run(rows)
        device = self._decoder.kernels.device
        return self._forward(build_forward_batch(rows, self._kv_pool.spec.block_size, self._share, device))

    def next_logits(self, rows: Sequence[Row]) -> Logits:
        """`logits` of `run`, for rows of one token each, all of them to be sampled."""
        replayed = self._decode_step.run_to_logits(rows)
        return self.logits(self.run(rows)) if replayed is None else replayed

    def logits(self, hidden_states: Tensor) -> Logits:
        """Logits of what `run` returned, or of some rows of that. Valid until the next call of either."""
        replayed = self._decode_step.logits(hidden_states)
        if replayed is not None:
            return replayed
        logits = self._decoder.compute_logits(hidden_states)
        # On the CPU the sampler reads them where they are.
        has_largest = not logits.is_cpu and logits.shape[1] > 0
        return Logits(logits, DeviceLargest(*self._decoder.kernels.argmax(logits)) if has_largest else None)

    def last_hidden_states(self, hidden_states: Tensor) -> Tensor:
        """The model's, of what `run` returned, or of some rows of that."""
        return self._decoder.last_hidden_states(hidden_states)

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
