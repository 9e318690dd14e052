"""One request as the event loop sees it: its updates as they come, merged for a reader who is slow."""

import asyncio
from collections.abc import Callable, Iterable

from headrace.engine.outputs import CompletionChunk, RequestOutput, RequestUpdate
from headrace.errors import HeadraceError


class RequestStream:
    """Updates of one request, to be read on the event loop by one reader.

        async for update in stream: ...

    Ends after the update that has `finished`. What comes while the reader is busy is merged into one update, so that a
    slow reader costs no more memory than its answer is long, and nobody else anything.

    abort: called once if the reader leaves before the end.

    Raises (from reading):
        HeadraceError: the request was ended by the server; says why.
    """

    def __init__(self, request_id: str, num_prompt_tokens: int, num_outputs: int, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self.num_prompt_tokens, self.num_outputs = num_prompt_tokens, num_outputs
        self.has_started = False
        """It has an output token."""
        self.output: RequestOutput | None = None
        self.timer: asyncio.TimerHandle | None = None
        """Ends it when it takes too long."""
        self._abort = abort
        self._pending: list[RequestUpdate] = []
        self._error: HeadraceError | None = None
        self._is_ended = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_ended(self) -> bool:
        """Nothing more will come."""
        return self._is_ended

    def push(self, update: RequestUpdate) -> None:
        if self._is_ended:
            return
        self._pending.append(update)
        if update.finished is not None:
            self.output, self._is_ended = update.finished, True
        self._wake()

    def fail(self, error: HeadraceError) -> None:
        """End the stream with an error, after what has come before it."""
        if not self._is_ended:
            self._error, self._is_ended = error, True
            self._wake()

    def abort(self, error: HeadraceError | None = None) -> None:
        """End the request, because nobody reads it any more or for the reason given; nothing if it has ended."""
        if not self._is_ended:
            self._error, self._is_ended = error, True
            self._abort(self.request_id)
            self._wake()

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> RequestUpdate:
        while not self._pending:
            if self._error is not None:
                raise self._error
            if self._is_ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        pending, self._pending = self._pending, []
        return pending[0] if len(pending) == 1 else _merge(pending)

    async def finish(self) -> RequestOutput:
        """Wait for the end, whatever comes before it."""
        async for update in self:
            if update.finished is not None:
                return update.finished
        raise asyncio.CancelledError("the request was aborted")

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _merge(updates: list[RequestUpdate]) -> RequestUpdate:
    chunks = merge_chunks(chunk for update in updates for chunk in update.chunks)
    return RequestUpdate(updates[-1].request_id, tuple(chunks), updates[-1].finished)


def merge_chunks(chunks: Iterable[CompletionChunk]) -> list[CompletionChunk]:
    """One chunk for each output, in the order in which outputs first spoke."""
    by_index: dict[int, list[CompletionChunk]] = {}
    for chunk in chunks:
        by_index.setdefault(chunk.index, []).append(chunk)
    return [_join(group) for group in by_index.values()]


def _join(chunks: list[CompletionChunk]) -> CompletionChunk:
    if len(chunks) == 1:
        return chunks[0]
    logprobs = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
    return CompletionChunk(
        index=chunks[0].index,
        text="".join([chunk.text for chunk in chunks]),
        token_ids=tuple([token_id for chunk in chunks for token_id in chunk.token_ids]),
        logprobs=tuple([entry for part in logprobs for entry in part]) if logprobs else None,
        finish_reason=chunks[-1].finish_reason,
        stop_reason=chunks[-1].stop_reason,
    )
