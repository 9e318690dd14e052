"""The private extension module: addresses and shapes in, nothing known of tensors. For headrace.kernels.cpu alone, and
for headrace.parallel what joins ranks."""

from collections.abc import Sequence
from enum import Enum

from torch import Tensor

class Format(Enum):
    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2
    INT4 = 3

class DType(Enum):
    FLOAT32 = 0
    BFLOAT16 = 1

class Arm(Enum):
    GEMV = 0
    FLAT_GEMM = 1
    GEMM = 2

class Target(Enum):
    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3
    AMX = 4
    AMX_FP16 = 5

class NormKind(Enum):
    RMS = 0
    LAYER = 1

class ActivationKind(Enum):
    SILU = 0
    GELU = 1
    GELU_TANH = 2
    RELU = 3

class Graph:
    @property
    def num_ops(self) -> int: ...
    def __call__(self) -> None: ...
    def launch(self) -> None: ...
    def then(self, following: Graph) -> Graph: ...
    def launch_timed(self) -> dict[str, float]: ...

class Stream:
    def __init__(self) -> None: ...
    @property
    def is_capturing(self) -> bool: ...
    @property
    def arena_bytes(self) -> int: ...
    def begin_capture(self) -> None: ...
    def end_capture(self) -> Graph: ...
    def empty(self, shape: Sequence[int], dtype: DType) -> Tensor: ...

class PackedMatrix:
    def __init__(self, weight_format: Format, rows: int, columns: int) -> None: ...
    def write_rows(self, target: str, row: int, dtype: DType, num_rows: int, x_ptr: int, x_stride: int) -> bool: ...
    def write_quantized_rows(self, row: int, num_rows: int, values_ptr: int, scales_ptr: int) -> None: ...
    def rows(self, begin: int, end: int) -> PackedMatrix: ...

class Linear:
    def __init__(self, target: str, batch_invariant: bool) -> None: ...
    def run(
        self,
        stream: Stream,
        arm: Arm,
        weight: PackedMatrix,
        dtype: DType,
        num_rows: int,
        x_ptr: int,
        x_stride: int,
        bias_ptr: int,
        out_ptr: int,
        out_dtype: DType,
    ) -> None: ...

class Experts:
    def __init__(self, up: Sequence[PackedMatrix], down: Sequence[PackedMatrix]) -> None: ...

class ArmsByRows:
    def __init__(self, flat_gemm_from: int, gemm_from: int) -> None: ...

class Mixture:
    def __init__(
        self,
        target: str,
        experts_per_token: int,
        is_renormalized: bool,
        activation: ActivationKind,
        batch_invariant: bool,
    ) -> None: ...
    def workspace_bytes(self, experts: Experts, dtype: DType, num_tokens: int) -> int: ...
    def run(
        self,
        stream: Stream,
        experts: Experts,
        up_arms: ArmsByRows,
        down_arms: ArmsByRows,
        dtype: DType,
        num_tokens: int,
        x_ptr: int,
        router_logits_ptr: int,
        out_ptr: int,
        workspace_ptr: int,
    ) -> None: ...

class KvCache:
    def __init__(
        self, cache_format: Format, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
    ) -> None: ...
    def read_slots(self, slots_ptr: int, num_slots: int, keys_ptr: int, values_ptr: int) -> None: ...
    def num_rows(self) -> int: ...
    def num_recomputed_rows(self) -> int: ...

class SoftmaxScheme(Enum):
    SYNCHRONIZED = 0
    ASYNCHRONIZED = 1
    LAZY = 2

class AttentionSpec:
    def __init__(
        self,
        softmax_scale: float,
        sliding_window: int | None,
        logit_soft_cap: float | None,
        scheme: SoftmaxScheme,
        unified_max: float,
        element_bounds: tuple[float, float] | None,
    ) -> None: ...

