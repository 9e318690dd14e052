"""An OpenAI endpoint that says what a test tells it to, byte for byte, and remembers what it was asked."""

import asyncio
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

CLOSE = b"<close>"
"""In place of bytes: hang up."""
HANG = b"<hang>"
"""In place of bytes: say nothing more, and keep the line open."""


@dataclass
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    body: Any
    connection: int


Answer = list[bytes]
Script = Callable[[Asked], Answer]


def chunked(pieces: list[bytes], *, status: str = "200 OK", kind: str = "text/event-stream") -> Answer:
    """A whole HTTP answer, a chunk for each piece."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return [head, *(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in pieces), b"0\r\n\r\n"]


def json_answer(value: Any, status: str = "200 OK") -> Answer:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return [head.encode() + body]


def event(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def token_events(asked: Asked) -> list[bytes]:
    """What a sound server answers to a completion: a chunk for each token, then a count of them, then the end."""
    body = asked.body
    is_chat = "messages" in body
    number = body["max_tokens"]
    pieces = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}] if is_chat else []
    for i in range(number):
        part = {"delta": {"content": f"w{i} "}} if is_chat else {"text": f"w{i} "}
        pieces.append({"choices": [{"index": 0, "finish_reason": None, **part}]})
    last = {"delta": {}} if is_chat else {"text": ""}
    pieces.append({"choices": [{"index": 0, "finish_reason": "length", **last}]})
    usage = {"prompt_tokens": prompt_tokens(body), "completion_tokens": number}
    return [*map(event, pieces), event({"choices": [], "usage": usage}), event(b"[DONE]")]


def prompt_tokens(body: dict[str, Any]) -> int:
    prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    return len(prompt) if isinstance(prompt, list) else len(prompt.split())


def sound(asked: Asked) -> Answer:
    if asked.path.endswith("/v1/models"):
        return json_answer({"object": "list", "data": [{"id": "scripted", "object": "model"}]})
    if asked.path.endswith("completions"):
        return chunked(token_events(asked))
    return json_answer({"error": {"message": "no such path"}}, "404 Not Found")


@dataclass
class ScriptedServer:
    """script: what is answered to each request from now on."""

    script: Script = sound
    asked: list[Asked] = field(default_factory=list)
    port: int = 0
    num_connections: int = 0
    scheme: str = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def completions(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.path.endswith("completions")]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        number = self.num_connections
        try:
            while (asked := await self._read(reader, number)) is not None:
                self.asked.append(asked)
                for piece in self.script(asked):
                    if piece == CLOSE:
                        return
                    if piece == HANG:
                        await reader.read()  # until the client hangs up
                        return
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, connection: int) -> Asked | None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.IncompleteReadError:
            return None
        line, *rest = head.strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (text.partition(":") for text in rest)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        method, path, _ = line.split(" ")
        return Asked(method, path, headers, json.loads(body) if body else None, connection)


@contextmanager
def scripted_server(tls: ssl.SSLContext | None = None) -> Iterator[ScriptedServer]:
    """On a thread of its own, so that whole commands can be run against it."""
    server = ScriptedServer(scheme="http" if tls is None else "https")
    loop = asyncio.new_event_loop()
    listening = threading.Event()
    ended = asyncio.Event()

    async def main() -> None:
        tasks: set[asyncio.Task[None]] = set()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            await server._serve(reader, writer)

        listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
        server.port = listener.sockets[0].getsockname()[1]
        listening.set()
        await ended.wait()
        listener.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    assert listening.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(10)
        loop.close()
