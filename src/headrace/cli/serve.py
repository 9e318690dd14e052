"""`headrace serve`: an OpenAI-compatible server."""

import argparse
import logging
import os
import resource
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.cli.model_options import add_model_options, add_step_time_option, loading_config
from headrace.cli.option_values import parse_bytes
from headrace.cli.terminal import is_watched
from headrace.config.launched import launched_from
from headrace.config.observability import LogFormat, ObservabilityConfig
from headrace.config.server import TOOL_FORMATS, ServerConfig
from headrace.demo_model import DEMO

if TYPE_CHECKING:
    from headrace.engine.engine import Engine

_OTHER_FILES = 512

_KEY_VARIABLE = "HEADRACE_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument(
        "--host",
        default=ServerConfig.host,
        help="address to listen on; 0.0.0.0 is every one this machine has (default: %(default)s, this machine alone)",
    )
    server.add_argument(
        "--port", type=int, default=ServerConfig.port, metavar="N", help="0 takes a free one (default: %(default)s)"
    )
    server.add_argument(
        "--api-key",
        dest="api_keys",
        action="append",
        metavar="KEY",
        help=f"ask clients for this key; repeatable (default: {_KEY_VARIABLE} of the environment, or none)",
    )
    server.add_argument(
        "--cors-origin",
        dest="cors_origins",
        action="append",
        metavar="ORIGIN",
        help="let web pages from there ask; repeatable, '*' is everywhere (default: only the server's own page)",
    )
    server.add_argument("--served-model-name", metavar="NAME", help="of the model, for clients (default: its own)")
    server.add_argument(
        "--tool-format",
        choices=TOOL_FORMATS,
        default=ServerConfig.tool_format,
        help="how the model writes tool calls (default: %(default)s, what its chat template says)",
    )
    server.add_argument("--no-page", dest="page", action="store_false", help="serve no page at /")
    _add_observability(parser.add_argument_group("logs and traces"))
    _add_limits(parser.add_argument_group("limits", "beyond them requests are refused, and told why"))
    add_step_time_option(parser.add_argument_group("fairness"))
    add_model_options(parser, with_ranks=True)


def _add_observability(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--log-format",
        choices=[member.value for member in LogFormat],
        default=ObservabilityConfig.log_format.value,
        help="of the access log, a line for each request (default: %(default)s)",
    )
    group.add_argument("--log-file", type=Path, metavar="FILE", help="append the access log to it (default: stderr)")
    group.add_argument(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="send traces there, such as http://localhost:4318/v1/traces; needs opentelemetry-sdk (default: none)",
    )


def _add_limits(group: argparse._ArgumentGroup) -> None:
    default = ServerConfig
    counts = {
        "--max-waiting-requests": ("max_waiting_requests", "outputs that wait for their first token"),
        "--max-waiting-tokens": ("max_waiting_tokens", "prompt tokens of those"),
        "--max-connections": ("max_connections", "open at a time"),
    }
    for option, (name, text) in counts.items():
        value = getattr(default, name)
        group.add_argument(option, dest=name, type=int, default=value, metavar="N", help=f"{text} (default: {value})")
    sizes = {
        "--max-logprobs-memory": ("max_logprob_bytes", "that log probabilities of all open requests may take"),
        "--max-body": ("max_body_bytes", "of one request's body"),
        "--max-bodies": ("max_bodies_bytes", "of the bodies of all open requests"),
    }
    for option, (name, text) in sizes.items():
        value = getattr(default, name)
        shown = f"{text} (default: {value // 2**20}MiB)"
        group.add_argument(option, dest=name, type=parse_bytes, default=value, metavar="BYTES", help=shown)
    seconds = {
        "--queue-timeout": ("queue_timeout_s", "a request waits for its first token at most so long"),
        "--request-timeout": ("request_timeout_s", "a request runs at most so long"),
        "--body-timeout": ("body_timeout_s", "a request's body must have arrived by then"),
        "--slow-reader": ("slow_reader_s", "a client must take in within this what was sent to it"),
        "--drain": ("drain_s", "after SIGTERM running requests may go on so long"),
    }
    for option, (name, text) in seconds.items():
        value = getattr(default, name)
        group.add_argument(
            option, dest=name, type=float, default=value, metavar="S", help=f"{text} (default: {value:g} s)"
        )
    group.add_argument(
        "--max-restarts",
        type=int,
        default=default.max_restarts,
        metavar="N",
        help="start lost ranks again so often in ten minutes, then end (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    started_s = time.monotonic()
    config = server_config(args)
    name = config.served_model_name or _short_name(args)
    engine_settings = loading_config(args, show_progress=is_watched())
    # Before anything slow, so that a port in use is said at once.
    from headrace.server.serve import Serving, listen

    listener = listen(config)
    _allow_connections(config.max_connections)
    logging.basicConfig(format="headrace: %(message)s", level=logging.WARNING)
    _announce(config, listener)

    def load() -> "Engine":
        from headrace.engine.engine import Engine
        from headrace.engine.load import load_model

        return Engine(load_model(engine_settings))

    def say_ready() -> None:
        _say(f"ready after {time.monotonic() - started_s:.1f} s: {name} at {_url(config, listener)}")

    serving = Serving(load, config, model_name=name, can_restart=launched_from() is None, on_ready=say_ready)
    serving.run(listener)
    if serving.is_stuck:
        # Python's own end would wait for the engine's thread, or take the libraries away from under it. Other ranks
        # end when they see that this one is gone.
        os._exit(0)
    return 0


def server_config(args: argparse.Namespace) -> ServerConfig:
    """What the options ask for.

    Raises:
        ConfigError: a value that is not allowed.
    """
    given = {name: getattr(args, name) for name in ServerConfig.__dataclass_fields__ if hasattr(args, name)}
    key = os.environ.get(_KEY_VARIABLE)
    given["api_keys"] = tuple(args.api_keys or ([key] if key else ()))
    given["cors_origins"] = tuple(args.cors_origins or ())
    given["observability"] = ObservabilityConfig(
        log_format=LogFormat(args.log_format),
        log_file=args.log_file,
        otlp_traces_endpoint=args.otlp_traces_endpoint,
    )
    return ServerConfig(**given)


def _allow_connections(count: int) -> None:
    """Shells give a process 1024 open files, and let it have more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft not in (resource.RLIM_INFINITY, wanted) and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _short_name(args: argparse.Namespace) -> str:
    """A folder's last part; a hub id as it is."""
    if args.model in (None, DEMO):
        return DEMO
    return Path(args.model).resolve().name if Path(args.model).is_dir() else str(args.model)


def _announce(config: ServerConfig, listener: socket.socket) -> None:
    _say(f"listening on {_url(config, listener)}; {_who_may_ask(config)}")


def _who_may_ask(config: ServerConfig) -> str:
    keys = "with an API key" if config.api_keys else "without an API key"
    if not config.is_public:
        return f"this machine alone may ask, {keys}; --host 0.0.0.0 opens it to others"
    return f"every machine that reaches it may ask, {keys}" + ("" if config.api_keys else "; --api-key asks for one")


def _url(config: ServerConfig, listener: socket.socket) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{listener.getsockname()[1]}"


def _say(text: str) -> None:
    print(f"headrace: {text}", file=sys.stderr, flush=True)
