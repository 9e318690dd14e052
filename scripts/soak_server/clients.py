"""Clients, well-behaved and not: each asks, reads or leaves, and asks again."""

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field

LEAVING_SHARE = 0.1
PATIENCE_S = 120.0
"""An answer that takes longer counts as one that never came."""


@dataclass
class Tally:
    """kinds: how requests ended. problems: what must not be."""

    kinds: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    num_events: int = 0


async def run_client(seed: int, port: int, until_s: float, tally: Tally, *, may_be_lost: bool) -> None:
    """may_be_lost: ranks are killed, and requests with them; they must be told."""
    rng = random.Random(seed)
    loop = asyncio.get_running_loop()
    while loop.time() < until_s:
        try:
            async with asyncio.timeout(PATIENCE_S):
                kind = await _ask_once(rng, port, tally, may_be_lost=may_be_lost)
        except TimeoutError:
            kind = "never answered"
            tally.problems.append(f"client {seed}: no answer within {PATIENCE_S:g} s")
        except OSError as error:
            kind = f"connection failed ({type(error).__name__})"
        tally.kinds[kind] += 1
        if kind in ("429", "503"):
            await asyncio.sleep(rng.uniform(0.2, 1.5))


async def _ask_once(rng: random.Random, port: int, tally: Tally, *, may_be_lost: bool) -> str:
    is_stream, leaves = rng.random() < 0.7, rng.random() < LEAVING_SHARE
    body = {
        "prompt": [rng.randrange(3, 400) for _ in range(rng.choice((3, 30, 300)))],
        "max_tokens": rng.choice((4, 40, 200)),
        "temperature": rng.choice((0.0, 1.0)),
        "ignore_eos": rng.random() < 0.5,
        "n": rng.choice((1, 1, 1, 2)),
        "stream": is_stream,
    }
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        )
        writer.write(head.encode() + b"\r\nConnection: close\r\n\r\n" + data)
        await writer.drain()
        if leaves and rng.random() < 0.5:
            await asyncio.sleep(rng.uniform(0, 0.5))
            return "left"
        status = int((await reader.readline()).split()[1])
        if leaves:
            await reader.read(rng.randrange(1, 2000))
            return "left"
        answer = await reader.read()
        return _judge(status, answer, is_stream=is_stream, tally=tally, may_be_lost=may_be_lost)
    finally:
        if leaves and rng.random() < 0.5:
            writer.transport.abort()
        writer.close()


def _judge(status: int, answer: bytes, *, is_stream: bool, tally: Tally, may_be_lost: bool) -> str:
    if status == 429:
        return "429"
    if may_be_lost and status == 503:
        return "503"
    if may_be_lost and b"the request was lost: rank 1" in answer and b"data: [DONE]" in answer:
        return "lost with a word"
    if status != 200:
        tally.problems.append(f"status {status}: {answer[-300:]!r}")
        return str(status)
    if is_stream:
        tally.num_events += answer.count(b"\ndata: ")
        if b"data: [DONE]" not in answer or b'"error"' in answer:
            tally.problems.append(f"a stream broke off: {answer[-300:]!r}")
            return "broken"
    elif b'"finish_reason"' not in answer:
        tally.problems.append(f"an answer broke off: {answer[-300:]!r}")
        return "broken"
    return "answered"
