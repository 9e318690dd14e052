"""The published communication volumes of tensor and pipeline parallelism, term by term and as printed.

    V_tp = (2 L + 1) (S_p + S_d - 1) h b 2 (t - 1) / t  +  S_d (v / t) b
    V_pp = (p - 1) (S_p + S_d - 1) h b 2

L layers, h hidden size, v vocabulary, b bytes per element, t and p ranks, S_p prompt and S_d generated tokens.

They do not add up to each other, and are not comparable as they stand:
    The first term of V_tp is what each rank sends, in a ring; over all ranks it is t times as much.
    The second term of V_tp is the payload of one rank, which for a gather to a root is also what each but the root
        sends. It does not vanish at t = 1, where nothing is sent.
    V_pp is the sum over all p - 1 links.
Batches are not in them; here token counts are multiplied by the batch.

Source: Xu et al., "Characterizing Communication Patterns in Distributed Large Language Model Inference",
arXiv:2507.14392, whose factor 2 of V_pp stands for hidden states and residual, and whose + 1 for the input embedding
(vLLM 0.8.5, model_executor/models/llama.py): see docs/communication.md.
"""

from dataclasses import dataclass
from fractions import Fraction

from headrace.config import ModelConfig
from headrace.costs.steps import RequestShape


@dataclass(frozen=True, kw_only=True)
class TensorParallelVolume:
    """V_tp. num_all_reduces: in one forward pass, 2 L + 1; num_tokens: that pass through the model.

    all_reduce_bytes is per rank and a fraction where t does not divide it; gather_bytes is one rank's payload.
    """

    num_all_reduces: int
    num_tokens: int
    ring_factor: Fraction
    all_reduce_bytes: Fraction
    gather_bytes: Fraction

    @property
    def total_bytes(self) -> Fraction:
        return self.all_reduce_bytes + self.gather_bytes


@dataclass(frozen=True, kw_only=True)
class PipelineParallelVolume:
    """V_pp: over all boundaries between stages, tensors_per_boundary being the printed 2."""

    num_boundaries: int
    num_tokens: int
    tensors_per_boundary: int
    total_bytes: int


def published_tensor_parallel(
    model: ModelConfig, tensor_parallel_size: int, request: RequestShape, element_bytes: int
) -> TensorParallelVolume:
    """V_tp as printed, whatever layout would make of it."""
    num_all_reduces = 2 * model.num_hidden_layers + 1
    ring_factor = Fraction(2 * (tensor_parallel_size - 1), tensor_parallel_size)
    num_shards = Fraction(model.vocab_size, tensor_parallel_size)
    return TensorParallelVolume(
        num_all_reduces=num_all_reduces,
        num_tokens=request.num_tokens,
        ring_factor=ring_factor,
        all_reduce_bytes=num_all_reduces * request.num_tokens * model.hidden_size * element_bytes * ring_factor,
        gather_bytes=request.batch_size * request.output_tokens * num_shards * element_bytes,
    )


def published_pipeline_parallel(
    model: ModelConfig, pipeline_parallel_size: int, request: RequestShape, element_bytes: int
) -> PipelineParallelVolume:
    """V_pp as printed."""
    num_boundaries = pipeline_parallel_size - 1
    return PipelineParallelVolume(
        num_boundaries=num_boundaries,
        num_tokens=request.num_tokens,
        tensors_per_boundary=2,
        total_bytes=num_boundaries * request.num_tokens * model.hidden_size * element_bytes * 2,
    )
