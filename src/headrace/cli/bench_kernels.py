"""`headrace bench kernels`: the kernels alone, beside this machine's limits."""

import argparse
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from headrace.cli.progress_line import progress_line
from headrace.cli.terminal import aligned
from headrace.cli.thread_count import remark_on_threads
from headrace.config import Device, KvCacheFormat, WeightFormat
from headrace.errors import ConfigError
from headrace.machine import cpu_limits, cpu_name

if TYPE_CHECKING:
    from headrace.bench.attention_kernels import AttentionFigure
    from headrace.bench.linear_kernels import LinearFigure

_SHAPES = ("tinyllama-1.1b", "smollm-135m", "llama2-7b")
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
_CONTEXTS = (512, 4096, 32768)
_PREFILL = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Each time is the best of several rounds, on weights and caches too large for any cache of the machine. Its\n"
        "limit is the time to read the weights, or the keys and values, once, or the time to do the multiplications,\n"
        "whichever is longer. Memory bandwidth (huge pages, several streams) and the peak are measured anew beside\n"
        "each of them, in the same rounds, since they change on a machine that is shared."
    )
    parser.add_argument(
        "--shape", choices=_SHAPES, default=_SHAPES[0], help="sizes of the layers (default: %(default)s)"
    )
    formats = [weight_format.value for weight_format in WeightFormat]
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=formats,
        default=formats,
        metavar="FORMAT",
        help=f"of weights: {', '.join(formats)}",
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", default=_ROWS, metavar="M", help="rows that a layer multiplies at once"
    )
    parser.add_argument(
        "--contexts", type=int, nargs="*", default=_CONTEXTS, metavar="N", help="contexts to decode from"
    )
    parser.add_argument(
        "--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:1 (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-invariant",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave out implementations that make a row's last bits depend on its batch (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: the CPUs this process may use)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")


def run(args: argparse.Namespace) -> int:
    if min([*args.rows, *args.contexts, args.threads or 1]) < 1:
        raise ConfigError("--rows, --contexts and --threads must be at least 1")
    device = Device.parse(args.device)
    # From here on torch is needed.
    import torch

    from headrace.bench.attention_kernels import measure_attention
    from headrace.bench.kernels import SHAPES
    from headrace.bench.linear_kernels import measure_linears
    from headrace.bench.machine import device_name
    from headrace.engine.devices import resolve_device
    from headrace.kernels import kernel_choice_from, resolve_kernels

    choice = kernel_choice_from()
    chosen = resolve_device(device, choice)
    kernels = resolve_kernels(choice, device=chosen.device, batch_invariant=args.batch_invariant)
    shape, name = SHAPES[args.shape], device_name(kernels.device)
    if args.threads is not None:
        remark_on_threads(args.threads)
    num_threads = args.threads or cpu_limits().num_threads
    kernels.set_num_threads(num_threads)
    weight_formats = [WeightFormat(name) for name in args.formats]
    lengths = [(n, 1) for n in args.contexts] + ([(_PREFILL, _PREFILL)] if args.contexts else [])
    with progress_line(is_shown=not args.json) as on_start, torch.inference_mode():
        linears = list(measure_linears(kernels, shape, weight_formats, args.rows, on_start))
        cache_formats = (KvCacheFormat.BFLOAT16, KvCacheFormat.INT8)
        attention = list(measure_attention(kernels, shape, cache_formats, lengths, on_start))
    if args.json:
        facts = {"shape": args.shape, "device": name, "threads": num_threads, "cpu": cpu_name()}
        print(json.dumps(_json(facts, linears, attention), allow_nan=False))
    else:
        where = name if kernels.device.type == "cuda" else f"{name}, {num_threads} threads"
        print("\n".join(_text(f"{where}, {args.shape}", linears, attention)))
    return 0


def _text(title: str, linears: "Sequence[LinearFigure]", attention: "Sequence[AttentionFigure]") -> Iterator[str]:
    read = _range([figure.read_bytes_per_s for figure in (*linears, *attention)])
    peaks = {f: _range([x.ops_per_s for x in linears if x.weight_format is f]) for f in WeightFormat}
    told = ", ".join(f"{f.value} {peak}" for f, peak in peaks.items() if peak)
    yield f"{title}: read {read} GB/s, Gop/s {told}"
    yield ""
    yield "linear layers: microseconds (share of the limit) for M rows"
    rows = list(dict.fromkeys(figure.num_rows for figure in linears))
    table = [["format", "layer", "[N, K]", *(f"M = {m}" for m in rows)]]
    for start in range(0, len(linears), len(rows)):
        figures = linears[start : start + len(rows)]
        first = figures[0]
        name = [first.weight_format.value, first.layer, f"[{first.out_features}, {first.in_features}]"]
        table.append([*name, *(f"{f.seconds * 1e6:.0f} ({f.share:.0%})" for f in figures)])
    yield from aligned(table, num_left=3)
    if not attention:
        return
    yield ""
    yield "attention: microseconds (share of the limit) by softmax scheme"
    schemes = list(dict.fromkeys(figure.scheme for figure in attention))
    table = [["cache", "tokens", *(scheme.value for scheme in schemes)]]
    for start in range(0, len(attention), len(schemes)):
        group = attention[start : start + len(schemes)]
        what = f"{'decode from' if group[0].num_new == 1 else 'prefill of'} {group[0].context_len}"
        table.append([group[0].cache_format.value, what, *(f"{f.seconds * 1e6:.0f} ({f.share:.0%})" for f in group)])
    yield from aligned(table, num_left=2)


def _range(per_s: Sequence[float]) -> str:
    """In 1e9: what was measured beside one figure after another, from the least to the most."""
    return " to ".join(dict.fromkeys(f"{value / 1e9:.0f}" for value in (min(per_s), max(per_s)))) if per_s else ""


def _json(
    facts: dict[str, Any], linears: "Sequence[LinearFigure]", attention: "Sequence[AttentionFigure]"
) -> dict[str, Any]:
    return {
        **facts,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "linear": [f.to_json() for f in linears],
        "attention": [f.to_json() for f in attention],
    }
