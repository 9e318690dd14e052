"""Environments of the other engines, and a checkpoint converted for each: `python -m bench.setup_peers FOLDER
--checkpoint MODEL`, then `python -m bench.compare FOLDER/comparison.toml`.

Every engine gets a virtual environment of its own in FOLDER, since their requirements exclude each other. What is there
already is left as it is, so that a setup that broke off goes on. llama.cpp is compiled for this machine, which takes
ten minutes and more; the others are wheels. The largest conversion holds the checkpoint in float32 in memory.

torch is pinned, because its newest wheels bring several gigabytes for GPUs; where an index has CPU builds under another
name, say so with --torch, and give pip what it needs with --pip-args.
"""

import argparse
import json
import shlex
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.config import HEADRACE, PEERS

ROOT = Path(__file__).resolve().parents[1]
_HEADRACE_FORMATS = ("int4", "int8", "none")
_OPENVINO_GROUP_SIZES = (128, 64, 32)
_ORT_OPTIONS = ("int4_accuracy_level=4", "int4_block_size=32")


@dataclass(frozen=True, kw_only=True)
class Paths:
    """bin: the environment's programs; checkpoint: what to convert; output: where to."""

    bin: Path
    checkpoint: Path
    output: Path


Converter = Callable[[Paths], list[str]]


@dataclass(frozen=True, kw_only=True)
class PeerSetup:
    """needs: requirements for pip, beside torch if `needs_torch`; unwanted: packages that come with them and are taken
    out again; converters: by format; one that is None runs the checkpoint itself."""

    needs: tuple[str, ...]
    needs_torch: bool = True
    unwanted: tuple[str, ...] = ()
    converters: Mapping[str, Converter | None] = field(default_factory=dict)


def _gguf(kind: str) -> Converter:
    def convert(paths: Paths) -> list[str]:
        return [
            *(f"{paths.bin}/python", "-m", "bench.peers.to_gguf"),
            *(str(paths.checkpoint), str(paths.output), "--type", kind),
        ]

    return convert


def _onnx(paths: Paths) -> list[str]:
    return [
        *(f"{paths.bin}/python", "-m", "onnxruntime_genai.models.builder"),
        *("-i", str(paths.checkpoint), "-o", str(paths.output), "-p", "int4", "-e", "cpu"),
        *("--extra_options", *_ORT_OPTIONS),
    ]


def _openvino(weight_format: str) -> Converter:
    def convert(paths: Paths) -> list[str]:
        group = ["--group-size", str(openvino_group_size(paths.checkpoint))] if weight_format == "int4" else []
        return [
            *(f"{paths.bin}/optimum-cli", "export", "openvino", "-m", str(paths.checkpoint)),
            *("--task", "text-generation-with-past", "--weight-format", weight_format, *group, str(paths.output)),
        ]

    return convert


def _ctranslate2(paths: Paths) -> list[str]:
    return [
        *(f"{paths.bin}/ct2-transformers-converter", "--model", str(paths.checkpoint)),
        *("--quantization", "int8", "--output_dir", str(paths.output)),
    ]


SETUPS = {
    "llamacpp": PeerSetup(
        needs=("llama-cpp-python", "gguf", "numpy"),
        needs_torch=False,
        converters={"q4_0": _gguf("q4_0"), "q8_0": _gguf("q8_0")},
    ),
    "onnxruntime": PeerSetup(
        # Its model builder imports names that transformers 5.6 no longer has.
        needs=("onnxruntime-genai", "onnx", "onnx-ir", "transformers<5.6"),
        converters={"int4": _onnx},
    ),
    "openvino": PeerSetup(
        needs=("optimum-intel[openvino]", "nncf"),
        # Made for another torch than the pinned one, and of no use to text.
        unwanted=("torchvision",),
        converters={"int4": _openvino("int4"), "int8": _openvino("int8")},
    ),
    "ctranslate2": PeerSetup(needs=("ctranslate2", "transformers"), converters={"int8": _ctranslate2}),
    "transformers": PeerSetup(needs=("transformers",), converters={"bf16": None}),
}
assert tuple(SETUPS) == PEERS


def openvino_group_size(checkpoint: Path) -> int:
    """The largest group that divides the input of every linear layer."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    widths = config["hidden_size"], config["intermediate_size"]
    for size in _OPENVINO_GROUP_SIZES:
        if not any(width % size for width in widths):
            return size
    raise SystemExit(f"no group size of {_OPENVINO_GROUP_SIZES} divides {widths}; leave openvino out")


def make_environment(peer: str, folder: Path, torch: str, pip_args: Sequence[str]) -> Path:
    """The environment's folder of programs."""
    programs = folder / "bin"
    done = folder / ".complete"
    if not done.exists():
        venv.create(folder, with_pip=True)
        setup = SETUPS[peer]
        pip = [str(programs / "python"), "-m", "pip"]
        _run([*pip, "install", *pip_args, *([torch] if setup.needs_torch else []), *setup.needs])
        if setup.unwanted:
            _run([*pip, "uninstall", "--yes", *setup.unwanted])
        done.touch()
    return programs


def convert(peer: str, programs: Path, checkpoint: Path, folder: Path) -> dict[str, Path]:
    """The converted models by format."""
    models = {}
    for kind, converter in SETUPS[peer].converters.items():
        if converter is None:
            models[kind] = checkpoint
            continue
        output = folder / f"{checkpoint.name}-{peer}-{kind}{'.gguf' if peer == 'llamacpp' else ''}"
        if not output.exists():
            _run(converter(Paths(bin=programs, checkpoint=checkpoint, output=output)))
        models[kind] = output
    return models


def toml(checkpoint: Path, threads: int, peers: Mapping[str, tuple[Path, Mapping[str, Path]]]) -> str:
    """What `bench.config` reads."""
    lines = [f"checkpoint = {json.dumps(str(checkpoint))}", f"threads = {threads}"]
    for kind in _HEADRACE_FORMATS:
        lines += ["", "[[engine]]", f'engine = "{HEADRACE}"', f'format = "{kind}"']
    for peer, (programs, models) in peers.items():
        for kind, model in models.items():
            lines += ["", "[[engine]]", f'engine = "{peer}"', f'format = "{kind}"']
            lines += [f"python = {json.dumps(str(programs / 'python'))}", f"model = {json.dumps(str(model))}"]
    return "\n".join(lines) + "\n"


def _run(argv: Sequence[str]) -> None:
    print("+", shlex.join(argv), flush=True)
    code = subprocess.run(argv, cwd=ROOT, check=False).returncode
    if code:
        sys.exit(f"that ended with exit code {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a Hugging Face folder of a llama model")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, metavar="ENGINE", help=", ".join(PEERS))
    parser.add_argument("--threads", type=int, default=2, help="what comparison.toml asks for (default: %(default)s)")
    parser.add_argument("--torch", default="torch==2.13.0", help="requirement (default: %(default)s)")
    parser.add_argument("--pip-args", type=shlex.split, default=[], help="for every `pip install`")
    args = parser.parse_args()
    folder, checkpoint = args.folder.resolve(), args.checkpoint.resolve()
    (folder / "models").mkdir(parents=True, exist_ok=True)
    peers = {}
    for peer in args.peers:
        programs = make_environment(peer, folder / "envs" / peer, args.torch, args.pip_args)
        peers[peer] = programs, convert(peer, programs, checkpoint, folder / "models")
    config = folder / "comparison.toml"
    config.write_text(toml(checkpoint, args.threads, peers), encoding="utf-8")
    print(f"python -m bench.compare {shlex.quote(str(config))} --json runs/peers.json")


if __name__ == "__main__":
    main()
