"""Time against M for each shape, with the inflection points marked. Needs matplotlib, an optional dependency."""

from collections.abc import Mapping
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.errors import ConfigError

if TYPE_CHECKING:
    from headrace.kernels.tuning import LinearShape, TunedShape

_SUFFIXES = (".png", ".svg", ".pdf")
_COLUMNS = 3


def check_can_plot(file: Path) -> None:
    """
    Raises:
        ConfigError: an unknown kind of file, a folder that is not there, or no matplotlib.
    """
    if file.suffix not in _SUFFIXES:
        raise ConfigError(f"--plot is '{file}'; its name must end in {', '.join(_SUFFIXES)}")
    if not file.parent.is_dir():
        raise ConfigError(f"--plot is '{file}', but there is no folder '{file.parent}'")
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'headrace[plot]'")


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
