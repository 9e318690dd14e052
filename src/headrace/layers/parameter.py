"""A weight a layer needs: which slices of which checkpoint tensors it is made of, and, once loaded, its value."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from headrace.kernels import Weight


@dataclass(frozen=True, kw_only=True)
class TensorSlice:
    """The part of one named tensor that a rank keeps.

    shape is the whole tensor's; rows (and columns, for a matrix) are half-open ranges of it.
    """

    name: str
    shape: tuple[int, ...]
    rows: range
    columns: range | None = None


class Parameter:
    """Slices stacked along rows into one local weight (q, k and v projections into one matrix, say).

    A matrix becomes a `Weight` in the format chosen for it; a vector (bias, norm) becomes a plain tensor.
    is_quantizable: an integer format may be chosen; false for small or sensitive matrices (router, positions).
    """

    def __init__(self, slices: Sequence[TensorSlice], *, is_quantizable: bool = False) -> None:
        self.slices = tuple(slices)
        self.is_quantizable = is_quantizable
        self._value: Weight | Tensor | None = None

    @property
    def is_matrix(self) -> bool:
        return len(self.slices[0].shape) == 2

    @property
    def local_rows(self) -> int:
        return sum(len(part.rows) for part in self.slices)

    @property
    def local_columns(self) -> int:
        columns = self.slices[0].columns
        return len(columns) if columns is not None else 1

    @property
    def num_bytes(self) -> int:
        """Memory of the loaded value."""
        assert self._value is not None, f"{self.slices[0].name} is not loaded"
        return self._value.nbytes if isinstance(self._value, Tensor) else self._value.num_bytes

    def set_value(self, value: Weight | Tensor) -> None:
        self._value = value

    @property
    def weight(self) -> Weight:
        assert self._value is not None, f"{self.slices[0].name} is not loaded"
        assert not isinstance(self._value, Tensor), f"{self.slices[0].name} is a vector"
        return self._value

    @property
    def vector(self) -> Tensor:
        assert self._value is not None, f"{self.slices[0].name} is not loaded"
        assert isinstance(self._value, Tensor), f"{self.slices[0].name} is a matrix"
        return self._value


class ParameterRows(Parameter):
    """Rows of another parameter's matrix, in the same memory: loaded with it, and never by itself."""

    def __init__(self, whole: Parameter, rows: range, weight_rows: Callable[[Weight, range], Weight]) -> None:
        (part,) = whole.slices
        super().__init__([replace(part, rows=rows)], is_quantizable=whole.is_quantizable)
        self._whole = whole
        self._weight_rows = weight_rows

    @property
    def weight(self) -> Weight:
        if self._value is None:
            self._value = self._weight_rows(self._whole.weight, self.slices[0].rows)
        return super().weight


def whole_matrix(name: str, rows: int, columns: int) -> TensorSlice:
    return TensorSlice(name=name, shape=(rows, columns), rows=range(rows), columns=range(columns))


def vector_slice(name: str, size: int, rows: range | None = None) -> TensorSlice:
    return TensorSlice(name=name, shape=(size,), rows=range(size) if rows is None else rows)
