"""Fills a decoder's parameters from a checkpoint, row block by row block."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.config import ModelConfig, WeightFormat
from headrace.errors import CheckpointError, KernelError, ParallelismError
from headrace.kernels import QUANTIZATION_GROUP_SIZE, Kernels, quantized_columns
from headrace.layers.parameter import Parameter, TensorSlice
from headrace.machine import cpu_limits
from headrace.models.checkpoint import DEVICE_BLOCK_BYTES, HOST_BLOCK_BYTES, Checkpoint
from headrace.models.families import Family
from headrace.models.quantization import quantized_names
from headrace.models.upload import make_upload

Progress = Callable[[int], None]
"""Called with the number of checkpoint bytes read since the last call."""


_MAX_THREADS = 4
"""More read no faster than memory is written."""


@dataclass(frozen=True, kw_only=True)
class WeightFormats:
    """dense: the format of matrices that stay floating point, and the dtype of vectors; linear: of quantizable ones."""

    dense: WeightFormat
    linear: WeightFormat

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dense is WeightFormat.FLOAT32 else torch.bfloat16

    def of(self, parameter: Parameter) -> WeightFormat:
        return self.linear if parameter.is_quantizable else self.dense


class WeightLoader:
    """Loads parameters; knows where a family keeps each tensor and whether the checkpoint holds it quantized.

    stored_format: the checkpoint's integer format if it is quantized.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        family: Family,
        config: ModelConfig,
        kernels: Kernels,
        formats: WeightFormats,
        stored_format: WeightFormat | None,
        progress: Progress,
    ) -> None:
        self._checkpoint, self._family, self._config = checkpoint, family, config
        self._kernels, self._formats, self._progress = kernels, formats, progress
        self._stored_format = stored_format
        self._upload = make_upload(kernels.device)
        self._block_bytes = HOST_BLOCK_BYTES if kernels.device.type == "cpu" else DEVICE_BLOCK_BYTES

    def load(self, parameters: Sequence[Parameter], *, model: Sequence[Parameter]) -> None:
        """Check every tensor first, so that nothing is loaded from a checkpoint that does not fit.

        model: the parameters of all stages, to check; only `parameters` are read.

        Raises:
            CheckpointError: missing, unexpected or misshapen tensors, the first five of each; weights that hold NaN.
        """
        self._check_tensors(model)
        if self._kernels.device.type != "cpu":
            for parameter in parameters:
                self._load(parameter)
            return
        # Packing takes several times as long as reading, without the interpreter's lock.
        with ThreadPoolExecutor(_num_threads(), thread_name_prefix="headrace-load") as threads:
            for loaded in [threads.submit(self._load, parameter) for parameter in parameters]:
                try:
                    loaded.result()
                except BaseException:
                    threads.shutdown(cancel_futures=True)
                    raise

    def _load(self, parameter: Parameter) -> None:
        if parameter.is_matrix:
            self._load_matrix(parameter)
        else:
            self._load_vector(parameter)

    def _load_vector(self, parameter: Parameter) -> None:
        parts = []
        for part in parameter.slices:
            name, rows = self._locate(part)
            parts.append(self._checkpoint.read_rows(name, rows.start, rows.stop).to(self._formats.dtype, copy=True))
            self._progress(self._checkpoint.tensors[name].row_bytes * len(rows))
        parameter.set_value(torch.cat(parts).to(self._kernels.device))

    def _load_matrix(self, parameter: Parameter) -> None:
        weight_format = self._formats.of(parameter)
        builder = self._kernels.make_weight_builder(weight_format, parameter.local_rows, parameter.local_columns)
        row = 0
        for part in parameter.slices:
            if self._is_stored_quantized(parameter):
                self._copy_quantized(part, row, builder.write_quantized)
            else:
                self._copy_dense(part, row, builder.write)
            row += len(part.rows)
        parameter.set_value(builder.build())

    def _copy_dense(self, part: TensorSlice, row: int, write: Callable[[int, Tensor], None]) -> None:
        name, rows = self._locate(part)
        for start, block in self._checkpoint.row_blocks(name, rows, self._block_bytes):
            kept = _columns(block, part.columns)
            try:
                write(row + start - rows.start, self._upload(kept))
            except KernelError as error:
                raise CheckpointError(f"tensor '{name}': {error}") from None
            self._progress(kept.nbytes)

    def _copy_quantized(self, part: TensorSlice, row: int, write: Callable[[int, Tensor, Tensor], None]) -> None:
        name, rows = self._locate(part)
        columns = _quantized_columns(name, part, self._stored_format)
        qweight_name, scales_name = quantized_names(name)
        for start, qweight in self._checkpoint.row_blocks(qweight_name, rows, self._block_bytes):
            scales = self._checkpoint.read_rows(scales_name, start, start + len(qweight))
            kept = [self._upload(_columns(block, part)) for block, part in zip((qweight, scales), columns, strict=True)]
            write(row + start - rows.start, *kept)
            self._checkpoint.release(scales_name)
            self._progress(qweight.nbytes + scales.nbytes)

    def _locate(self, part: TensorSlice) -> tuple[str, range]:
        """The checkpoint's name for a tensor, and the rows of it that a slice keeps."""
        location = self._family.locate(part.name, self._config)
        return location.name, range(location.row_offset + part.rows.start, location.row_offset + part.rows.stop)

    def _is_stored_quantized(self, parameter: Parameter) -> bool:
        return self._stored_format is not None and parameter.is_quantizable

    def _check_tensors(self, parameters: Sequence[Parameter]) -> None:
        expected = self._expected_shapes(parameters)
        known = self._checkpoint.tensors
        ignored = [re.compile(pattern) for pattern in (*self._family.ignored, *_tied_head(self._config, self._family))]
        unexpected = [n for n in known if n not in expected and not any(p.fullmatch(n) for p in ignored)]
        wrong = [
            f"{name} {list(known[name].shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in known and known[name].shape != shape
        ]
        self._raise_if_any("lacks", [name for name in expected if name not in known])
        self._raise_if_any("has tensors this architecture does not use:", unexpected)
        self._raise_if_any("has tensors of the wrong shape:", wrong)

    def _expected_shapes(self, parameters: Sequence[Parameter]) -> dict[str, tuple[int, ...]]:
        """Shape of every checkpoint tensor the parameters come from; rows of fused tensors add up."""
        rows: dict[str, int] = defaultdict(int)
        columns: dict[str, tuple[int, ...]] = {}
        for parameter in parameters:
            for part in parameter.slices:
                name = self._family.locate(part.name, self._config).name
                for stored, width in self._stored_as(parameter, name, part.shape[1:]):
                    rows[stored] += part.shape[0]
                    columns[stored] = width
        return {name: (rows[name], *columns[name]) for name in rows}

    def _stored_as(self, parameter: Parameter, name: str, width: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        if not self._is_stored_quantized(parameter):
            return [(name, width)]
        assert self._stored_format is not None
        columns = quantized_columns(self._stored_format, width[0])
        return [(n, (c,)) for n, c in zip(quantized_names(name), columns, strict=True)]

    def _raise_if_any(self, problem: str, tensors: list[str]) -> None:
        if tensors:
            more = f" and {len(tensors) - 5} more" if len(tensors) > 5 else ""
            raise CheckpointError(
                f"{self._config.architecture} checkpoint {self._checkpoint.folder} {problem} "
                f"{', '.join(tensors[:5])}{more}"
            )


def _columns(block: Tensor, columns: range | None) -> Tensor:
    return block if columns is None else block[:, columns.start : columns.stop]


def _quantized_columns(
    name: str, part: TensorSlice, stored_format: WeightFormat | None
) -> tuple[range | None, range | None]:
    """The columns of `qweight` and `scales` that hold a slice, which must begin and end with groups."""
    assert part.columns is not None, "only matrices are stored quantized"
    assert stored_format is not None
    start, stop = part.columns.start, part.columns.stop
    if start % QUANTIZATION_GROUP_SIZE or (stop % QUANTIZATION_GROUP_SIZE and stop != part.shape[1]):
        raise ParallelismError(
            f"'{name}' is stored quantized, in groups of {QUANTIZATION_GROUP_SIZE} columns, and columns {start} to "
            f"{stop} cut a group; use fewer tensor-parallel ranks, or quantize the original on load instead"
        )
    firsts = quantized_columns(stored_format, start)
    ends = quantized_columns(stored_format, stop)
    return range(firsts[0], ends[0]), range(firsts[1], ends[1])


def _tied_head(config: ModelConfig, family: Family) -> tuple[str, ...]:
    """Some checkpoints store a tied head again; it equals the embedding and is not read."""
    return (re.escape(family.locate("lm_head.weight", config).name),) if config.tie_word_embeddings else ()


def _num_threads() -> int:
    return min(cpu_limits().num_threads, _MAX_THREADS)
