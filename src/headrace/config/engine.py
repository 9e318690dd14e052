"""How a model is loaded, cached and scheduled."""

from dataclasses import dataclass, field
from enum import Enum

from headrace.config.checks import check_at_least_one
from headrace.config.device import Device
from headrace.config.parallel import ParallelConfig
from headrace.errors import ConfigError

MAX_THREADS = 4096
"""More than any machine has; a typing error should not ask the system for them."""

SERVING_STEP_S = 0.25
"""max_step_s of a server: slower than people read, faster than they take for a halt."""

LONGEST_STEP_S = 3600.0

HOST_MEMORY_FRACTION = 0.5
GPU_MEMORY_FRACTION = 0.9


class Dtype(Enum):
    """Type of activations and unquantized weights; AUTO takes the checkpoint's (float16 becomes bfloat16)."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Quantize(Enum):
    """Format of linear weights on load: as stored, or symmetric integers in groups along K."""

    NONE = "none"
    INT8 = "int8"
    INT4 = "int4"


class WeightFormat(Enum):
    """How one weight matrix lies in memory."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    INT4 = "int4"


class KvCacheDtype(Enum):
    """Type of the KV cache; AUTO takes that of the activations."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"


class KvCacheFormat(Enum):
    """How keys and values lie in memory; int8 has a float32 scale for each token and KV head, and for each of both."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"


class Softmax(Enum):
    """How attention finds what it subtracts from logits before the exponential.

    AUTO is the same everywhere; MEASURED is the scheme that `headrace tune` found to be the fastest on this machine.
    Schemes round differently, so a text may depend on which one it was made with.
    """

    AUTO = "auto"
    MEASURED = "measured"
    SYNCHRONIZED = "synchronized"
    ASYNCHRONIZED = "asynchronized"
    LAZY = "lazy"


class SoftmaxScheme(Enum):
    """A scheme that was chosen, for one layer.

    SYNCHRONIZED   the largest logit so far; partial results are rescaled and merged by log-sum-exp
    ASYNCHRONIZED  a constant, so that nothing waits for a maximum; rows it does not suit are computed again
                   (FlashDecoding++, arXiv:2311.01282)
    LAZY           an earlier maximum, until it is exceeded by a factor of 2^8 in the exponential (FlashAttention-4)
    """

    SYNCHRONIZED = "synchronized"
    ASYNCHRONIZED = "asynchronized"
    LAZY = "lazy"


class DataflowChoice(Enum):
    """Which implementation of a linear layer multiplies how many rows: as measured on this machine (quickly, on first
    use of a model, unless `headrace tune` has done it), by default, or one for all. Results are the same to the bit."""

    MEASURED = "measured"
    DEFAULT = "default"
    GEMV = "gemv"
    FLAT_GEMM = "flat_gemm"
    GEMM = "gemm"


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """model: a folder with config.json and safetensors, or a hub id such as `org/name`; revision: hub only.

    require_tokenizer: refuse a model without one before its weights are read, instead of running token ids only.
    """

    model: str
    revision: str | None = None
    dtype: Dtype = Dtype.AUTO
    quantize: Quantize = Quantize.NONE
    show_progress: bool = False
    require_tokenizer: bool = False


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The paged KV cache.

    kv_cache_dtype: int8 takes about half the memory of bfloat16, and loses some precision.
    block_size: tokens per block; native kernels pad it to a multiple of 16.
    kv_cache_bytes: memory for keys and values; None takes what `max_num_seqs` full contexts could use, at most
        `memory_fraction` of the memory free after the weights are loaded, within the cgroup's limit; on a GPU also
        after what steps need.
    memory_fraction: None is HOST_MEMORY_FRACTION, or GPU_MEMORY_FRACTION on a GPU, which is the engine's own.
    num_blocks: overrides the budget; for tests and experiments.
    """

    kv_cache_dtype: KvCacheDtype = KvCacheDtype.AUTO
    block_size: int = 16
    kv_cache_bytes: int | None = None
    memory_fraction: float | None = None
    num_blocks: int | None = None
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        check_at_least_one("block_size", self.block_size)
        check_at_least_one("kv_cache_bytes", self.kv_cache_bytes)
        check_at_least_one("num_blocks", self.num_blocks)
        if self.memory_fraction is not None and not 0 < self.memory_fraction <= 1:
            raise ConfigError(f"memory_fraction is {self.memory_fraction}; allowed: above 0, up to 1")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """max_num_seqs: requests in one step; max_num_batched_tokens: prompt and decode tokens in one step;
    max_model_len: prompt plus output tokens of one request, None takes the model's.

    max_step_s: seconds between two tokens of a request, about, while prompts of others are computed: what steps have
        taken bounds the prompt tokens beside decodes. None lets prompts take all of max_num_batched_tokens, which ends
        sooner in sum, and runs the same steps each time: for texts that nobody waits for token by token.
    """

    max_num_seqs: int = 32
    max_num_batched_tokens: int = 1024
    max_model_len: int | None = None
    max_step_s: float | None = None

    def __post_init__(self) -> None:
        check_at_least_one("max_num_seqs", self.max_num_seqs)
        check_at_least_one("max_num_batched_tokens", self.max_num_batched_tokens)
        check_at_least_one("max_model_len", self.max_model_len)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is below max_num_seqs ({self.max_num_seqs}); "
                "a step must have room for one token of each request"
            )
        _check_step_s(self.max_step_s)


def _check_step_s(value: float | None) -> None:
    if value is None:
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= LONGEST_STEP_S:
        raise ConfigError(f"max_step_s is {value!r}; allowed: a number above 0, up to {LONGEST_STEP_S:g}, or None")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """num_threads: of one rank; None takes the CPUs of the affinity mask within the cgroup's quota, divided among the
    ranks on this host.

    dataflow: how linear layers are computed, which changes their speed alone.
    batch_invariant: with the native CPU kernels, what a request gets is the same to the last bit alone and in any
        batch. Where a CPU has one way to multiply integer weights that is faster for one or two rows and one for more
        (AMX with float16), False lets it have both; True is the one for more. Nothing changes elsewhere.
    device: where weights, cache and activations lie.
    graphs: decode steps are recorded once and replayed as one call, as CUDA graphs on a GPU; changes their speed alone.
    graph_budget_s: what recording them may take at start on a GPU, about; what is left is recorded when it is first
        needed, or, with several ranks, not at all.
    """

    load: LoadConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    softmax: Softmax = Softmax.AUTO
    num_threads: int | None = None
    dataflow: DataflowChoice = DataflowChoice.MEASURED
    batch_invariant: bool = True
    device: Device = field(default_factory=Device)
    graphs: bool = True
    graph_budget_s: float = 60.0

    def __post_init__(self) -> None:
        check_at_least_one("num_threads", self.num_threads)
        if self.num_threads is not None and self.num_threads > MAX_THREADS:
            raise ConfigError(f"num_threads is {self.num_threads}; allowed: 1 to {MAX_THREADS}")
        if not self.graph_budget_s >= 0:
            raise ConfigError(f"graph_budget_s is {self.graph_budget_s}; allowed: 0 and more seconds")