class Attention:
    def __init__(self, target: str) -> None: ...
    def run(
        self,
        stream: Stream,
        spec: AttentionSpec,
        cache: KvCache,
        dtype: DType,
        query_ptr: int,
        query_stride: int,
        num_tokens: int,
        num_heads: int,
        num_seqs: int,
        block_tables_ptr: int,
        max_blocks_per_seq: int,
        context_lens_ptr: int,
        cu_seqlens_q_ptr: int,
        out_ptr: int,
        max_pieces: int,
    ) -> None: ...
    def run_share(
        self,
        stream: Stream,
        spec: AttentionSpec,
        cache: KvCache,
        dtype: DType,
        query_ptr: int,
        query_stride: int,
        num_tokens: int,
        num_heads: int,
        num_seqs: int,
        block_tables_ptr: int,
        max_blocks_per_seq: int,
        context_lens_ptr: int,
        cu_seqlens_q_ptr: int,
        owned_blocks_ptr: int,
        owned_stride: int,
        numerators_ptr: int,
        normalizers_ptr: int,
        max_pieces: int,
    ) -> None: ...

class StoreKv:
    def __init__(self, target: str) -> None: ...
    def run(
        self,
        stream: Stream,
        cache: KvCache,
        dtype: DType,
        num_tokens: int,
        num_heads: int,
        query_ptr: int,
        query_stride: int,
        key_ptr: int,
        key_stride: int,
        value_ptr: int,
        value_stride: int,
        cos_ptr: int,
        sin_ptr: int,
        half: int,
        is_interleaved: bool,
        slot_mapping_ptr: int,
    ) -> None: ...

class Phase(Enum):
    PREFILL = 0
    DECODE = 1

class Operation(Enum):
    ALL_REDUCE = 0
    ALL_GATHER = 1
    REDUCE_SCATTER = 2
    SEND = 3
    RECV = 4

class Algorithm(Enum):
    DIRECT = 0
    TWO_SHOT = 1
    TWO_SHOT_INT8 = 2
    POINT_TO_POINT = 3

