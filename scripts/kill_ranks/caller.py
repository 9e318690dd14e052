"""The program that has an engine with several ranks: `python -m scripts.kill_ranks.caller SETTINGS`, for `trial`.

Says where it is on standard output, a JSON object a line. Where the trial wants an idle engine, it waits for a line on
standard input once it has loaded.
"""

import gc
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from headrace import LLM, SamplingParams
from headrace.config.launched import launched_from
from headrace.errors import HeadraceError

_PREFILL = SamplingParams(temperature=0, max_tokens=1)
_DECODE = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


def main() -> None:
    asked = json.loads(sys.argv[1])
    if (launched := launched_from()) is not None and launched.rank > 0:
        # Comes back with an error alone, which rank 0 or the launcher tells.
        with suppress(HeadraceError):
            LLM(**asked["settings"])
        sys.exit(1)
    descriptors = _descriptors()
    _say("loading")
    _use(asked["settings"], asked["moment"])
    gc.collect()
    _say("left", children=len(psutil.Process().children()), descriptors=sorted(_descriptors() - descriptors))
    if asked["loads_again"]:
        with LLM(**asked["settings"]) as llm:
            _generate(llm, "decode")
        _say("loaded again")


def _use(settings: dict[str, Any], moment: str) -> None:
    """Load, and generate until that fails; then try once more."""
    try:
        llm = LLM(**settings)
    except HeadraceError as error:
        _say_error("error", error)
        return
    _say("loaded")
    try:
        if moment == "idle":
            sys.stdin.readline()
        else:
            _generate(llm, moment)
            _say("busy")
        while True:
            _generate(llm, moment)
    except HeadraceError as error:
        _say_error("error", error)
    try:
        _generate(llm, moment)
    except HeadraceError as error:
        _say_error("later", error)
    llm.close()


def _generate(llm: LLM, moment: str) -> None:
    num_tokens, params = (200, _PREFILL) if moment == "prefill" else (3, _DECODE)
    llm.generate([{"prompt_token_ids": [i + j for j in range(num_tokens)]} for i in (1, 2, 3)], params)


def _descriptors() -> set[str]:
    """What this process has open that others could see: memory to share, sockets, files; eventpolls and pipes too."""
    folder = Path("/proc/self/fd")
    return {_read_link(entry) for entry in folder.iterdir()} - {""}


def _read_link(entry: Path) -> str:
    try:
        return f"{entry.name}: {os.readlink(entry)}"  # noqa: PTH115
    except OSError:
        return ""


def _say_error(event: str, error: HeadraceError) -> None:
    _say(event, kind=type(error).__name__, message=str(error))


def _say(event: str, **facts: Any) -> None:
    print(json.dumps({"event": event, **facts}), flush=True)


if __name__ == "__main__":
    main()
