"""What a server tells of itself: its models, and its tokenizer if it lets one use it."""

import json
from typing import Any

from headrace.bench.serve.chunks import Malformed, error_message, parse_object
from headrace.bench.serve.http_client import ConnectFailed, EndAwaited, HttpClient
from headrace.bench.serve.prompts import CountTokens
from headrace.errors import EndpointError

_MAX_BODY_BYTES = 64 << 20


class WholeAnswer(EndAwaited):
    """An answer of which nothing is looked at before it is all there."""

    def start_over(self) -> None:
        super().start_over()
        self.status = 0
        self.body = bytearray()

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:  # noqa: ARG002
        self.status = status

    def on_body(self, piece: bytes, now_s: float) -> None:  # noqa: ARG002
        if len(self.body) < _MAX_BODY_BYTES:
            self.body += piece


class Endpoint:
    def __init__(self, client: HttpClient) -> None:
        self._client = client

    async def first_model(self) -> str:
        """
        Raises:
            EndpointError: the server is not there, or has no list of models.
        """
        answer = await self._ask(self._client.get("/v1/models"))
        url = f"{self._client.address}/v1/models"
        if answer.status != 200:
            reason = error_message(bytes(answer.body))
            raise EndpointError(f"{url} answers {answer.status}: {reason}; name the model with --model")
        try:
            models = parse_object(bytes(answer.body)).get("data")
        except Malformed as error:
            raise EndpointError(f"{url}: {error}; is this an OpenAI endpoint?") from None
        first = models[0] if isinstance(models, list) and models else None
        if not isinstance(first, dict) or not isinstance(first.get("id"), str):
            raise EndpointError(f"{url} lists no model; name one with --model")
        return str(first["id"])

    async def find_tokenizer(self, model: str) -> CountTokens | None:
        """What counts a text's tokens: /tokenize as vLLM and Headrace have it, or llama.cpp; None without."""
        for make in (_as_prompt, _as_content):
            if await self._count(make("one two", model)):
                return lambda text, make=make: self._count_surely(make(text, model))  # type: ignore[misc]
        return None

    async def _count(self, body: dict[str, Any]) -> int | None:
        request = self._client.post("/tokenize", json.dumps(body).encode())
        answer = await self._ask(request)
        if answer.status != 200:
            return None
        try:
            tokens = parse_object(bytes(answer.body)).get("tokens")
        except Malformed:
            return None
        return len(tokens) if isinstance(tokens, list) else None

    async def _count_surely(self, body: dict[str, Any]) -> int:
        count = await self._count(body)
        if count is None:
            raise EndpointError(f"{self._client.address}/tokenize no longer answers as it did")
        return count

    async def _ask(self, request: bytes) -> WholeAnswer:
        answer = WholeAnswer()
        try:
            await self._client.exchange(request, answer)
        except ConnectFailed as error:
            raise EndpointError(f"cannot reach {self._client.address}: {error}") from None
        if answer.failure is not None:
            raise EndpointError(f"{self._client.address} does not answer as HTTP does: {answer.failure.reason}")
        return answer


def _as_prompt(text: str, model: str) -> dict[str, Any]:
    return {"model": model, "prompt": text}


def _as_content(text: str, model: str) -> dict[str, Any]:  # noqa: ARG001
    return {"content": text, "add_special": True}
