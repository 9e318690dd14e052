"""What `headrace volume` says to people."""

from collections.abc import Iterable, Iterator
from fractions import Fraction

from headrace.cli.terminal import aligned, plural
from headrace.cli.volume_report import Account, VolumeReport
from headrace.costs.sites import Phase
from headrace.costs.steps import ForwardPass, request_run
from headrace.costs.summary import wire_bytes_by_phase

_HEADER = ("phase", "exchange", "at", "algorithm", "calls", "payload/rank", "wire/rank", "total wire")
_SYMBOLS = (
    "L layers, h hidden size, v vocabulary, b bytes of an element, t ranks of TP, p stages, S_p prompt tokens, "
    "S_d generated"
)


def volume_lines(report: VolumeReport) -> Iterator[str]:
    by_the_letter, _, headrace, *counted = accounts = report.accounts()
    yield from _facts(report)
    yield from ("", "As published (arXiv:2507.14392)", _SYMBOLS)
    yield from _published(report)
    yield from ("", "An engine that follows the formulas to the letter (ring all-reduce, logits to the root)")
    yield from _table(report, by_the_letter)
    yield from ("", "Headrace")
    yield from _table(report, headrace)
    for account in counted:
        yield from ("", "Headrace, counted")
        yield from _table(report, account)
    yield from ("", "All ranks together, bytes")
    yield from _totals(accounts)
    if report.counted is not None:
        yield from ("", *(report.differences() or ["Counted equals predicted to the byte, on every rank."]))


def _facts(report: VolumeReport) -> Iterator[str]:
    layout, request = report.layout, report.request
    model, parallel = layout.model, layout.parallel
    run = request_run(request, report.max_num_batched_tokens, parallel.pipeline_parallel_size)
    steps = {
        phase: sum(times for event, times in run.items() if isinstance(event, ForwardPass) and event.phase is phase)
        for phase in Phase
    }
    stages = ", ".join(str(len(layers)) for layers in layout.stages())
    yield from aligned(
        [
            (
                "model",
                f"{report.model_name}: {model.num_hidden_layers} layers, hidden size {model.hidden_size:,}, "
                f"vocabulary {model.vocab_size:,}, {report.dtype} ({layout.activation_bytes} bytes)",
            ),
            (
                "layout",
                f"TP {parallel.tensor_parallel_size} x PP {parallel.pipeline_parallel_size}: "
                f"{plural(parallel.world_size, 'rank')}, stages of {stages} layers",
            ),
            (
                "requests",
                f"{request.batch_size} of {request.prompt_tokens:,} prompt and "
                f"{plural(request.output_tokens, 'generated token')}: {request.num_tokens:,} pass through the layers "
                f"(steps of prefill: {steps[Phase.PREFILL]:,}, of decode: {steps[Phase.DECODE]:,})",
            ),
        ],
        num_left=2,
    )


def _published(report: VolumeReport) -> Iterator[str]:
    tensor, pipeline = report.tensor_parallel(), report.pipeline_parallel()
    layout, request = report.layout, report.request
    model, num_bytes = layout.model, layout.activation_bytes
    t, num_tokens = layout.parallel.tensor_parallel_size, tensor.num_tokens
    samples = request.batch_size * request.output_tokens
    sizes = f"{num_tokens:,} x {model.hidden_size:,} x {num_bytes}"
    yield from aligned(
        [
            (
                "V_tp",
                "(2L+1) (S_p+S_d-1) h b 2(t-1)/t",
                f"{tensor.num_all_reduces} x {sizes} x {tensor.ring_factor}",
                "sent by each rank",
                _shown(tensor.all_reduce_bytes),
            ),
            (
                "",
                "S_d (v/t) b",
                f"{samples:,} x {model.vocab_size:,}/{t} x {num_bytes}",
                "payload of one rank",
                _shown(tensor.gather_bytes),
            ),
            ("", "sum", "", "as printed, of two units", _shown(tensor.total_bytes)),
            (
                "V_pp",
                "(p-1) (S_p+S_d-1) h b 2",
                f"{pipeline.num_boundaries} x {sizes} x {pipeline.tensors_per_boundary}",
                "sent on all links together",
                _shown(Fraction(pipeline.total_bytes)),
            ),
        ],
        num_left=4,
    )


def _table(report: VolumeReport, account: Account) -> Iterator[str]:
    summary = report.summary(account)
    if not summary:
        yield "nothing: one rank has nobody to send to"
        return
    rows: list[tuple[str, ...]] = [_HEADER]
    for row in summary:
        numbers = (row.count, row.payload_bytes, row.wire_bytes, row.total_wire_bytes)
        rows.append((row.phase.value, row.operation, row.kind, row.algorithm, *(f"{n:,}" for n in numbers)))
    by_rank = [sum(row.wire_bytes for row in rows_of_rank) for rows_of_rank in account.ranks]
    rows.append(("all", "", "", "", "", "", f"{max(by_rank):,}", f"{sum(by_rank):,}"))
    yield from aligned(rows, num_left=4)


def _totals(accounts: Iterable[Account]) -> list[str]:
    accounts = list(accounts)
    reference = accounts[0].total_wire_bytes
    rows: list[tuple[str, ...]] = [("engine", "payload", "wire, prefill", "wire, decode", "wire", "of literal")]
    for account in accounts:
        by_phase, total = wire_bytes_by_phase(account.ranks), account.total_wire_bytes
        numbers = (account.total_payload_bytes, by_phase[Phase.PREFILL], by_phase[Phase.DECODE], total)
        share = f"{total / reference:.1%}" if reference else "-"
        rows.append((account.title, *(f"{n:,}" for n in numbers), share))
    return aligned(rows)


def _shown(value: Fraction) -> str:
    return f"{value.numerator:,}" if value.denominator == 1 else f"{float(value):,.1f}"
