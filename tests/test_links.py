"""The cost of exchanges in time, against sums worked out by hand."""

import pytest
from test_volume import LLAMA_8B, model

from headrace.config import ParallelConfig
from headrace.costs.exchanges import LITERAL_RULES, Layout
from headrace.costs.links import Link, exchanges_s, step_times
from headrace.costs.sites import Phase
from headrace.costs.steps import GREEDY_ROW_BYTES, ForwardPass, SampledRows
from headrace.costs.volume import RankVolume
from headrace.errors import ConfigError

DECODE = (ForwardPass(Phase.DECODE, 1), SampledRows(Phase.DECODE, 1, GREEDY_ROW_BYTES))
ROW_BYTES = 4096 * 2


def layout(**parallel):
    return Layout(model=model(LLAMA_8B), parallel=ParallelConfig(**parallel), activation_bytes=2)


def link(alpha_s, bytes_per_s=float("inf")):
    return Link(alpha_s=(alpha_s,), bytes_per_s=bytes_per_s)


class TestLink:
    def test_size_classes(self):
        sized = Link(alpha_s=(1.0, 2.0, 4.0), max_bytes=(100, 1000), bytes_per_s=50.0)
        assert [sized.call_s(size, 0) for size in (0, 100, 101, 1000, 1001)] == [1, 1, 2, 2, 4]
        assert sized.call_s(100, 25) == 1.5

    @pytest.mark.parametrize(
        "settings",
        [
            {"alpha_s": (1.0,), "max_bytes": (10,), "bytes_per_s": 1.0},
            {"alpha_s": (1.0, 2.0, 3.0), "max_bytes": (10, 5), "bytes_per_s": 1.0},
            {"alpha_s": (1.0, 2.0, 3.0), "max_bytes": (5, 5), "bytes_per_s": 1.0},
            {"alpha_s": (-1.0,), "bytes_per_s": 1.0},
            {"alpha_s": (1.0,), "bytes_per_s": 0.0},
        ],
    )
    def test_refused(self, settings):
        with pytest.raises(ConfigError):
            Link(**settings)


class TestExchanges:
    @pytest.mark.parametrize(
        ("alpha_s", "expected_ms"), [(1250e-6, 81.25), (32e-6, 2.08), (9e-6, 0.585)], ids=["gloo", "tcp", "memory"]
    )
    def test_calls_of_a_token_dominate_decode(self, alpha_s, expected_ms):
        """65 all-reduces of two ranks and no logits."""
        literal = Layout(
            model=model(LLAMA_8B),
            parallel=ParallelConfig(tensor_parallel_size=2, shard_embedding=True),
            activation_bytes=2,
            rules=LITERAL_RULES,
        )
        exchanges = RankVolume(literal, 0).exchanges(DECODE[0])
        assert exchanges_s(exchanges, {"tp": link(alpha_s)}) == pytest.approx(expected_ms / 1e3)

    def test_bytes_dominate_prefill(self):
        exchanges = RankVolume(layout(tensor_parallel_size=4), 1).exchanges(ForwardPass(Phase.PREFILL, 128))
        sent_bytes = 64 * 128 * ROW_BYTES * 2 * 3 / 4
        assert exchanges_s(exchanges, {"tp": link(0, 1e9)}) == pytest.approx(sent_bytes / 1e9)

    def test_a_message_counts_once(self):
        split = layout(pipeline_parallel_size=2)
        times = [
            exchanges_s(RankVolume(split, rank).exchanges(DECODE[0]), {"pp": link(3e-6, 1e9)}) for rank in range(2)
        ]
        assert times == [pytest.approx(3e-6 + ROW_BYTES / 1e9), 0]


class TestSteps:
    def test_one_process_exchanges_nothing(self):
        assert step_times(layout(), DECODE, 0.1, {}) == (0.1, 0.1)

    def test_tensor_parallelism_shortens_both_times(self):
        """64 sums of a row and one exchange of candidates."""
        found = step_times(layout(tensor_parallel_size=2), DECODE, 0.1, {"tp": link(10e-6, 1e9)})
        expected = 0.05 + 65 * 10e-6 + (64 * ROW_BYTES + GREEDY_ROW_BYTES) / 1e9
        assert found == (pytest.approx(expected), pytest.approx(expected))

    def test_pipelines_shorten_the_interval_alone(self):
        hop_s = 10e-6 + ROW_BYTES / 1e9
        found = step_times(layout(pipeline_parallel_size=4), DECODE, 0.1, {"pp": link(10e-6, 1e9)})
        assert found == (pytest.approx(0.1 + 3 * hop_s), pytest.approx(0.025 + hop_s))

    def test_uneven_stages_go_at_the_pace_of_the_slowest(self):
        split = layout(pipeline_parallel_size=2, pipeline_layers=(24, 8))
        assert step_times(split, DECODE, 0.1, {"pp": link(0)}) == (pytest.approx(0.1), pytest.approx(0.075))

    def test_the_link_decides_who_wins(self):
        """A token's latency: two ranks of either kind and one process."""

        def fastest(alpha_s, bytes_per_s):
            links = dict.fromkeys(("tp", "pp"), link(alpha_s, bytes_per_s))
            latency_s = {
                "tp": step_times(layout(tensor_parallel_size=2), DECODE, 0.05, links).latency_s,
                "pp": step_times(layout(pipeline_parallel_size=2), DECODE, 0.05, links).latency_s,
                "one": step_times(layout(), DECODE, 0.05, links).latency_s,
            }
            return min(latency_s, key=latency_s.__getitem__)

        assert fastest(10e-6, 1e9) == "tp"
        assert fastest(1250e-6, 12.5e6) == "one"
