"""OpenVINO: MODEL is a folder that optimum-cli exported, with the cache as state.

`python -m bench.peers.openvino folder --threads 2`
"""

import json
import time
from pathlib import Path

import numpy as np
import openvino

from bench.peers import protocol


class OpenVino:
    engine = "OpenVINO"
    version = f"openvino {openvino.__version__.partition('-')[0]}"

    def __init__(self, request: protocol.Request) -> None:
        folder = Path(request.model)
        self.vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": str(request.num_threads)}
        compiled = openvino.Core().compile_model(str(folder / "openvino_model.xml"), "CPU", settings)
        self._inputs = {name for port in compiled.inputs for name in port.names}
        self._request = compiled.create_infer_request()

    def sequence(self, prompt: list[int], num_steps: int) -> tuple[float, float]:
        return self._run(np.array([prompt], np.int64), num_steps)

    def batch(self, prompts: list[list[int]], num_steps: int) -> float:
        return self._run(np.array(prompts, np.int64), num_steps)[1]

    def _run(self, ids: np.ndarray, num_steps: int) -> tuple[float, float]:
        self._request.reset_state()
        start = time.perf_counter()
        self._forward(ids, 0)
        middle = time.perf_counter()
        for step in range(num_steps):
            column = step % ids.shape[1]
            self._forward(ids[:, column : column + 1], ids.shape[1] + step)
        return middle - start, time.perf_counter() - middle

    def _forward(self, ids: np.ndarray, num_cached: int) -> None:
        num_seqs, num_tokens = ids.shape
        positions = np.arange(num_cached, num_cached + num_tokens, dtype=np.int64)
        values = {
            "input_ids": ids,
            "attention_mask": np.ones((num_seqs, num_cached + num_tokens), np.int64),
            "position_ids": np.broadcast_to(positions, ids.shape).copy(),
            "beam_idx": np.arange(num_seqs, dtype=np.int32),
        }
        self._request.infer({name: value for name, value in values.items() if name in self._inputs})


if __name__ == "__main__":
    protocol.run(OpenVino)
