"""A server of the page whose answers are scripted, for what a real engine cannot be made to say."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from headrace.server.page import page_routes

STATS: dict[str, Any] = {
    "model": "scripted",
    "version": "0.0",
    "uptime_s": 5000.0,
    "state": "ready",
    "num_running": 3,
    "num_waiting": 1,
    "max_num_seqs": 64,
    "max_model_len": 2048,
    "kv_blocks": {"total": 1000, "used": 250, "block_size": 16},
    "tokens": {"prompt": 1000, "generation": 2000},
    "prefix_cache": {"queried": 400, "hit": 100},
    "num_preemptions": 2,
    "ttft_s": {"last": 0.0421, "p50": 0.035, "p95": 1.25},
    "tpot_s": {"last": 0.0123, "p50": 0.012, "p95": 0.02},
    "time_s": {"compute": 100.0, "communication": 20.0, "waiting": 10.0},
    "communication": [],
    "softmax": {"schemes": {"synchronized": 22}, "recomputed_rows": 7},
    "dataflow": {
        "source": "measured",
        "shapes": [
            {
                "name": "q_proj + k_proj + v_proj",
                "n": 2560,
                "k": 2048,
                "format": "int4",
                "arms": [
                    {"from_rows": 1, "to_rows": 1, "arm": "gemv"},
                    {"from_rows": 2, "to_rows": 95, "arm": "flat_gemm"},
                    {"from_rows": 96, "to_rows": None, "arm": "gemm"},
                ],
            }
        ],
    },
    "layout": {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "transport": None,
        "device": "cpu",
        "num_threads": 2,
    },
}


@dataclass
class ScriptedServer:
    """What it says next, and what it was asked.

    hold: an answer waits, while this is true, before the rest of it; cut: it has no ending.
    left: a client left before its answer was complete.
    """

    url: str = ""
    stats: dict[str, Any] = field(default_factory=lambda: deepcopy(STATS))
    answer: list[str] = field(default_factory=lambda: ["Yes."])
    rest: list[str] = field(default_factory=list)
    finish_reason: str = "stop"
    hold: bool = False
    cut: bool = False
    api_key: str | None = None
    refusal: tuple[int, str] | None = None
    num_stats: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)

    def app(self) -> Starlette:
        routes = [
            *page_routes(),
            Route("/stats", self._stats),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        return Starlette(routes=routes)

    async def _stats(self, request: Request) -> Response:
        self.num_stats += 1
        return self._without_key(request) or JSONResponse(self.stats)

    async def _chat(self, request: Request) -> Response:
        self.requests.append(await request.json())
        if self.refusal is not None:
            return _error(*self.refusal)
        return self._without_key(request) or StreamingResponse(self._events(), media_type="text/event-stream")

    def _without_key(self, request: Request) -> Response | None:
        if self.api_key is None or request.headers.get("authorization") == f"Bearer {self.api_key}":
            return None
        return _error(401, "No API key was given, or a wrong one.")

    async def _events(self) -> AsyncIterator[str]:
        try:
            for piece in self.answer:
                yield _content(piece)
            while self.hold:
                await asyncio.sleep(0.02)
            for piece in self.rest:
                yield _content(piece)
        except asyncio.CancelledError:
            self.left.set()
            raise
        if self.cut:
            return
        yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": self.finish_reason}]})
        yield _event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": len(self.answer + self.rest)}})
        yield "data: [DONE]\n\n"


def _content(piece: str) -> str:
    return _event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _error(status: int, message: str) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status)


@contextmanager
def serving(scripted: ScriptedServer) -> Iterator[ScriptedServer]:
    """Runs it on a thread, on a port that the system chose."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        scripted.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(scripted.app(), log_level="warning", timeout_graceful_shutdown=1, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield scripted
        finally:
            server.should_exit = True
            thread.join()
