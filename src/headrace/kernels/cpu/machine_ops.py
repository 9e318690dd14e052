"""This machine at its best, with the pool's threads and one instruction set: loops that only read, or only multiply."""

from headrace import _native
from headrace.config import WeightFormat
from headrace.kernels.cpu.targets import check_target

_READ_PASSES = 8
_MULTIPLY_PASSES = 60

_MULTIPLIES_AS = {
    WeightFormat.FLOAT32: ("float32", _native.Format.FLOAT32),
    WeightFormat.BFLOAT16: ("bfloat16", _native.Format.BFLOAT16),
    WeightFormat.INT8: ("int8", _native.Format.INT8),
    WeightFormat.INT4: ("int8", _native.Format.INT8),  # unpacked, then the same dot products
}


class MachineOps:
    """
    Raises:
        BackendUnavailable: an instruction set this machine cannot run.
    """

    def __init__(self, target: str) -> None:
        check_target(target)
        self._target = target

    def read_bytes_per_s(self, buffer_bytes: int) -> float:
        """Reading a buffer of huge pages from several places at once, the best of several passes."""
        return _native.measure_read_bytes_per_s(self._target, buffer_bytes, _READ_PASSES)

    def multiply_ops_per_s(self, weight_format: WeightFormat) -> tuple[str, float]:
        """What weights of a format are multiplied as, and its operations a second on numbers that never leave the L1
        cache, a multiply and an add counted as two."""
        name, kind = _MULTIPLIES_AS[weight_format]
        return name, _native.measure_ops_per_s(self._target, kind, _MULTIPLY_PASSES)
