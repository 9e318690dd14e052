"""The Python entry point: text in, text out."""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Self

from headrace.config import PoolingParams, SamplingParams
from headrace.config.settings import engine_config
from headrace.engine.completion_stream import CompletionStream
from headrace.engine.engine import Engine
from headrace.engine.load import load_model
from headrace.engine.outputs import RequestOutput, RequestUpdate
from headrace.errors import RequestError

Prompt = str | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A loaded model that answers prompts.

        llm = LLM(model="path/or/hub-id", quantize="int8")
        for output in llm.generate(["Hello"], SamplingParams(temperature=0, max_tokens=32)):
            print(output.outputs[0].text)

    model: a folder, a hub id, or "demo", the one inside the package. dtype: "auto", "float32" or "bfloat16".
    quantize: None, "int8" or "int4".
    device: "auto" (a GPU if there is one), "cpu", "cuda", or "cuda:1" for one GPU of several.
    settings: any field of `CacheConfig`, `SchedulerConfig` or `ParallelConfig`, `num_threads`, `dataflow` ("measured",
        "default"), `softmax` ("auto", "measured", "synchronized", "asynchronized", "lazy"), `batch_invariant`,
        `graphs` and `graph_budget_s` of `EngineConfig`.

    One thread at a time: its requests share one engine, which is driven by whoever waits for one of them.

    Raises:
        CheckpointError: the model cannot be loaded.
        ConfigError: a setting that cannot be used.
        BackendUnavailable: a device that is not there.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        quantize: str | None = None,
        device: str = "auto",
        show_progress: bool = False,
        require_tokenizer: bool = False,
        **settings: Any,
    ) -> None:
        config = engine_config(
            model=str(model),
            revision=revision,
            dtype=dtype,
            quantize=quantize or "none",
            device=device,
            show_progress=show_progress,
            require_tokenizer=require_tokenizer,
            **settings,
        )
        self.engine = Engine(load_model(config))
        self._request_ids = count()
        self._dropped: deque[str] = deque()
        self._listeners: dict[str, Callable[[], Callable[[RequestUpdate], None] | None]] = {}

    def close(self) -> None:
        """Give the model's memory back, and end the other ranks, if there are any; all of that ends with this object,
        too.
        """
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt; all run together, results come in the order given.

        prompts: strings, or {"prompt_token_ids": [...]}; one or several.
        sampling_params: one for all, or one for each.

        Raises:
            RequestError: a prompt or its parameters cannot run; then none of them does.
        """
        pairs = self._pairs(_as_list(prompts), sampling_params)
        return self._run([(*self._encode(prompt), p) for prompt, p in pairs])

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several: messages of {"role": ..., "content": ...} through the chat template."""
        many: list[Any] = [messages] if not messages or isinstance(messages[0], Mapping) else list(messages)
        pairs = self._pairs([self.chat_prompt(m, tools=tools) for m in many], sampling_params)
        return self._run([(*self._encode(text, add_special_tokens=False), p) for text, p in pairs])

    def embed(
        self, prompts: Prompt | Sequence[Prompt], pooling_params: PoolingParams | None = None
    ) -> list[RequestOutput]:
        """One vector of each prompt, in `RequestOutput.embedding`, from the model's last hidden states.

        Raises:
            RequestError: a prompt cannot run; then none of them does.
        """
        params = pooling_params or PoolingParams()
        if not isinstance(params, PoolingParams):
            raise RequestError(f"pooling_params are {params!r:.80}; give PoolingParams(...)")
        return self._run([(*self._encode(prompt), params) for prompt in _as_list(prompts)])

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> CompletionStream:
        """Complete one prompt, piece by piece."""
        return self._stream(*self._encode(prompt), sampling_params)

    def stream_chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> CompletionStream:
        """Answer one conversation, piece by piece."""
        text = self.chat_prompt(messages, tools=tools)
        return self._stream(*self._encode(text, add_special_tokens=False), sampling_params)

    def chat_prompt(self, messages: Messages, *, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The text a conversation becomes.

        Raises:
            RequestError: no chat template, or messages it refuses.
        """
        template = self.engine.model.chat_template
        if template is None:
            raise self._no_tokenizer()
        return template.render(messages, tools=tools)

    @property
    def has_chat_template(self) -> bool:
        template = self.engine.model.chat_template
        return template is not None and template.is_available

    def default_sampling_params(self, **changes: Any) -> SamplingParams:
        """What the model's generation_config.json recommends, with `changes` on top; greedy if it does not sample."""
        config = self.engine.model.generation_config
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        recommended = {name: config[name] for name in names if config.get(name) is not None}
        if not config.get("do_sample", False):
            recommended = {"temperature": 0.0} | {k: v for k, v in recommended.items() if k == "repetition_penalty"}
        return SamplingParams.from_mapping(recommended | changes)

    def _pairs(
        self, prompts: list[Any], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[tuple[Any, SamplingParams]]:
        if params is None or isinstance(params, SamplingParams):
            return [(prompt, params or SamplingParams()) for prompt in prompts]
        if not isinstance(params, Sequence) or not all(isinstance(p, SamplingParams) for p in params):
            raise RequestError(f"sampling_params are {params!r:.80}; give SamplingParams(...), or one for each prompt")
        if len(params) != len(prompts):
            raise RequestError(f"{len(params)} sampling params for {len(prompts)} prompts; give one, or one for each")
        return list(zip(prompts, params, strict=True))

    def _encode(self, prompt: Prompt, *, add_special_tokens: bool = True) -> tuple[Any, str | None]:
        if isinstance(prompt, str):
            if self.engine.model.tokenizer is None:
                raise self._no_tokenizer()
            return self.engine.model.tokenizer.encode(prompt, add_special_tokens=add_special_tokens), prompt
        token_ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
        if token_ids is None:
            raise RequestError(f"a prompt is {prompt!r:.80}; give a string or {{'prompt_token_ids': [...]}}")
        return token_ids, None

    def _no_tokenizer(self) -> RequestError:
        return RequestError(f"{self.engine.model.tokenizer_error}; without a tokenizer, give prompt_token_ids")

    def _run(self, requests: list[tuple[Any, str | None, SamplingParams | PoolingParams]]) -> list[RequestOutput]:
        ids = [self._next_id() for _ in requests]
        outputs: dict[str, RequestOutput] = {}

        def listen(update: RequestUpdate) -> None:
            if update.finished is not None:
                outputs[update.request_id] = update.finished

        try:
            for request_id, (token_ids, prompt, params) in zip(ids, requests, strict=True):
                if isinstance(params, PoolingParams):
                    self.engine.add_pooling_request(request_id, token_ids, params, prompt)
                else:
                    self.engine.add_request(request_id, token_ids, params, prompt)
                self._listeners[request_id] = lambda: listen
            while len(outputs) < len(ids):
                self._step()
        finally:
            # Refused, interrupted or failed half way: leave nothing running.
            for request_id in ids:
                self._stop(request_id)
        return [outputs[request_id] for request_id in ids]

    def _stream(self, token_ids: Any, prompt: str | None, params: SamplingParams | None) -> CompletionStream:
        [(_, params)] = self._pairs([prompt], params)
        request_id = self._next_id()
        self.engine.add_request(request_id, token_ids, params, prompt)
        stream = CompletionStream(step=partial(self._step_for, request_id), stop=partial(self._stop, request_id))
        # Weakly held: a stream that its reader has dropped ends its request instead of running on unread. The garbage
        # collector may find it in the middle of a step, so the end waits for the next one.
        self._listeners[request_id] = weakref.WeakMethod(stream.listen)
        weakref.finalize(stream, self._dropped.append, request_id).atexit = False
        return stream

    def _step(self) -> None:
        """Run one step for everybody: streams and batches of one LLM share its engine."""
        while self._dropped:
            self._stop(self._dropped.popleft())
        for update in self.engine.step():
            listener = self._listeners.get(update.request_id)
            listen = listener() if listener is not None else None
            if listen is not None:
                listen(update)
            if update.finished is not None:
                self._listeners.pop(update.request_id, None)

    def _step_for(self, request_id: str) -> bool:
        """Run one step for a stream; false if its request is gone, aborted behind its back."""
        if not self.engine.is_live(request_id):
            return False
        self._step()
        return True

    def _stop(self, request_id: str) -> RequestUpdate | None:
        self._listeners.pop(request_id, None)
        return self.engine.abort(request_id)

    def _next_id(self) -> str:
        return f"request-{next(self._request_ids)}"


def _as_list(prompts: Any) -> list[Any]:
    return [prompts] if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable) else list(prompts)
