"""`python -m headrace.engine.rank_process CONTROL LINE`: one rank, started by rank 0 with two inherited sockets."""

import os
import sys
import traceback
from pathlib import Path

from headrace.errors import HeadraceError
from headrace.parallel.launch import Greeting, inherited_channels, receive_greeting
from headrace.parallel.local_world import join_local_world
from headrace.parallel.world import World


def main() -> None:
    control, line = inherited_channels(sys.argv[1:])
    greeting = receive_greeting(control)
    world = join_local_world(greeting, greeting.settings.parallel, control, line)
    code = run_rank(world, greeting)
    sys.stderr.flush()
    # Without the interpreter's own end, which would wait for whatever else still runs.
    os._exit(code)


def run_rank(world: World, greeting: Greeting) -> int:
    """Load, follow rank 0, end; the exit code."""
    from headrace.engine.load_rank import load_rank
    from headrace.engine.ranks import follow

    config = greeting.settings
    try:
        follow(world, load_rank(config, Path(config.load.model), world))
    except BaseException as error:
        # What went wrong is rank 0's to say; where, if nobody foresaw it, is said here.
        if not isinstance(error, HeadraceError | KeyboardInterrupt):
            traceback.print_exc()
        world.fail(error)
        return 1
    world.close()
    return 0


if __name__ == "__main__":
    main()
