"""What a benchmark found, as JSON and as a table."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from headrace.bench.facts import WeightFacts, weight_facts
from headrace.bench.floors import Floor, decode_floor, prefill_floor
from headrace.bench.limits import MachineLimits
from headrace.bench.machine import device_name
from headrace.bench.model import BATCH_CONTEXT_LEN, BATCH_STEPS, BenchSettings, ModelSpeed
from headrace.cli.environment import machine, versions
from headrace.cli.terminal import aligned, format_bytes, format_ms, format_rate
from headrace.config import ParallelConfig
from headrace.costs.memory import kv_token_bytes
from headrace.engine.load import LoadedModel


@dataclass(frozen=True)
class Figure:
    """One measured time, the tokens that went through in it, and the floor it stands on.

    exchange_share: of that time, what rank 0 spent in exchanges with other ranks, waiting included.
    """

    key: str
    label: str
    num_tokens: int
    measured_s: float
    floor: Floor
    exchange_share: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.measured_s


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """num_threads: as asked for, None if the machine decided; remarks: defaults that gave way to the model."""

    model_name: str
    model: LoadedModel
    settings: BenchSettings
    speed: ModelSpeed
    limits: MachineLimits
    peak_memory_bytes: int
    num_threads: int | None
    remarks: tuple[str, ...]
    parallel: ParallelConfig

    @property
    def facts(self) -> WeightFacts:
        return weight_facts(self.model.config, self.model.formats, self.model.kernels)

    def figures(self) -> Iterator[Figure]:
        facts, limits = self.facts, self.limits
        token_bytes = kv_token_bytes(self.model.config, self.model.kv_cache_format)
        for length, seconds in self.speed.prefill_s.items():
            floor = prefill_floor(length, facts, limits)
            share = self.speed.prefill_exchange_share[length]
            yield Figure(f"prefill_{length}", f"prefill {length}", length, seconds, floor, share)
        for length, seconds in self.speed.decode_step_s.items():
            # Half way through the steps, which is their average.
            context_len = length + self.settings.decode_tokens // 2
            floor = decode_floor(1, context_len, token_bytes, facts, limits)
            label = f"decode from {length}"
            share = self.speed.decode_exchange_share[length]
            yield Figure(f"decode_from_{length}", label, 1, seconds, floor, share)
        for size, seconds in self.speed.batch_step_s.items():
            floor = decode_floor(size, BATCH_CONTEXT_LEN + BATCH_STEPS // 2, token_bytes, facts, limits)
            label = f"decode, batch of {size}"
            share = self.speed.batch_exchange_share[size]
            yield Figure(f"batched_decode_{size}", label, size, seconds, floor, share)

    def to_json(self) -> dict[str, Any]:
        figures, model = list(self.figures()), self.model
        return {
            "engine": "headrace",
            "model": self.model_name,
            "device": device_name(model.kernels.device),
            "threads": model.plan.num_threads,
            "tensor_parallel_size": self.parallel.tensor_parallel_size,
            "pipeline_parallel_size": self.parallel.pipeline_parallel_size,
            "exchange_shares": {f.key: round(f.exchange_share, 4) for f in figures},
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **{f.key: round(f.tokens_per_s, 3) for f in figures if not f.key.startswith("batched_")},
            "batched_decode": {
                str(f.num_tokens): round(f.tokens_per_s, 3) for f in figures if f.key.startswith("batched_")
            },
            "load_s": round(model.load_s, 3),
            "peak_memory_bytes": self.peak_memory_bytes,
            "weight_bytes": model.weight_bytes,
            "num_parameters": self.facts.num_parameters,
            "formats": _formats(model),
            "softmax": model.softmax.reason,
            "kernels": {choice.op: choice.implementation for choice in model.kernels.explain()},
            "protocol": asdict(self.settings),
            "limits": _limits_to_json(self.limits) | {"floors": {f.key: _floor_to_json(f) for f in figures}},
            "machine": machine(self.num_threads),
            "versions": versions(),
            "remarks": list(self.remarks),
        }


def table(report: BenchReport) -> list[str]:
    """Figures beside their floors, then what they stand on."""
    has_ranks = report.parallel.world_size > 1
    rows = [("", "tokens/s", "measured", "floor", "bound by", "share of limit", *["exchanges"] * has_ranks)]
    for figure in report.figures():
        rows.append(
            (
                figure.label,
                format_rate(figure.tokens_per_s),
                format_ms(figure.measured_s),
                format_ms(figure.floor.floor_s),
                figure.floor.bound,
                f"{figure.floor.share(figure.measured_s):.1%}",
                *[f"{figure.exchange_share:.1%}"] * has_ranks,
            )
        )
    return [*aligned(rows), "", *aligned(list(_background(report)), num_left=2)]


def _background(report: BenchReport) -> Iterator[tuple[str, str]]:
    model, limits = report.model, report.limits
    formats = _formats(model)
    peaks = ", ".join(f"{gops:,.0f} Gop/s {name}" for name, gops in limits.multiply_gops.items())
    yield "model", f"{report.model_name}, {report.facts.num_parameters:,} parameters"
    yield "weights", f"{format_bytes(model.weight_bytes)}, linear {formats['linear']}, other {formats['dense']}"
    yield "loaded in", f"{model.load_s:.2f} s"
    yield "peak memory", format_bytes(report.peak_memory_bytes)
    device = model.kernels.device
    yield "machine", device_name(device)
    if device.type == "cpu":
        yield "threads", str(model.plan.num_threads)
    if report.parallel.world_size > 1:
        parallel = report.parallel
        yield (
            "ranks",
            f"TP {parallel.tensor_parallel_size} x PP {parallel.pipeline_parallel_size}, threads are each rank's",
        )
    yield "limits", f"read {limits.read_gb_per_s:.1f} GB/s; {peaks}"
    yield "attention", model.softmax.reason
    yield "kernels", ", ".join(sorted({choice.implementation for choice in model.kernels.explain()}))
    for remark in report.remarks:
        yield "note", remark


def _formats(model: LoadedModel) -> dict[str, str]:
    formats = model.formats
    return {"linear": formats.linear.value, "dense": formats.dense.value, "kv_cache": model.kv_cache_format.value}


def _limits_to_json(limits: MachineLimits) -> dict[str, Any]:
    return {
        "read_gb_per_s": round(limits.read_gb_per_s, 2),
        "read_buffer_bytes": limits.read_buffer_bytes,
        "multiply_gops": {name: round(gops, 1) for name, gops in limits.multiply_gops.items()},
        "num_threads": limits.num_threads,
    }


def _floor_to_json(figure: Figure) -> dict[str, Any]:
    floor = figure.floor
    return {
        "measured_ms": round(figure.measured_s * 1e3, 4),
        "floor_ms": round(floor.floor_s * 1e3, 4),
        "memory_ms": round(floor.memory_s * 1e3, 4),
        "compute_ms": round(floor.compute_s * 1e3, 4),
        "bound": floor.bound,
        "share_of_limit": round(floor.share(figure.measured_s), 4),
    }
