"""llama.cpp, through its C interface as llama-cpp-python binds it: MODEL is a GGUF file.

`python -m bench.peers.llamacpp model.gguf --threads 2`
"""

import time
from collections.abc import Iterable

import llama_cpp
import numpy as np

from bench.peers import protocol

_MICRO_BATCH_TOKENS = 512

Token = tuple[int, int, int, bool]
"""Id, position, sequence, and whether its logits are wanted."""


class Context:
    """Sequences that decode together, and the batch they are given in."""

    def __init__(self, model: object, num_threads: int, num_seqs: int, max_tokens_per_seq: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = num_seqs
        params.n_ctx = num_seqs * max_tokens_per_seq
        params.n_batch = params.n_ubatch = _MICRO_BATCH_TOKENS
        params.n_threads = params.n_threads_batch = num_threads
        self._context = llama_cpp.llama_init_from_model(model, params)
        self._batch = llama_cpp.llama_batch_init(_MICRO_BATCH_TOKENS, 0, 1)

    def run(self, tokens: Iterable[Token]) -> None:
        batch, size = self._batch, 0
        for token_id, position, sequence, wants_logits in tokens:
            batch.token[size] = token_id
            batch.pos[size] = position
            batch.n_seq_id[size] = 1
            batch.seq_id[size][0] = sequence
            batch.logits[size] = wants_logits
            size += 1
        batch.n_tokens = size
        error = llama_cpp.llama_decode(self._context, batch)
        if error:
            raise RuntimeError(f"llama_decode returned {error}")
        # Reading a logit waits for all of them.
        np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, size - 1), (1,)).copy()

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)


class LlamaCpp:
    engine = "llama.cpp"
    version = f"llama-cpp-python {llama_cpp.__version__}"

    def __init__(self, request: protocol.Request) -> None:
        llama_cpp.llama_backend_init()
        self._num_threads = request.num_threads
        self._model = llama_cpp.llama_model_load_from_file(
            request.model.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {request.model}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def sequence(self, prompt: list[int], num_steps: int) -> tuple[float, float]:
        context = Context(self._model, self._num_threads, 1, len(prompt) + num_steps)
        last = len(prompt) - 1
        start = time.perf_counter()
        context.run((token_id, i, 0, i == last) for i, token_id in enumerate(prompt))
        middle = time.perf_counter()
        for step in range(num_steps):
            context.run([(prompt[step % len(prompt)], len(prompt) + step, 0, True)])
        end = time.perf_counter()
        context.close()
        return middle - start, end - middle

    def batch(self, prompts: list[list[int]], num_steps: int) -> float:
        context_len = len(prompts[0])
        context = Context(self._model, self._num_threads, len(prompts), context_len + num_steps)
        for position in range(context_len):
            context.run((prompt[position], position, s, True) for s, prompt in enumerate(prompts))
        start = time.perf_counter()
        for step in range(num_steps):
            tokens = [(p[step % context_len], context_len + step, s, True) for s, p in enumerate(prompts)]
            context.run(tokens)
        seconds = time.perf_counter() - start
        context.close()
        return seconds


if __name__ == "__main__":
    protocol.run(LlamaCpp)
