"""What a command is on every rank but 0: that rank of its model."""

import argparse
from typing import NoReturn

from headrace.cli.model_options import engine_config
from headrace.errors import ParallelismError


def run(args: argparse.Namespace) -> int:
    # `headrace volume` loads no model unless it measures: then rank 0 alone has something to do.
    if getattr(args, "measure", True):
        _serve(args)
    return 0


def _serve(args: argparse.Namespace) -> NoReturn:
    config = engine_config(args, show_progress=False)
    if config.parallel.world_size == 1:
        raise ParallelismError("a launcher has started several ranks of a command that asks for one; add --tp or --pp")
    # From here on torch is needed.
    from headrace.engine.rank_process import serve_launched

    serve_launched(config)
