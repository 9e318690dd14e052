"""How much room steps are given beside weights and cache on a GPU, and what is said where there is none."""

import pytest
import torch
from checkpoints import BY_NAME, load_folder
from tape import TapeRecorder, tape_kernels

from headrace.config import CacheConfig, EngineConfig, KvCacheFormat, LoadConfig, ParallelConfig, SchedulerConfig
from headrace.config.engine import GPU_MEMORY_FRACTION
from headrace.engine import step_memory
from headrace.engine.device_memory import available_bytes, explaining_out_of_memory, memory_owner
from headrace.engine.engine_plan import resolve_plan
from headrace.engine.kv_cache_spec import RankShape
from headrace.engine.step_memory import measure_step_bytes, prompt_rows, run_largest_step
from headrace.errors import ConfigError, OutOfDeviceMemory
from headrace.parallel.place import Place

CPU, GPU = torch.device("cpu"), torch.device("cuda", 3)


def scheduler(num_tokens: int, num_seqs: int) -> SchedulerConfig:
    return SchedulerConfig(max_num_batched_tokens=num_tokens, max_num_seqs=num_seqs)


@pytest.mark.parametrize(
    ("num_tokens", "num_seqs", "max_model_len", "lengths"),
    [(100, 8, 128, [100]), (100, 8, 40, [40, 40, 20]), (100, 2, 40, [40, 40]), (40, 8, 40, [40]), (8, 8, 1, [1] * 8)],
)
def test_the_largest_step_has_as_many_tokens_as_may_come(num_tokens, num_seqs, max_model_len, lengths) -> None:
    rows = prompt_rows(scheduler(num_tokens, num_seqs), max_model_len, block_size=16)
    assert [len(row.token_ids) for row in rows] == lengths
    assert [len(row.block_table) for row in rows] == [-(-n // 16) for n in lengths]
    assert not any(row.block_table.any() for row in rows)


class TestMeasurement:
    @pytest.fixture
    def decoder(self, tmp_path):
        BY_NAME["gemma2"].write(tmp_path / "model")
        return load_folder(tmp_path / "model", kernels=tape_kernels(TapeRecorder()))

    def shape(self, decoder) -> RankShape:
        return RankShape.of(decoder.config, Place(rank=0, config=ParallelConfig()))

    def test_the_steps_run_with_a_cache_of_one_block(self, decoder, monkeypatch) -> None:
        made = []
        make = decoder.kernels.make_kv_cache
        object.__setattr__(decoder.kernels, "make_kv_cache", lambda spec: made.append(spec) or make(spec))
        rows = prompt_rows(scheduler(50, 4), 20, block_size=4)
        run_largest_step(decoder, None, self.shape(decoder), KvCacheFormat.FLOAT32, rows, block_size=4, num_logits=4)
        assert {spec.num_blocks for spec in made} == {1}
        assert len(made) == len(decoder.layers)

    def test_on_the_cpu_nothing_is_run(self, decoder) -> None:
        assert self.measure(decoder) == 0

    def measure(self, decoder) -> int:
        return measure_step_bytes(
            decoder,
            None,
            self.shape(decoder),
            KvCacheFormat.FLOAT32,
            scheduler(50, 4),
            max_model_len=20,
            block_size=4,
        )

    def test_prefill_graphs_and_what_comes_out_of_them_are_added_up(self, decoder, monkeypatch) -> None:
        """A GPU of which a prefill takes less than prompts beside sequences that decode, and those a million bytes."""
        peaks, tokens = iter([900_000, 1_000_000, 1_000]), []
        monkeypatch.setattr(step_memory, "peak_bytes", lambda device, run: run() or next(peaks))
        monkeypatch.setattr(
            step_memory, "run_largest_step", lambda *args, **_: tokens.append(sum(len(r.token_ids) for r in args[4]))
        )
        object.__setattr__(decoder.kernels, "device", GPU)
        outputs = (1 + 2 + 4) * 4 * (decoder.config.vocab_size + decoder.config.hidden_size)
        assert self.measure(decoder) == 1_001_000 + 3 * 16 * 2**20 + outputs
        warm_up, prompts, mixed, decodes = [20, 16], 50, 3 + 20, 4
        assert tokens == [*warm_up, prompts, mixed, decodes]


def test_ranks_on_different_gpus_share_no_memory() -> None:
    owners = {memory_owner(device) for device in (CPU, GPU, torch.device("cuda", 1))}
    assert len(owners) == 3
    assert available_bytes(CPU) > 0


def test_a_gpu_gives_most_of_what_is_free() -> None:
    def plan(**cache) -> int:
        config = EngineConfig(
            load=LoadConfig(model="m"), cache=CacheConfig(**cache), scheduler=SchedulerConfig(max_num_seqs=4)
        )
        return resolve_plan(
            config,
            max_model_len=160,
            block_bytes=100,
            available_bytes=3000,
            num_threads=1,
            memory_fraction=GPU_MEMORY_FRACTION,
        ).num_blocks

    assert plan() == 27
    assert plan(memory_fraction=0.5) == 15
    with pytest.raises(ConfigError, match="allowed: above 0, up to 1"):
        plan(memory_fraction=0.0)


def test_what_does_not_fit_is_said_in_one_line() -> None:
    text = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 3 has 1 GiB free. Including PYTORCH_CUDA_ALLOC_CONF."
    said = r"^the model does not fit on cuda:3: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 3 has 1 GiB free; "
    with (
        pytest.raises(OutOfDeviceMemory, match=said) as raised,
        explaining_out_of_memory("the model does not fit", GPU),
    ):
        raise torch.OutOfMemoryError(text)
    assert "PYTORCH" not in str(raised.value)
