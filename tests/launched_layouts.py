"""One of several ranks that a launcher has started: many engines, one after the other.

A rank is started once and an engine's other ranks end with it, so that what follows an engine must be undone here: it
saves the seconds that four processes take to import torch.
"""

import json
import os
import sys
from pathlib import Path

from layout_cases import Subject, assert_crowd, closing

from headrace import LLM
from headrace.config import Transport
from headrace.parallel import launched_world


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    transport = Transport(asked["transport"])
    for number, case in enumerate(asked["cases"]):
        launched_world._has_joined.clear()
        if transport is Transport.GLOO:
            os.environ["MASTER_PORT"] = str(asked["ports"][number])
        subject = Subject.from_json(case["subject"])
        try:
            run(subject, case["layout"], transport)
        except SystemExit as end:
            # Another rank than 0, told that the engine is no more.
            if end.code:
                raise
        else:
            print(f"{case['name']} {case['layout']}", flush=True)


def run(subject: Subject, layout: str, transport: Transport) -> None:
    settings = subject.settings(layout)
    with closing(LLM(str(subject.folder), dtype="float32", **settings)) as llm:
        assert_crowd(llm, subject, settings, transport)
        assert llm.engine.model.executor.exchange_differences() == []


if __name__ == "__main__":
    main()