class SharedRegion:
    def __init__(
        self, world_size: int, ring_bytes: int, pair_ring_bytes: Sequence[tuple[int, int, int]] = ()
    ) -> None: ...
    @staticmethod
    def attach(fd: int) -> SharedRegion: ...
    @property
    def fd(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

class MpiLibrary:
    isend: int
    irecv: int
    test: int
    iprobe: int
    get_count: int
    cancel: int
    error_string: int
    communicator: int
    byte_type: int
    handle_bytes: int
    status_bytes: int
    def __init__(self) -> None: ...

class Communicator:
    @staticmethod
    def over_shared_memory(region: SharedRegion, rank: int) -> Communicator: ...
    @staticmethod
    def over_mpi(library: MpiLibrary, rank: int, world_size: int) -> Communicator: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def header_bytes(self) -> int: ...
    def abort(self, reason: str) -> None: ...
    def close(self) -> None: ...

class GroupCommunicator:
    def __init__(self, communicator: Communicator, name: str, ranks: Sequence[int]) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def set_phase(self, phase: Phase) -> None: ...
    def channel(self, operation: Operation, site: str) -> int: ...
    def ledger_rows(self) -> list[tuple[Operation, str, Phase, Algorithm, int, int, int, int, int]]: ...
    def start_trace(self, max_events: int) -> None: ...
    def drain_trace(self) -> list[tuple[Operation, str, Phase, Algorithm, int, int, int, int, int]]: ...
    @property
    def num_dropped_events(self) -> int: ...
    def all_reduce(
        self,
        stream: Stream | None,
        channel: int,
        algorithm: Algorithm,
        dtype: DType,
        num_rows: int,
        row_size: int,
        in_ptr: int,
        out_ptr: int,
        out_dtype: DType,
    ) -> None: ...
    def reduce_scatter(
        self,
        stream: Stream | None,
        channel: int,
        dtype: DType,
        count: int,
        in_ptr: int,
        out_ptr: int,
        out_dtype: DType,
    ) -> None: ...
    def all_gather(
        self, stream: Stream | None, channel: int, in_ptr: int, out_ptrs: Sequence[int], num_bytes: Sequence[int]
    ) -> None: ...
    def send(self, stream: Stream | None, channel: int, to: int, data_ptr: int, num_bytes: int) -> None: ...
    def recv(self, stream: Stream | None, channel: int, source: int, data_ptr: int, num_bytes: int) -> None: ...

def all_reduce_algorithm(payload_bytes: int, world_size: int, allows_int8: bool) -> Algorithm: ...
def sum_in_rank_order(
    target: Target, in_ptrs: Sequence[int], dtype: DType, count: int, out_ptr: int, out_dtype: DType
) -> None: ...
def sum_quantized_in_rank_order(
    target: Target, in_ptrs: Sequence[int], dtype: DType, num_rows: int, row_size: int, out_ptr: int
) -> None: ...
def join_heads(
    stream: Stream,
    part_ptrs: Sequence[int],
    stride_bytes: Sequence[int],
    num_rows: int,
    row_bytes: int,
    out_ptr: int,
) -> None: ...
def weigh_share(
    stream: Stream,
    target: Target,
    normalizers_ptrs: Sequence[int],
    own_rank: int,
    num_tokens: int,
    num_heads: int,
    head_dim: int,
    num_parts: int,
    numerators_ptr: int,
    dtype: DType,
    out_ptr: int,
) -> None: ...
def rotary_table(
    stream: Stream,
    positions_ptr: int,
    num_tokens: int,
    inv_freq_ptr: int,
    half: int,
    amplitude: float,
    cos_ptr: int,
    sin_ptr: int,
) -> None: ...
def kv_cache_bytes(cache_format: Format, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> int: ...
def embedding(
    stream: Stream,
    weight: PackedMatrix,
    dtype: DType,
    num_rows: int,
    ids_ptr: int,
    offset: int,
    scale: float,
    zeros_outside: bool,
    out_ptr: int,
) -> None: ...
def norm(
    stream: Stream,
    target: Target,
    kind: NormKind,
    dtype: DType,
    num_outer: int,
    num_inner: int,
    outer_stride: int,
    inner_stride: int,
    size: int,
    x_ptr: int,
    residual_ptr: int,
    weight_ptr: int,
    bias_ptr: int,
    eps: float,
    unit_offset: bool,
    out_ptr: int,
) -> None: ...
def add(stream: Stream, target: Target, dtype: DType, num_elements: int, x_ptr: int, residual_ptr: int) -> None: ...
def activation(
    stream: Stream,
    target: Target,
    kind: ActivationKind,
    is_gated: bool,
    dtype: DType,
    num_rows: int,
    size: int,
    x_ptr: int,
    out_ptr: int,
) -> None: ...
def argmax(
    stream: Stream,
    target: Target,
    logits_ptr: int,
    num_rows: int,
    row_stride: int,
    vocab_size: int,
    ids_ptr: int,
    values_ptr: int,
) -> None: ...
def log_sum_exp(
    target: Target, logits_ptr: int, num_rows: int, row_stride: int, vocab_size: int, out_ptr: int
) -> None: ...
def top_k(
    target: Target, logits_ptr: int, num_rows: int, row_stride: int, vocab_size: int, k: int, ids_ptr: int
) -> None: ...
def quantize_rows(
    target: str,
    weight_format: Format,
    dtype: DType,
    num_rows: int,
    columns: int,
    x_ptr: int,
    x_stride: int,
    values_ptr: int,
    scales_ptr: int,
) -> bool: ...
def packed_bytes(weight_format: Format, rows: int, columns: int) -> int: ...
def compiled_targets() -> list[str]: ...
def supported_targets() -> list[str]: ...
def best_target() -> str: ...
def target_from_name(name: str) -> Target: ...
def set_num_threads(num_threads: int) -> None: ...
def num_threads() -> int: ...
def measure_read_bytes_per_s(target: str, buffer_bytes: int, num_passes: int) -> float: ...
def measure_ops_per_s(target: str, weight_format: Format, num_passes: int) -> float: ...
