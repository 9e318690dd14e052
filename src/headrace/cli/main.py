"""The `headrace` command: finds the subcommand, runs it, turns its errors into one line and an exit code.

Exit codes: 0 done; 2 a mistake in the call, or anything else that has one clear line to say; 130 interrupted; 141
whoever read the output has left. Unexpected exceptions keep their traceback.

Knows the subcommands by name only: each is a module with `add_arguments(parser)` and `run(args) -> int`, imported when
it is chosen and without torch until it runs, so that help and mistakes answer at once. A name may have two words; the
first one alone, or followed by an option, then stands for a default.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO, cast

from headrace import __version__
from headrace.config.launched import launched_from
from headrace.errors import ConfigError, HeadraceError, nearest_name

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

COMMANDS = {
    "generate": ("headrace.cli.generate", "complete prompts, streaming the text as it comes"),
    "chat": ("headrace.cli.chat", "talk to a model in the terminal"),
    "serve": ("headrace.cli.serve", "serve a model to OpenAI clients over HTTP"),
    "bench model": ("headrace.cli.bench_model", "measure a model's speed, and how close it is to the machine's limits"),
    "bench kernels": ("headrace.cli.bench_kernels", "measure the kernels alone, beside the machine's limits"),
    "bench ablation": (
        "headrace.cli.bench_ablation",
        "measure without each idea of FlashDecoding++, and with it alone",
    ),
    "bench quality": ("headrace.cli.bench_quality", "measure what weight and KV cache formats cost in quality"),
    "bench serve": ("headrace.cli.bench_serve", "put load on an OpenAI endpoint, and measure what answers take"),
    "tune": ("headrace.cli.tune", "measure which kernels suit this machine and a model, and remember it"),
    "calibrate": ("headrace.cli.calibrate", "find the range of a model's attention logits, and remember it"),
    "quantize": ("headrace.cli.quantize", "save a checkpoint with int8 or int4 weights"),
    "volume": ("headrace.cli.volume", "predict the bytes that ranks exchange, beside the published formulas"),
    "info": ("headrace.cli.info", "show what Headrace sees of this machine, and of a model"),
}

DEFAULTS = {"bench": "bench model"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code."""
    _make_streams_safe()
    try:
        code = _run(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
    except BrokenPipeError:
        code = EXIT_BROKEN_PIPE
    except (HeadraceError, OSError) as error:
        code = _report(error)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    _flush_or_discard()
    return code


def help_text() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "usage: headrace COMMAND [OPTIONS]\n\n"
        "LLM inference at the machine's limit.\n\n"
        f"commands:\n{rows}\n\n"
        "options:\n  -h, --help     show this text; `headrace COMMAND --help` shows a command's options\n"
        "  -V, --version  show the version"
    )


def split_command(argv: list[str]) -> tuple[str, list[str]]:
    """The command's name, of one word or two, and what follows it; an empty name if nothing was given."""
    word, rest = (argv[0], argv[1:]) if argv else ("", [])
    if word not in DEFAULTS:
        return word, rest
    if not rest or rest[0].startswith("-"):
        return DEFAULTS[word], rest
    return f"{word} {rest[0]}", rest[1:]


def _run(argv: list[str]) -> int:
    name, rest = split_command(argv)
    if name in ("-h", "--help"):
        print(help_text())
    elif name in ("-V", "--version"):
        print(f"headrace {__version__}")
    elif name in COMMANDS:
        return _run_command(name, rest)
    elif name:
        kind = "option" if name.startswith("-") else "command"
        raise ConfigError(f"unknown {kind} '{name}'; {_hint(name)}")
    else:
        print(help_text(), file=sys.stderr)
        return EXIT_ERROR
    return 0


def _hint(name: str) -> str:
    """What may have been meant. Names of two words are alike in the first one, and must be so in the second."""
    if siblings := _siblings(name):
        return nearest_name(name, siblings, cutoff=0.8)
    return nearest_name(name, [*COMMANDS, *DEFAULTS, "--help", "--version"])


def _siblings(name: str) -> list[str]:
    """The commands of two words that begin as this one does; none for a name of one word."""
    return [other for other in COMMANDS if " " in name and other.partition(" ")[0] == name.partition(" ")[0]]


def _run_command(name: str, argv: list[str]) -> int:
    module_name, summary = COMMANDS[name]
    module = import_module(module_name)
    parser_module = import_module("headrace.cli.parser")
    parser = parser_module.Parser(prog=f"headrace {name}", summary=summary)
    module.add_arguments(parser)
    if name in DEFAULTS.values():
        others = [f"  headrace {other:<16} {COMMANDS[other][1]}" for other in _siblings(name) if other != name]
        parser.epilog = "\n".join([parser.epilog, "", "others:", *others])
    args = parser.parse(argv)
    if args is None:
        return 0
    if hasattr(args, "tensor_parallel_size") and _is_follower():
        return int(import_module("headrace.cli.follow").run(args))
    return int(module.run(args))


def _is_follower() -> bool:
    """Whether a launcher has started this process as a rank that neither reads prompts nor prints results."""
    launched = launched_from()
    return launched is not None and launched.rank > 0


def _report(error: Exception) -> int:
    print(f"headrace: error: {_one_line(error)}", file=sys.stderr)
    return EXIT_ERROR


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(text.split()) or type(error).__name__


def _make_streams_safe() -> None:
    """A terminal that cannot show a character gets a replacement, not a crash half way through an answer; a stream
    that was closed before the start, which Python leaves as None, is an empty one."""
    sys.stdin = sys.stdin or _open_nothing("r")
    sys.stdout = sys.stdout or _open_nothing("w")
    sys.stderr = sys.stderr or _open_nothing("w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def _open_nothing(mode: str) -> TextIO:
    return cast(TextIO, Path(os.devnull).open(mode, encoding="utf-8"))


def _flush_or_discard() -> None:
    """What could not be written would fail again, loudly, when Python exits."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
