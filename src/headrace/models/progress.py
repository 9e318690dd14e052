"""Progress over bytes read, on a terminal's standard error."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from headrace.models.loading import Progress as ReportBytes


@contextmanager
def bytes_progress(title: str, total_bytes: int, show_progress: bool) -> Iterator[ReportBytes]:
    """A function that advances a bar by a number of bytes; the bar goes away when the work is done."""
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show_progress, transient=True) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield lambda num_bytes: bar.advance(task, num_bytes)
