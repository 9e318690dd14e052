"""One request's output, piece by piece, for whoever drives the engine by reading it."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Self

from headrace.engine.outputs import CompletionChunk, RequestOutput, RequestUpdate


class CompletionStream:
    """Chunks of one request as they come; `output` is the whole result once the stream has ended.

        with llm.stream("Hello") as stream:
            for chunk in stream:
                print(chunk.text, end="", flush=True)

    Leaving early (`close`, or the end of the `with`) stops the request and keeps what it has so far in `output`.
    Streams of one LLM may be read in turn: a step that one of them asks for moves them all on.
    """

    def __init__(self, *, step: Callable[[], bool], stop: Callable[[], RequestUpdate | None]) -> None:
        self.output: RequestOutput | None = None
        self._step, self._stop = step, stop
        self._is_ended = False
        self._chunks: deque[CompletionChunk] = deque()

    def __iter__(self) -> Iterator[CompletionChunk]:
        while not self.is_finished:
            yield from self.advance()

    @property
    def is_finished(self) -> bool:
        """Every chunk has been handed out."""
        return self._is_ended and not self._chunks

    def advance(self) -> list[CompletionChunk]:
        """Chunks that wait, or those of one more step, which may be none: a long prompt takes many steps.

        For readers who must look up between steps, to stop for Ctrl-C say.
        """
        if not self._chunks and not self._is_ended:
            self._is_ended = not self._step()
        chunks = list(self._chunks)
        self._chunks.clear()
        return chunks

    def listen(self, update: RequestUpdate) -> None:
        self._chunks.extend(update.chunks)
        self.output = update.finished
        self._is_ended = update.finished is not None

    def close(self) -> None:
        """Stop the request, unless it has ended, and keep what it has so far."""
        if not self._is_ended:
            self._is_ended = True
            update = self._stop()
            self.output = update.finished if update else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
