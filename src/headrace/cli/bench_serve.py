"""`headrace bench serve`: load on an OpenAI endpoint, and what its answers took."""

import argparse
import json
import signal
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.cli.bench_serve_options import add_endpoint_options, add_load_options, add_workload_options
from headrace.cli.bench_serve_settings import serve_bench_from
from headrace.cli.progress_line import progress_line
from headrace.cli.terminal import note
from headrace.errors import ConfigError, EndpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from headrace.bench.serve.session import LevelResult, Session
    from headrace.bench.serve.settings import ServeBench

EXIT_INTERRUPTED = 130
_PROGRESS_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Times are taken where answers arrive. TTFT: from sending to the first chunk with output. TPOT: from there\n"
        "to the last chunk, by tokens - 1. ITL: between chunks. E2E: to the end of the answer. Tokens are those that\n"
        "the server counts. An open loop (--rate) sends whether answers come or not, and shows what strangers would\n"
        "meet; a closed loop (--concurrency) waits, and shows what a server can do. Requests that fail are counted by\n"
        "reason and are never sent again. Ctrl-C ends the load and shows the figures so far."
    )
    add_endpoint_options(parser)
    add_workload_options(parser)
    add_load_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw the sweep, as .png, .svg or .pdf")
    group.add_argument("--requests-out", type=Path, metavar="FILE", help="write each request's times as JSON lines")
    group.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    group.add_argument("--quiet", action="store_true", help="show no progress")


def run(args: argparse.Namespace) -> int:
    if args.plot is not None:
        from headrace.cli.plots import check_can_plot

        if args.sweep is None:
            raise ConfigError("--plot draws a sweep; give --sweep, or leave it out")
        check_can_plot(args.plot)
    if args.requests_out is not None and not args.requests_out.parent.is_dir():
        raise ConfigError(f"--requests-out is '{args.requests_out}', but there is no such folder")
    bench = serve_bench_from(args)
    from headrace.cli.bench_serve_report import levels_table, request_lines, table, to_json

    with progress_line(is_shown=not (args.json or args.quiet)) as show:
        session, results = _run(bench, show)
    if results[-1].run.was_stopped and not any(result.run.records for result in results):
        raise KeyboardInterrupt
    if args.requests_out is not None:
        args.requests_out.write_text("".join(f"{line}\n" for line in request_lines(results)), encoding="utf-8")
    if args.plot is not None:
        from headrace.cli.bench_serve_plot import plot

        plot(results, bench.goodput, args.plot)
    if args.json:
        print(json.dumps(to_json(session, results), allow_nan=False))
    else:
        print("\n".join(table(session, results[0]) if bench.sweep is None else levels_table(session, results)))
    if results[-1].run.was_stopped:
        note("interrupted: these are the figures so far")
        return EXIT_INTERRUPTED
    _check_any_completed(results)
    return 0


def _run(bench: "ServeBench", show: "Callable[[str], None]") -> "tuple[Session, list[LevelResult]]":
    import asyncio

    import uvloop

    from headrace.bench.serve.session import Session

    async def main() -> "tuple[Session, list[LevelResult]]":
        session = Session(bench, show)
        results: list[LevelResult] = []
        progress = asyncio.create_task(_show_progress(session, show))
        try:
            with _stop_on_interrupt(session):
                async with aclosing(session.results()) as levels:
                    async for result in levels:
                        results.append(result)
        finally:
            progress.cancel()
        return session, results

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(main())
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


@contextmanager
def _stop_on_interrupt(session: "Session") -> "Iterator[None]":
    """A first Ctrl-C ends a load under way and keeps its figures; a second one, or one before, ends it all."""
    import asyncio

    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def handle() -> None:
        if session.generator.is_loading and not session.generator.is_stopped:
            session.generator.stop()
        else:
            task.cancel()

    loop.add_signal_handler(signal.SIGINT, handle)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def _show_progress(session: "Session", show: "Callable[[str], None]") -> None:
    import asyncio

    from headrace.bench.serve.session import arrivals_text, progress_text

    while True:
        await asyncio.sleep(_PROGRESS_S)
        if session.generator.is_loading:
            show(f"{arrivals_text(session.arrivals)}, {progress_text(session.generator.run)}")


def _check_any_completed(results: "Sequence[LevelResult]") -> None:
    """
    Raises:
        EndpointError: every request failed.
    """
    if any(result.metrics.num_completed for result in results):
        return
    failures = results[0].metrics.failures
    status = f" {failures[0].status}" if failures and failures[0].status else ""
    why = f": {failures[0].kind.value}{status}: {failures[0].reason}" if failures else ""
    raise EndpointError(f"no request was completed{why}")
