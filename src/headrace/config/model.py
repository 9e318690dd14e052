"""What a model is, in one vocabulary for every family.

A family (`headrace.models.families`) reads a checkpoint's config.json into a `ModelConfig`; the decoder, the cost
formulas and the planner read nothing else.
"""

from dataclasses import dataclass
from enum import Enum

from headrace.errors import ConfigError


class Activation(Enum):
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"


class NormKind(Enum):
    RMS = "rms"
    LAYER = "layer"


class NormPlacement(Enum):
    """Where a block normalizes, for a sublayer f (attention or feed-forward) and its input x.

    PRE       x + f(norm(x))                Llama and most others
    POST      norm(x + f(x))                OPT-350m
    SANDWICH  x + post_norm(f(norm(x)))     Gemma 2 and 3, GLM-4-0414
    """

    PRE = "pre"
    POST = "post"
    SANDWICH = "sandwich"


class RopeType(Enum):
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    LLAMA3 = "llama3"
    YARN = "yarn"


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was pre-trained on.

    `factor` and `original_max_position_embeddings` serve every type. llama3 reads the two frequency factors; yarn reads
    the betas, `truncate` and `attention_factor` (None derives it from `factor`, mscale and mscale_all_dim).
    """

    rope_type: RopeType
    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of the first `rotary_dim` entries of each head.

    interleaved: pairs are (0, 1), (2, 3), ... (GLM) instead of (0, rotary_dim / 2), (1, rotary_dim / 2 + 1), ...
    """

    rotary_dim: int
    theta: float = 10000.0
    interleaved: bool = False
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        if self.rotary_dim <= 0 or self.rotary_dim % 2:
            raise ConfigError(f"rotary_dim is {self.rotary_dim}; it must be a positive even number")
        if self.scaling is not None and self.scaling.rope_type is RopeType.DYNAMIC and self.rotary_dim < 4:
            raise ConfigError(f"rotary_dim is {self.rotary_dim}; dynamic scaling needs at least 4")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """softmax(soft_cap(softmax_scale * Q K^T)) V with `num_heads / num_kv_heads` query heads to each KV head."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    softmax_scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    logit_soft_cap: float | None = None

    def __post_init__(self) -> None:
        if min(self.num_heads, self.num_kv_heads, self.head_dim) < 1:
            raise ConfigError(
                f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}: "
                "each must be at least 1"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} KV heads evenly; "
                "num_attention_heads must be a multiple of num_key_value_heads"
            )


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """down(act(gate(x)) * up(x)) if gated, else down(act(up(x)))."""

    intermediate_size: int
    activation: Activation
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """A router picks `num_experts_per_token` of `num_experts` MLPs by softmax probability.

    renormalize: the chosen probabilities are scaled to sum to one.
    """

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    renormalize: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts_per_token <= self.num_experts:
            raise ConfigError(
                f"num_experts_per_token is {self.num_experts_per_token}; allowed: 1 to {self.num_experts} experts"
            )


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """unit_offset: the scale is (1 + weight), as Gemma stores it."""

    kind: NormKind = NormKind.RMS
    eps: float = 1e-6
    unit_offset: bool = False
    placement: NormPlacement = NormPlacement.PRE
    has_final_norm: bool = True


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """Token embeddings, scaled by `scale`, and what some families add to them.

    num_positions: rows of a learned position table (OPT), 0 for none; position p reads row p + position_offset.
    projection_size: width of the table where it differs from hidden_size (OPT-350m projects in and out), else None.
    """

    scale: float = 1.0
    num_positions: int = 0
    position_offset: int = 0
    projection_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What may differ from one decoder layer to the next.

    sliding_window: tokens a query sees, itself included; None sees all.
    rope: None for models without rotary embedding.
    moe: None for a dense feed-forward layer.
    """

    sliding_window: int | None = None
    rope: RopeConfig | None = None
    moe: MoeConfig | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    architecture: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    layers: tuple[LayerConfig, ...]
    attention: AttentionConfig
    mlp: MlpConfig
    norm: NormConfig
    embedding: EmbeddingConfig = EmbeddingConfig()
    tie_word_embeddings: bool = False
    final_logit_soft_cap: float | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.layers:
            raise ConfigError("num_hidden_layers is 0; a model needs at least one layer")

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)
