"""What commands that draw have in common. They need matplotlib, an optional dependency."""

from importlib.util import find_spec
from pathlib import Path

from headrace.errors import ConfigError

_SUFFIXES = (".png", ".svg", ".pdf")


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
        raise ConfigError("--plot needs matplotlib: pip install matplotlib")
