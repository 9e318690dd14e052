"""One line that says what is being measured; only where a person sees it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from headrace.cli.terminal import is_watched


@contextmanager
def progress_line(*, is_shown: bool) -> Iterator[Callable[[str], None]]:
    """A function that replaces the line's text; the line goes away when the work is done."""
    if not is_shown or not is_watched():
        yield _ignore
        return
    from rich.console import Console
    from rich.live import Live

    # Drawn when something begins and not in between: a spinner's thread would take time from what is measured.
    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:
        yield lambda text: live.update(text, refresh=True)


def _ignore(_: str) -> None:
    pass
