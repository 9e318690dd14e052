"""The private extension module: addresses and shapes in, nothing known of tensors. For headrace.kernels.cpu alone."""

from enum import Enum

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

class PackedMatrix:
    def __init__(self, weight_format: Format, rows: int, columns: int) -> None: ...
    def write_rows(self, row: int, num_rows: int, block_ptr: int) -> None: ...
    def write_quantized_rows(self, row: int, num_rows: int, values_ptr: int, scales_ptr: int) -> None: ...
    def read_rows(self, rows_ptr: int, num_rows: int, out_ptr: int) -> None: ...

class Linear:
    def __init__(self, target: str) -> None: ...
    def run(
        self,
        arm: Arm,
        weight: PackedMatrix,
        dtype: DType,
        num_rows: int,
        x_ptr: int,
        x_stride: int,
        bias_ptr: int,
        out_ptr: int,
    ) -> None: ...

def packed_bytes(weight_format: Format, rows: int, columns: int) -> int: ...
def compiled_targets() -> list[str]: ...
def supported_targets() -> list[str]: ...
def best_target() -> str: ...
def set_num_threads(num_threads: int) -> None: ...
def num_threads() -> int: ...
def measure_read_bytes_per_s(target: str, buffer_bytes: int, num_passes: int) -> float: ...
def measure_ops_per_s(target: str, weight_format: Format, num_passes: int) -> float: ...
