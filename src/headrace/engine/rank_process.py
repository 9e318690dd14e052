"""A rank other than 0, from its start to its end.

`python -m headrace.engine.rank_process CONTROL LINE` is how rank 0 starts one, with two inherited sockets.
"""

import os
import sys
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from headrace.config import EngineConfig
from headrace.errors import HeadraceError
from headrace.parallel.launch import Greeting, inherited_channels, receive_greeting
from headrace.parallel.local_world import join_fabric, join_local_world
from headrace.parallel.world import World


def main() -> None:
    control, line = inherited_channels(sys.argv[1:])
    greeting = receive_greeting(control)
    config: EngineConfig = greeting.settings
    world = join_local_world(greeting, config.parallel, control, line)
    _end(run_rank(world, config, greeting))


def serve_launched(config: EngineConfig) -> NoReturn:
    """Be the rank that a launcher has started this process as, and end the process with it.

    Raises:
        HeadraceError: this rank finds no other.
    """
    from headrace.engine.start import resolve_transport, start_world
    from headrace.models.model_folder import resolve_model_folder

    folder = resolve_model_folder(config.load.model, config.load.revision, show_progress=False)
    config = resolve_transport(replace(config, load=replace(config.load, model=str(folder), show_progress=False)))
    code = run_rank(start_world(config), config)
    if code == 0:
        # The launcher's library wants an orderly end.
        sys.exit(0)
    _end(code)


def _end(code: int) -> NoReturn:
    """End without the interpreter's own end, which would wait for whatever else still runs."""
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


def run_rank(world: World, config: EngineConfig, greeting: Greeting | None = None) -> int:
    """Load, follow rank 0, end; the exit code.

    greeting: of a rank that rank 0 has started, which has yet to join the others' fabric.
    """
    try:
        # Seconds of imports on a busy machine, during which rank 0 hears from this rank.
        from headrace.engine.agreement import report_and_join
        from headrace.engine.follower import follow
        from headrace.engine.load_rank import load_rank

        if greeting is not None:
            world.fabric = join_fabric(greeting, config.parallel)
        follow(world, report_and_join(world, load_rank(config, Path(config.load.model), world)))
    except BaseException as error:
        # What went wrong is rank 0's to say; where, if nobody foresaw it, is said here.
        world.fail(error)
        if not isinstance(error, HeadraceError | KeyboardInterrupt):
            # There may be no room for it where standard error is a file.
            with suppress(OSError):
                traceback.print_exc()
        return 1
    world.close()
    return 0


if __name__ == "__main__":
    main()
