"""What a model's weights amount to, and how much of them one token needs. Computed from shapes; nothing is loaded."""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from headrace.config import ModelConfig, WeightFormat
from headrace.kernels import Kernels
from headrace.kernels.mixture_tuning import MixtureShape
from headrace.kernels.tuning import LinearShape
from headrace.layers.context import LayerContext
from headrace.layers.parameter import Parameter
from headrace.models.decoder import Decoder
from headrace.models.loading import WeightFormats
from headrace.parallel.group import OneRankGroup

_DENSE_BYTES = {WeightFormat.FLOAT32: 4, WeightFormat.BFLOAT16: 2}


@dataclass(frozen=True, kw_only=True)
class WeightFacts:
    """num_parameters, weight_bytes: all of them; a tied embedding counts once.

    num_layer_parameters: those a token is multiplied with in the layers; num_head_parameters: in the output head,
    which only tokens that are sampled from pass. Embedding tables are looked up, not multiplied, and of a mixture of
    experts only the chosen ones count.
    bytes_per_step: weights that a decode step of one token reads.
    """

    num_parameters: int
    weight_bytes: int
    num_layer_parameters: int
    num_head_parameters: int
    bytes_per_step: int


def linear_shapes(config: ModelConfig, formats: WeightFormats, kernels: Kernels) -> tuple[LinearShape, ...]:
    """The distinct shapes that tokens are multiplied with, in the order in which a token meets them."""
    shapes = (
        LinearShape(weight_format=formats.of(p), out_features=p.local_rows, in_features=p.local_columns)
        for p in _unloaded(config, formats, kernels).linear_parameters(with_experts=not kernels.has_expert_tiles)
    )
    return tuple(dict.fromkeys(shapes))


def mixture_shape(config: ModelConfig, formats: WeightFormats, kernels: Kernels) -> MixtureShape | None:
    """That of the first mixture of experts, if its launches can be tuned."""
    mixture = next(_unloaded(config, formats, kernels).mixtures(), None) if kernels.has_expert_tiles else None
    if mixture is None:
        return None
    up = next(mixture.expert_parameters())
    return MixtureShape(
        weight_format=formats.of(up),
        activation_bytes=formats.dtype.itemsize,
        num_experts=len(mixture.experts),
        hidden_size=up.local_columns,
        intermediate_size=up.local_rows // 2,
    )


def _unloaded(config: ModelConfig, formats: WeightFormats, kernels: Kernels) -> Decoder:
    context = LayerContext(kernels=kernels, tp_group=OneRankGroup())
    return Decoder(config, context, dtype=formats.dtype, max_model_len=config.max_position_embeddings)


def weight_facts(config: ModelConfig, formats: WeightFormats, kernels: Kernels) -> WeightFacts:
    decoder = _unloaded(config, formats, kernels)
    layers = [parameter for layer in decoder.layers for parameter in layer.parameters()]
    everything = list(decoder.parameters())
    head = _head_parameters(decoder, config)
    shares = {id(parameter): _active_share(parameter, config) for parameter in layers} | {
        id(p): Fraction(1) for p in head
    }
    return WeightFacts(
        num_parameters=sum(map(_size, everything)),
        weight_bytes=sum(_num_bytes(p, formats, kernels) for p in everything),
        num_layer_parameters=int(sum(_size(p) * shares[id(p)] for p in layers)),
        num_head_parameters=sum(map(_size, head)),
        bytes_per_step=int(sum(_num_bytes(p, formats, kernels) * shares[id(p)] for p in (*layers, *head))),
    )


def _head_parameters(decoder: Decoder, config: ModelConfig) -> list[Parameter]:
    """The output head; a tied one is the embedding table."""
    assert decoder.lm_head is not None
    assert decoder.embedding is not None
    return [*([decoder.embedding.table] if config.tie_word_embeddings else []), *decoder.lm_head.parameters()]


def _active_share(parameter: Parameter, config: ModelConfig) -> Fraction:
    """The part of a parameter that one token uses, averaged over equal ones: k / n for n experts of which k run."""
    name = parameter.slices[0].name
    if ".experts." not in name:
        return Fraction(1)
    moe = config.layers[_layer_index(name.split("."))].moe
    assert moe is not None
    return Fraction(moe.num_experts_per_token, moe.num_experts)


def _layer_index(name_parts: Iterable[str]) -> int:
    """The first number in `model.layers.<index>.mlp...`."""
    return next(int(part) for part in name_parts if part.isdigit())


def _size(parameter: Parameter) -> int:
    return parameter.local_rows * parameter.local_columns


def _num_bytes(parameter: Parameter, formats: WeightFormats, kernels: Kernels) -> int:
    rows, columns = parameter.local_rows, parameter.local_columns
    if not parameter.is_matrix:
        return rows * _DENSE_BYTES[formats.dense]
    return kernels.weight_num_bytes(formats.of(parameter), rows, columns)
