"""The steps that size a GPU's memory when a model is loaded, run on the CPU."""

import pytest

from headrace.engine import load_rank
from headrace.engine.step_memory import prompt_rows, run_largest_step


def run_profile_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: loading runs two steps, each on a cache of its own that is gone afterwards."""

    def measure(decoder, boundary, shape, cache_format, scheduler, *, max_model_len, block_size):
        for _ in range(2):
            rows = prompt_rows(scheduler, max_model_len, block_size)
            run_largest_step(
                decoder, boundary, shape, cache_format, rows, block_size=block_size, num_logits=scheduler.max_num_seqs
            )
        return 0

    monkeypatch.setattr(load_rank, "measure_step_bytes", measure)
