"""CTranslate2: MODEL is a folder that ct2-transformers-converter wrote.

`python -m bench.peers.ctranslate2 folder --threads 2`

It offers whole generations only: decoding is the time of a long one less that of a prompt and its first token.
"""

import json
import time
from pathlib import Path

import ctranslate2

from bench.peers import protocol


class CTranslate2:
    engine = "CTranslate2"
    version = f"ctranslate2 {ctranslate2.__version__}"

    def __init__(self, request: protocol.Request) -> None:
        self._generator = ctranslate2.Generator(
            request.model, device="cpu", compute_type="int8", inter_threads=1, intra_threads=request.num_threads
        )
        self._vocabulary = json.loads((Path(request.model) / "vocabulary.json").read_text(encoding="utf-8"))
        self.vocab_size = len(self._vocabulary)
        self._best_first_s: dict[tuple[int, int], float] = {}

    def sequence(self, prompt: list[int], num_steps: int) -> tuple[float, float]:
        return self._run([prompt], num_steps)

    def batch(self, prompts: list[list[int]], num_steps: int) -> float:
        return self._run(prompts, num_steps)[1]

    def _run(self, prompts: list[list[int]], num_steps: int) -> tuple[float, float]:
        tokens = [[self._vocabulary[token_id] for token_id in prompt] for prompt in prompts]
        first_s = self._generate_s(tokens, 1)
        shape = (len(prompts), len(prompts[0]))
        # The best one so far: less a slow one, decoding would look faster than it is.
        best_s = self._best_first_s[shape] = min(first_s, self._best_first_s.get(shape, first_s))
        return first_s, self._generate_s(tokens, num_steps + 1) - best_s

    def _generate_s(self, tokens: list[list[str]], length: int) -> float:
        start = time.perf_counter()
        self._generator.generate_batch(
            tokens, min_length=length, max_length=length, sampling_topk=1, include_prompt_in_result=False
        )
        return time.perf_counter() - start


if __name__ == "__main__":
    protocol.run(CTranslate2)
