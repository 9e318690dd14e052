"""The requests of a run, ready to be sent: making one costs time that the run must not pay."""

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import numpy as np

from headrace.bench.serve.dataset import Sample
from headrace.bench.serve.http_client import HttpClient
from headrace.bench.serve.lengths import RequestMix
from headrace.bench.serve.prompts import CountTokens, Prompt, TextPrompts, TokenIdPrompts


class Route(Enum):
    COMPLETIONS = "completions"
    CHAT = "chat"

    @property
    def path(self) -> str:
        return "/v1/completions" if self is Route.COMPLETIONS else "/v1/chat/completions"


@dataclass(frozen=True)
class ReadyRequest:
    """prompt_tokens: what was asked for, None where a file has the prompt and nobody has counted."""

    payload: bytes
    prompt_tokens: int | None
    output_tokens: int


@dataclass(frozen=True, kw_only=True)
class RequestWriter:
    """Turns prompts into requests. extra_body: fields that are added, or left out where they are null."""

    client: HttpClient
    route: Route
    model: str
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def write(
        self,
        prompt: Prompt | None,
        output_tokens: int,
        *,
        prompt_tokens: int | None = None,
        messages: list[dict[str, Any]] | None = None,
    ) -> ReadyRequest:
        body: dict[str, Any] = {"model": self.model}
        if self.route is Route.CHAT:
            body["messages"] = messages or [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        body |= {"max_tokens": output_tokens, "temperature": 0.0}
        body |= {"stream": True, "stream_options": {"include_usage": True}, **self.extra_body}
        encoded = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
        return ReadyRequest(self.client.post(self.route.path, encoded), prompt_tokens, output_tokens)


@dataclass(frozen=True, kw_only=True)
class SyntheticRequests:
    """Endless requests of a mix, the same for the same seed."""

    writer: RequestWriter
    mix: RequestMix
    prompts: TokenIdPrompts | TextPrompts
    count: CountTokens | None = None

    def without_counting(self) -> "SyntheticRequests":
        """The same without questions to the server: lengths of prompts of words are estimates then."""
        return replace(self, count=None)

    async def generate(self, rng: np.random.Generator) -> AsyncIterator[ReadyRequest]:
        while True:
            prompt_tokens, output_tokens = self.mix.sample(rng)
            prompt: Prompt
            if isinstance(self.prompts, TokenIdPrompts):
                prompt = self.prompts.next(prompt_tokens, rng)
            else:
                prompt = await self.prompts.next(prompt_tokens, rng, self.count)
            yield self.writer.write(prompt, output_tokens, prompt_tokens=prompt_tokens)


@dataclass(frozen=True, kw_only=True)
class FileRequests:
    """A file's prompts in a random order, and again from the start when they have run out."""

    writer: RequestWriter
    samples: list[Sample]
    mix: RequestMix
    """Gives output lengths where the file has none."""

    async def generate(self, rng: np.random.Generator) -> AsyncIterator[ReadyRequest]:
        while True:
            for i in rng.permutation(len(self.samples)).tolist():
                sample = self.samples[i]
                output_tokens = sample.output_tokens or self.mix.sample(rng)[1]
                num_ids = len(sample.prompt) if isinstance(sample.prompt, list) else None
                yield self.writer.write(sample.prompt, output_tokens, prompt_tokens=num_ids, messages=sample.messages)


Requests = SyntheticRequests | FileRequests
