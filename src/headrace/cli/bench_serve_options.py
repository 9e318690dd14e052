"""The options of `bench serve`."""

import argparse
from pathlib import Path

from headrace.cli.bench_serve_settings import API_KEY_VARIABLE, DEFAULT_CONCURRENCY, DEFAULT_MIX, DEFAULT_REQUESTS

_DEFAULT_URL = "http://127.0.0.1:8000"


def add_endpoint_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("endpoint")
    group.add_argument("--base-url", default=_DEFAULT_URL, metavar="URL", help="the server (default: %(default)s)")
    group.add_argument(
        "--endpoint",
        choices=("completions", "chat"),
        default="completions",
        help="/v1/completions or /v1/chat/completions (default: %(default)s)",
    )
    group.add_argument("--model", metavar="NAME", help="as the server knows it (default: the first that it lists)")
    group.add_argument("--api-key", metavar="KEY", help=f"(default: the environment variable {API_KEY_VARIABLE})")
    group.add_argument("--header", action="append", default=[], metavar="NAME:VALUE", help="may be given several times")
    group.add_argument(
        "--extra-body", metavar="JSON", help="fields added to every request; null leaves one of ours out"
    )
    group.add_argument(
        "--ignore-eos", action="store_true", help="ask for outputs of full length, of servers that know this field"
    )
    group.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="for a whole answer (default: %(default)g)"
    )
    group.add_argument("--insecure", action="store_true", help="do not check the server's TLS certificate")


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--request-mix",
        metavar="MIX",
        help="PROMPT:OUTPUT[:WEIGHT],... in tokens; a length is 512, 256-1024 (uniform) or 512~0.5 (lognormal, "
        f"median~sigma) (default: {DEFAULT_MIX})",
    )
    group.add_argument(
        "--prompts", type=Path, metavar="FILE", help="JSON lines of prompts or messages, or ShareGPT's JSON"
    )
    group.add_argument(
        "--vocab-size", type=int, metavar="N", help="make prompts of random token ids below N, of exact length"
    )
    group.add_argument(
        "--shared-prefix-tokens",
        type=int,
        default=0,
        metavar="N",
        help="begin all prompts alike (default: each has its own beginning, so that no prefix cache flatters)",
    )
    group.add_argument(
        "--seed",
        type=int,
        help="of prompts, lengths and arrivals (default: another one each time, or a server that is asked twice would "
        "know the prompts)",
    )


def add_load_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument("--rate", type=float, metavar="R", help="open loop: requests per second, answered or not")
    kind.add_argument(
        "--concurrency",
        type=int,
        metavar="N",
        help=f"closed loop: N clients, each waits for its answer (default: {DEFAULT_CONCURRENCY})",
    )
    group.add_argument(
        "--burstiness", type=float, metavar="B", help="shape of the gamma intervals; below 1 is burstier (default: 1)"
    )
    group.add_argument("--burst-size", type=int, metavar="N", help="requests that arrive together (default: 1)")
    group.add_argument(
        "--num-requests",
        type=int,
        metavar="N",
        help=f"(default: {DEFAULT_REQUESTS}, or without end where there is a --duration)",
    )
    group.add_argument("--duration", type=float, metavar="SECONDS", help="send for so long, then wait for the answers")
    group.add_argument(
        "--warmup", type=int, default=1, metavar="N", help="requests before, that do not count (default: %(default)s)"
    )
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="LIMIT",
        help="count requests within limits in milliseconds: ttft:500 tpot:50 e2el:9000",
    )
    group.add_argument(
        "--sweep",
        nargs=2,
        metavar=("WHAT", "LEVELS"),
        help="a load for each level: rate 1,2,4 or concurrency 1,8,16; auto doubles until there is no more to gain",
    )
