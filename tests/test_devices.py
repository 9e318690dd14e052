"""Which device a rank runs on, from what was asked for and what the host has."""

import pytest
import torch
from tiny_model import write_tiny_model

from headrace import LLM
from headrace.config import Device, DeviceKind
from headrace.engine.devices import Gpu, GpuFacts, gpu_facts, resolve_device
from headrace.errors import BackendUnavailable, ConfigError
from headrace.kernels import KernelChoice

CPU = torch.device("cpu")


def facts(*obstacles: str | None, obstacle: str | None = None) -> GpuFacts:
    gpus = [
        Gpu(index=i, name=f"card {i}", capability="9.0", memory_bytes=2**30, obstacle=o)
        for i, o in enumerate(obstacles)
    ]
    return GpuFacts(gpus=tuple(gpus), obstacle=obstacle, versions={})


NONE = facts(obstacle="torch sees no GPU")


class TestNames:
    @pytest.mark.parametrize("text", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
    def test_a_name_is_itself_again(self, text: str) -> None:
        assert str(Device.parse(text)) == text

    @pytest.mark.parametrize("text", ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "auto:1", "cuda:1\n"])
    def test_others_are_refused(self, text: str) -> None:
        with pytest.raises(ConfigError, match="allowed: auto, cpu, cuda"):
            Device.parse(text)

    def test_an_index_without_a_gpu_is_refused(self) -> None:
        for kind, index in ((DeviceKind.CPU, 0), (DeviceKind.AUTO, 1), (DeviceKind.CUDA, -1)):
            with pytest.raises(ConfigError):
                Device(kind=kind, index=index)


class TestAuto:
    def test_takes_a_gpu_if_there_is_one(self) -> None:
        chosen = resolve_device(Device(), facts=facts(None))
        assert (chosen.device, chosen.reason) == (torch.device("cuda", 0), "auto: card 0")

    def test_passes_over_gpus_that_the_kernels_cannot_use(self) -> None:
        assert resolve_device(Device(), facts=facts("too old", None)).device == torch.device("cuda", 1)

    def test_says_why_it_takes_the_cpu(self) -> None:
        chosen = resolve_device(Device(), facts=NONE)
        assert (chosen.device, chosen.reason) == (CPU, "auto: torch sees no GPU")
        assert "card 0: too old" in resolve_device(Device(), facts=facts("too old")).reason

    def test_native_kernels_keep_it_on_the_cpu(self) -> None:
        assert resolve_device(Device(), KernelChoice.CPU, facts=facts(None)).device == CPU

    def test_interpreted_kernels_keep_it_on_the_cpu(self, monkeypatch) -> None:
        triton = pytest.importorskip("triton")
        for is_interpreted, device in ((True, CPU), (False, torch.device("cuda", 0))):
            monkeypatch.setattr(triton.knobs.runtime, "interpret", is_interpreted)
            assert resolve_device(Device(), KernelChoice.TRITON, facts=facts(None)).device == device

    def test_each_rank_has_a_gpu_or_all_have_the_cpu(self) -> None:
        def devices(num_ranks: int) -> list[torch.device]:
            return [
                resolve_device(
                    Device(), local_rank=rank, num_local_ranks=num_ranks, facts=facts(None, "old", None)
                ).device
                for rank in range(num_ranks)
            ]

        assert devices(2) == [torch.device("cuda", 0), torch.device("cuda", 2)]
        assert devices(3) == [CPU] * 3


class TestAskedFor:
    def test_the_cpu_is_taken_whatever_there_is(self) -> None:
        assert resolve_device(Device.parse("cpu"), facts=facts(None)).device == CPU

    def test_a_gpu_that_is_not_there_is_refused(self) -> None:
        with pytest.raises(BackendUnavailable, match="device is 'cuda', but torch sees no GPU; use --device cpu"):
            resolve_device(Device.parse("cuda"), facts=NONE)
        with pytest.raises(BackendUnavailable, match="no GPU 2; there are: 0, 1"):
            resolve_device(Device.parse("cuda:2"), facts=facts(None, None))
        with pytest.raises(BackendUnavailable, match="GPU 0, card 0: too old"):
            resolve_device(Device.parse("cuda:0"), facts=facts("too old", None))

    def test_ranks_take_one_each_from_that_index_on(self) -> None:
        device = Device.parse("cuda:1")
        found = [
            resolve_device(device, local_rank=rank, num_local_ranks=2, facts=facts(None, None, None)).device.index
            for rank in range(2)
        ]
        assert found == [1, 2]

    def test_too_few_for_the_ranks_are_refused(self) -> None:
        with pytest.raises(BackendUnavailable, match="3 ranks on this host have 2 GPUs"):
            resolve_device(Device.parse("cuda"), num_local_ranks=3, facts=facts(None, None))
        with pytest.raises(BackendUnavailable, match="no GPU 2"):
            resolve_device(Device.parse("cuda:1"), num_local_ranks=2, facts=facts(None, None))


def test_this_host_is_described() -> None:
    found = gpu_facts()
    assert found.versions["cuda"] == torch.version.cuda
    assert len(found.gpus) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert found.usable or found.explain_none()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_model_is_not_loaded_elsewhere_than_asked_for(tmp_path) -> None:
    with pytest.raises(BackendUnavailable, match="device is 'cuda', but"):
        LLM(str(write_tiny_model(tmp_path / "tiny")), device="cuda")
