"""A rank that runs what rank 0 says."""

import json
import time
from typing import Any

from headrace.engine.wire import Kind, decode_plan, encode_answer
from headrace.engine.worker import Worker
from headrace.machine import host_id
from headrace.parallel.world import World


def follow(world: World, worker: Worker) -> None:
    """Run plans and answer questions, in the order in which they come, until rank 0 ends it.

    Raises:
        RankError: another rank was lost.
    """
    while True:
        message = world.receive(0)
        kind = Kind(message[:1])
        if kind is Kind.END:
            worker.check_exchanges()
            # NCCL lets nobody leave who has recordings of its exchanges.
            worker.decode_step.forget()
            return
        if kind is Kind.PLAN:
            plan = decode_plan(message[1:])
            answer = worker.try_to_execute(plan)
            # A GPU goes on where an exchange was cut short, with whatever its memory holds.
            world.check()
            if not worker.knows_of_all(plan):
                world.send(0, encode_answer(answer, reports=world.place.reports))
        else:
            world.send(0, json.dumps(_answer(kind, world, worker)).encode())


def _answer(question: Kind, world: World, worker: Worker) -> Any:
    match question:
        case Kind.LEDGER:
            return [row.to_data() for row in worker.ledger_rows()]
        case Kind.DIFFERENCES:
            return worker.exchange_differences()
        case Kind.STATISTICS:
            return worker.statistics().to_data()
        case Kind.START_TRACE:
            return worker.start_trace()
        case Kind.TAKE_TRACE:
            return worker.take_trace(str(world.place)).to_data()
        case Kind.CLOCK:
            return [host_id(), time.monotonic_ns()]
