"""An argument parser whose complaints are Headrace errors that name the nearest valid option."""

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

from headrace.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Options are never abbreviated, so that one added later cannot change what a script means."""

    def __init__(self, *, prog: str, summary: str) -> None:
        super().__init__(
            prog=prog,
            usage=f"{prog} [OPTIONS]",
            description=f"{summary[0].upper()}{summary[1:]}.",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse(self, argv: Sequence[str]) -> argparse.Namespace | None:
        """The options of a command, or None if help was asked for and shown.

        Raises:
            ConfigError: an unknown option, or a value that cannot be used.
        """
        if _asks_for_help(argv):
            self.print_help()
            return None
        args, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            self.error(self._explain_unknown(unknown))
        return args

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def _explain_unknown(self, unknown: Sequence[str]) -> str:
        options = [text for text in unknown if text.startswith("-")]
        if not options:
            return f"unexpected argument '{unknown[0]}'"
        name = options[0].partition("=")[0]
        close = get_close_matches(name, self._option_string_actions, n=1)
        return f"unknown option '{name}'" + (f"; did you mean '{close[0]}'?" if close else "")


def _asks_for_help(argv: Sequence[str]) -> bool:
    options = argv[: argv.index("--")] if "--" in argv else argv
    return "-h" in options or "--help" in options
