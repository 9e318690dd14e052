"""Time against M for each shape, with the inflection points marked. Needs matplotlib, an optional dependency."""

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace.kernels.tuning import LinearShape, TunedShape

_COLUMNS = 3


def plot(tuned: "Mapping[LinearShape, TunedShape]", file: Path) -> None:
    """One panel a shape, both axes logarithmic."""
    from matplotlib.figure import Figure

    num_rows = max(1, ceil(len(tuned) / _COLUMNS))
    figure = Figure(figsize=(4.2 * _COLUMNS, 3.4 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, _COLUMNS, squeeze=False).flatten()
    for panel in panels[len(tuned) :]:
        panel.set_axis_off()
    for panel, (shape, result) in zip(panels, tuned.items(), strict=False):
        for arm, seconds in result.times.items():
            panel.plot(list(seconds), [s * 1e3 for s in seconds.values()], marker=".", label=arm.value)
        points = result.inflections
        for name, place in (("M1", points.flat_gemm_from), ("M2", points.gemm_from)):
            panel.axvline(place, linestyle=":", color="gray")
            panel.annotate(
                f"{name} = {place}", (place, 0.98), xycoords=("data", "axes fraction"), rotation=90, va="top"
            )
        panel.set(title=str(shape), xscale="log", yscale="log", xlabel="M, rows", ylabel="ms")
        panel.legend()
    figure.savefig(file)
