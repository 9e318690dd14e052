"""Measures the linear layers of a loaded model and puts the result to use."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from headrace.config import DataflowChoice
from headrace.kernels import Kernels, QuantizedWeight, Weight
from headrace.kernels.mixture_tuning import MIXTURE
from headrace.kernels.tuning import LINEAR, LinearArm, LinearShape, TunedShape
from headrace.kernels.tuning_cache import Section, TuningCache
from headrace.layers.parameter import Parameter

K = TypeVar("K")
V = TypeVar("V")

_MIN_WEIGHT_BYTES = 64 * 2**20
"""A smaller model answers before it could be measured, and hardly depends on it."""

_QUICK_ROUNDS = 3
FULL_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True, kw_only=True)
class LinearWeights:
    """The weights that a model multiplies with, by shape, and the dtype of what it multiplies.

    names: of the layers that have a shape, as the checkpoint calls them: "q_proj + k_proj + v_proj" are one matrix.
    """

    by_shape: Mapping[LinearShape, Sequence[Weight]]
    dtype: torch.dtype
    names: Mapping[LinearShape, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, weights: Iterable[Weight], dtype: torch.dtype) -> "LinearWeights":
        by_shape: dict[LinearShape, list[Weight]] = {}
        for weight in weights:
            if not isinstance(weight, QuantizedWeight):
                by_shape.setdefault(weight.linear_shape, []).append(weight)
        return cls(by_shape=by_shape, dtype=dtype)

    @classmethod
    def of_parameters(cls, parameters: Iterable[Parameter], dtype: torch.dtype) -> "LinearWeights":
        """With names."""
        parameters = list(parameters)
        found = cls.of((parameter.weight for parameter in parameters), dtype)
        names: dict[LinearShape, dict[str, None]] = {}
        for parameter in parameters:
            if not isinstance(parameter.weight, QuantizedWeight):
                names.setdefault(parameter.weight.linear_shape, {})[_name(parameter)] = None
        return replace(found, names={shape: tuple(of_shape) for shape, of_shape in names.items()})

    @property
    def num_bytes(self) -> int:
        return sum(weight.num_bytes for weights in self.by_shape.values() for weight in weights)


def _name(parameter: Parameter) -> str:
    """Of the projections that are one matrix: model.layers.3.mlp.down_proj.weight is a down_proj."""
    parts = [part.name.removesuffix(".weight").split(".")[-1] for part in parameter.slices]
    return " + ".join(dict.fromkeys(parts))


def look_up_dataflow(kernels: Kernels, choice: DataflowChoice, num_threads: int) -> TuningCache | None:
    """Put the user's choice to use, with what is known of this machine; the cache that further measurements go to, or
    None if there is nothing to measure."""
    dataflow = kernels.dataflow
    if dataflow is None or choice is DataflowChoice.DEFAULT:
        return None
    if choice is not DataflowChoice.MEASURED:
        dataflow.force(LinearArm(choice.value))
        return None
    assert kernels.tuning_key is not None, "kernels with a choice have a key for its measurements"
    cache = TuningCache(kernels.tuning_key(num_threads))
    dataflow.tuned.update(cache.load(LINEAR))
    dataflow.tuned_mixtures.update(cache.load(MIXTURE))
    return cache


def look_up(section: Section[K, V], kernels: Kernels, choice: DataflowChoice, num_threads: int) -> dict[K, V]:
    """What was kept for this machine; nothing if the user chose not to have it used."""
    if kernels.tuning_key is None or choice is not DataflowChoice.MEASURED:
        return {}
    return TuningCache(kernels.tuning_key(num_threads)).load(section)


def prepare_dataflow(
    kernels: Kernels,
    weights: LinearWeights,
    choice: DataflowChoice,
    num_threads: int,
    *,
    show_progress: bool,
    min_weight_bytes: int | None = None,
) -> None:
    """`look_up_dataflow`, and quickly measure what is not known.

    min_weight_bytes: a smaller model is not measured; None leaves out those too small to gain.
    """
    if min_weight_bytes is None:
        min_weight_bytes = _MIN_WEIGHT_BYTES
    cache, dataflow = look_up_dataflow(kernels, choice, num_threads), kernels.dataflow
    if cache is None or dataflow is None:
        return
    missing = [shape for shape in weights.by_shape if shape not in dataflow.tuned]
    if missing and weights.num_bytes >= min_weight_bytes:
        measured = until_interrupted(
            measure_shapes(
                kernels, weights, missing, rows=dataflow.quick_rows, rounds=_QUICK_ROUNDS, show_progress=show_progress
            )
        )
        dataflow.tuned.update(measured)
        cache.keep(LINEAR, measured)


def measure_shapes(
    kernels: Kernels,
    weights: LinearWeights,
    shapes: Iterable[LinearShape],
    *,
    rows: Iterable[int],
    rounds: int,
    show_progress: bool,
    compares_tiles: bool = False,
) -> Iterator[tuple[LinearShape, TunedShape]]:
    """Each shape as it is measured.

    compares_tiles: also of each implementation's tiles the best, where it has a choice; see `Dataflow.measure`.
    """
    assert kernels.dataflow is not None, "there is nothing to choose"
    shapes, rows = list(shapes), tuple(rows)
    title = "measuring linear layers, once for this machine (Ctrl-C skips)"
    with measuring_progress(title, len(shapes), show_progress) as on_start:
        for shape in shapes:
            on_start(str(shape))
            tuned = kernels.dataflow.measure(
                kernels.linear,
                weights.by_shape[shape],
                shape,
                dtype=weights.dtype,
                num_rows=rows,
                num_rounds=rounds,
                compares_tiles=compares_tiles,
            )
            yield shape, tuned


def until_interrupted(measured: Iterable[tuple[K, V]]) -> dict[K, V]:
    """What is measured until Ctrl-C, or the end."""
    found = {}
    with suppress(KeyboardInterrupt):
        for key, value in measured:
            found[key] = value
    return found


@contextmanager
def measuring_progress(title: str, total: int, show_progress: bool) -> Iterator[Callable[[str], None]]:
    """A bar; what it gives is told of each measurement as it begins."""
    columns = (TextColumn(title), BarColumn(), TextColumn("{task.fields[what]}"))
    with Progress(*columns, console=Console(stderr=True), disable=not show_progress, transient=True) as bar:
        task = bar.add_task("", total=total, what="")
        num_started = 0

        def on_start(what: str) -> None:
            nonlocal num_started
            bar.update(task, completed=num_started, what=what)
            num_started += 1

        yield on_start
