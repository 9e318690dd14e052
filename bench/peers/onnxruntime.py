"""ONNX Runtime GenAI: MODEL is a folder that its model builder wrote.

`python -m bench.peers.onnxruntime folder --threads 2`
"""

import json
import time

import numpy as np
import onnxruntime_genai

from bench.peers import protocol


class OnnxRuntime:
    engine = "ONNX Runtime GenAI"
    version = f"onnxruntime-genai {onnxruntime_genai.__version__}"

    def __init__(self, request: protocol.Request) -> None:
        config = onnxruntime_genai.Config(request.model)
        threads = {"session_options": {"intra_op_num_threads": request.num_threads}}
        config.overlay(json.dumps({"model": {"decoder": threads}}))
        self._model = onnxruntime_genai.Model(config)
        with open(f"{request.model}/genai_config.json", encoding="utf-8") as file:  # noqa: PTH123
            self.vocab_size = json.load(file)["model"]["vocab_size"]

    def sequence(self, prompt: list[int], num_steps: int) -> tuple[float, float]:
        return self._run([prompt], num_steps)

    def batch(self, prompts: list[list[int]], num_steps: int) -> float:
        return self._run(prompts, num_steps)[1]

    def _run(self, prompts: list[list[int]], num_steps: int) -> tuple[float, float]:
        length = len(prompts[0]) + num_steps + 1
        params = onnxruntime_genai.GeneratorParams(self._model)
        # No sequence ends before its length, whatever tokens are chosen.
        params.set_search_options(max_length=length, min_length=length, batch_size=len(prompts))
        generator = onnxruntime_genai.Generator(self._model, params)
        start = time.perf_counter()
        generator.append_tokens(np.array(prompts, np.int32))
        generator.get_logits()
        # Chooses the first token from these logits; the next call runs it.
        generator.generate_next_token()
        middle = time.perf_counter()
        for _ in range(num_steps):
            generator.generate_next_token()
        return middle - start, time.perf_counter() - middle


if __name__ == "__main__":
    protocol.run(OnnxRuntime)
