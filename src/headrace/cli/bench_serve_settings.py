"""What the options of `bench serve` ask for."""

import argparse
import json
import os
import secrets
from typing import TYPE_CHECKING, Any

from headrace.errors import ConfigError, nearest_name

if TYPE_CHECKING:
    from headrace.bench.serve.arrivals import Arrivals
    from headrace.bench.serve.metrics import Goodput
    from headrace.bench.serve.settings import Load, ServeBench, Sweep, Target, Workload

DEFAULT_MIX = "512:128"
DEFAULT_CONCURRENCY = 8
DEFAULT_REQUESTS = 64
API_KEY_VARIABLE = "OPENAI_API_KEY"
_GOODPUT_FIELDS = {"ttft": "ttft_s", "tpot": "tpot_s", "e2el": "e2el_s"}


def serve_bench_from(args: argparse.Namespace) -> "ServeBench":
    """
    Raises:
        ConfigError: an option that cannot be used.
    """
    from headrace.bench.serve.settings import ServeBench

    target, workload = _target(args), _workload(args)
    workload.check_against(target.route)
    sweep = _sweep(args)
    return ServeBench(target=target, workload=workload, load=_load(args), goodput=_goodput(args.goodput), sweep=sweep)


def _target(args: argparse.Namespace) -> "Target":
    from headrace.bench.serve.address import Address
    from headrace.bench.serve.requests import Route
    from headrace.bench.serve.settings import Target

    if not args.timeout > 0:
        raise ConfigError(f"--timeout is {args.timeout:g}; it must be above 0 seconds")
    return Target(
        address=Address.parse(args.base_url),
        route=Route(args.endpoint),
        model=args.model,
        headers=_headers(args),
        extra_body=_extra_body(args),
        timeout_s=args.timeout,
        verify=not args.insecure,
    )


def _headers(args: argparse.Namespace) -> dict[str, str]:
    key = os.environ.get(API_KEY_VARIABLE) if args.api_key is None else args.api_key
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for text in args.header:
        name, colon, value = text.partition(":")
        if not colon or not name.strip():
            raise ConfigError(f"--header is '{text}'; give NAME:VALUE")
        headers[name.strip()] = value.strip()
    if any(not (0x20 <= ord(c) < 0x7F) for name, value in headers.items() for c in name + value):
        raise ConfigError("--header and --api-key must be plain ASCII on one line")
    return headers


def _extra_body(args: argparse.Namespace) -> dict[str, Any]:
    body: Any = {}
    if args.extra_body is not None:
        try:
            body = json.loads(args.extra_body)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--extra-body is no JSON: {error}") from None
        if not isinstance(body, dict):
            raise ConfigError(f"--extra-body is '{args.extra_body}'; give an object such as '{{\"top_k\": 1}}'")
        if body.get("stream", True) is not True:
            raise ConfigError("--extra-body has stream; answers are always streamed, or nothing could be timed")
    fields = {"ignore_eos": True} if args.ignore_eos else {}
    return {**fields, **body}


def _workload(args: argparse.Namespace) -> "Workload":
    from headrace.bench.serve.dataset import read_samples
    from headrace.bench.serve.lengths import RequestMix
    from headrace.bench.serve.settings import Workload

    if args.vocab_size is not None and args.vocab_size < 2:
        raise ConfigError(f"--vocab-size is {args.vocab_size}; it must be at least 2")
    for name in ("shared_prefix_tokens", "seed"):
        if (getattr(args, name) or 0) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must not be negative")
    return Workload(
        mix=RequestMix.parse(args.request_mix or DEFAULT_MIX),
        vocab_size=args.vocab_size,
        shared_prefix_tokens=args.shared_prefix_tokens,
        samples=tuple(read_samples(args.prompts)) if args.prompts is not None else (),
        seed=secrets.randbits(32) if args.seed is None else args.seed,
    )


def _load(args: argparse.Namespace) -> "Load":
    from headrace.bench.serve.settings import Load

    for name, least in (("num_requests", 1), ("warmup", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    if args.duration is not None and not 0 < args.duration < float("inf"):
        raise ConfigError(f"--duration is {args.duration:g}; it must be above 0 seconds")
    default = DEFAULT_REQUESTS if args.duration is None else None
    return Load(
        arrivals=_arrivals(args),
        num_requests=default if args.num_requests is None else args.num_requests,
        duration_s=args.duration,
        warmup=args.warmup,
    )


def _arrivals(args: argparse.Namespace) -> "Arrivals":
    from headrace.bench.serve.arrivals import ClosedLoop, OpenLoop

    if args.sweep is not None and (args.rate is not None or args.concurrency is not None):
        raise ConfigError("--sweep sets the load itself; leave --rate and --concurrency out")
    is_open = args.rate is not None or (args.sweep is not None and args.sweep[0] == "rate")
    shape = {name: getattr(args, name) for name in ("burstiness", "burst_size") if getattr(args, name) is not None}
    if shape and not is_open:
        raise ConfigError("--burstiness and --burst-size need --rate: clients that wait do not arrive by chance")
    if is_open:
        return OpenLoop(1.0 if args.rate is None else args.rate, **shape)
    return ClosedLoop(DEFAULT_CONCURRENCY if args.concurrency is None else args.concurrency)


def _sweep(args: argparse.Namespace) -> "Sweep | None":
    from headrace.bench.serve.settings import Sweep, SweepOver

    if args.sweep is None:
        return None
    what, text = args.sweep
    allowed = [over.value for over in SweepOver]
    if what not in allowed:
        raise ConfigError(f"--sweep is over '{what}'; {nearest_name(what, allowed)}")
    over = SweepOver(what)
    levels = () if text == "auto" else tuple(_level(part, over, text) for part in text.split(","))
    return Sweep(over, levels)


def _level(part: str, over: Any, text: str) -> float:
    try:
        value = float(part)
    except ValueError:
        value = 0.0
    is_whole = value.is_integer() or over.value == "rate"
    if not (0 < value < float("inf") and is_whole):
        raise ConfigError(f"--sweep {over.value} has the levels '{text}'; give numbers above 0 such as 1,2,4 or auto")
    return value


def _goodput(texts: list[str]) -> "Goodput | None":
    from headrace.bench.serve.metrics import Goodput

    limits: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition(":")
        try:
            limit_ms = float(value)
        except ValueError:
            limit_ms = 0.0
        if name not in _GOODPUT_FIELDS or not 0 < limit_ms < float("inf"):
            raise ConfigError(f"--goodput is '{text}'; give limits in milliseconds such as ttft:500 tpot:50 e2el:9000")
        limits[_GOODPUT_FIELDS[name]] = limit_ms / 1e3
    return Goodput(**limits) if limits else None
