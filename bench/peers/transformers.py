"""transformers in bfloat16, as torch runs it: MODEL is a checkpoint folder.

`python -m bench.peers.transformers folder --threads 2`
"""

import time

import torch
import transformers

from bench.peers import protocol


class Transformers:
    engine = "transformers"
    version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def __init__(self, request: protocol.Request) -> None:
        torch.set_num_threads(request.num_threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(request.model, dtype=torch.bfloat16).eval()
        self.vocab_size = self._model.config.vocab_size

    def sequence(self, prompt: list[int], num_steps: int) -> tuple[float, float]:
        return self._run([prompt], num_steps)

    def batch(self, prompts: list[list[int]], num_steps: int) -> float:
        return self._run(prompts, num_steps)[1]

    @torch.inference_mode()
    def _run(self, prompts: list[list[int]], num_steps: int) -> tuple[float, float]:
        ids = torch.tensor(prompts)
        start = time.perf_counter()
        out = self._model(ids, use_cache=True, logits_to_keep=1)
        middle = time.perf_counter()
        for _ in range(num_steps):
            next_ids = out.logits[:, -1:].argmax(-1)
            out = self._model(next_ids, past_key_values=out.past_key_values, use_cache=True)
        return middle - start, time.perf_counter() - middle


if __name__ == "__main__":
    protocol.run(Transformers)
