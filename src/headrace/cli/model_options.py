"""Options of a model: which, how it is loaded, cached and scheduled. Defaults and limits are the configurations'."""

import argparse
from typing import TYPE_CHECKING, Any

import headrace
from headrace.cli.option_values import given_of, parse_bytes, parse_step_s, words_of
from headrace.cli.parallel_options import add_parallel_options, parallel_settings
from headrace.config import (
    CacheConfig,
    DataflowChoice,
    Device,
    Dtype,
    EngineConfig,
    KvCacheDtype,
    LoadConfig,
    Quantize,
    SchedulerConfig,
    Softmax,
)
from headrace.config import settings as config_settings
from headrace.config.engine import GPU_MEMORY_FRACTION, HOST_MEMORY_FRACTION, SERVING_STEP_S
from headrace.demo_model import DEMO, demo_model_path

if TYPE_CHECKING:
    from headrace.engine.llm import LLM


def add_model_options(
    parser: argparse.ArgumentParser,
    *,
    default: str = f"{DEMO}, the small one inside the package",
    with_ranks: bool = False,
) -> None:
    """Which model, and how it is loaded, cached and scheduled; with_ranks: also over how many ranks it is spread."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="MODEL", help=f"a folder or a hub id such as org/name (default: {default})")
    model.add_argument("--revision", help="branch, tag or commit of a hub model")
    model.add_argument(
        "--dtype",
        choices=words_of(Dtype),
        default=LoadConfig.dtype.value,
        help="type of activations, KV cache and unquantized weights (default: %(default)s, the checkpoint's)",
    )
    model.add_argument(
        "--quantize",
        choices=words_of(Quantize),
        default=LoadConfig.quantize.value,
        help="format of linear weights, converted while loading (default: %(default)s, as stored)",
    )
    _add_engine_options(parser.add_argument_group("engine"))
    if with_ranks:
        add_parallel_options(parser)


def _add_engine_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--device",
        default=str(Device()),
        metavar="DEVICE",
        help="auto, cpu, cuda, or cuda:1 for one GPU of several; auto is a GPU if there is one, see `headrace info` "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--no-graphs",
        dest="graphs",
        action="store_false",
        default=None,
        help="ask for decode steps op by op, instead of replaying them as one call",
    )
    group.add_argument(
        "--graph-budget",
        dest="graph_budget_s",
        type=float,
        metavar="S",
        help="on a GPU: record decode steps for about so many seconds at start, and what is left when it is first met; "
        "several ranks run it as a step of the next size "
        f"(default: {EngineConfig.graph_budget_s:g})",
    )
    group.add_argument(
        "--threads",
        dest="num_threads",
        type=int,
        metavar="N",
        help="CPU threads (default: the CPUs this process may use)",
    )
    group.add_argument(
        "--dataflow",
        choices=words_of(DataflowChoice),
        default=EngineConfig.dataflow.value,
        help="how linear layers are computed: as measured on this machine (on first use of a model, for some seconds), "
        "by default, or always one way; the results are the same, but on a GPU, where each way rounds differently, and "
        "`measured` also says who computes the attention of prompts (default: %(default)s)",
    )
    group.add_argument(
        "--batch-invariant",
        action=argparse.BooleanOptionalAction,
        default=EngineConfig.batch_invariant,
        help="on a CPU, give a request the same text, to the last bit, alone and in any batch; without it one with AMX "
        "for float16 decodes one or two requests of int8 and int4 weights a little faster, and nothing else changes "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--softmax",
        choices=words_of(Softmax),
        default=EngineConfig.softmax.value,
        help="what attention subtracts from logits: their maximum, a constant (see `headrace calibrate`), an earlier "
        "maximum, or whichever `headrace tune` found to be the fastest; auto is their maximum, and texts may differ in "
        "rounding between the others (default: %(default)s)",
    )
    group.add_argument(
        "--block-size", type=int, metavar="N", help=f"tokens per KV cache block (default: {CacheConfig.block_size})"
    )
    group.add_argument(
        "--kv-cache-bytes",
        type=parse_bytes,
        metavar="BYTES",
        help="memory for keys and values, such as 512MiB or 1.5GB (default: what --max-num-seqs full contexts need, "
        f"at most {HOST_MEMORY_FRACTION:.0%} of free memory, on a GPU {GPU_MEMORY_FRACTION:.0%})".replace("%", "%%"),
    )
    group.add_argument(
        "--kv-cache-dtype",
        choices=words_of(KvCacheDtype),
        help="type of keys and values in the cache; int8 takes half the memory of bfloat16 and is a little less exact "
        f"(default: {CacheConfig.kv_cache_dtype.value}, that of the activations)",
    )
    group.add_argument(
        "--max-num-seqs",
        type=int,
        metavar="N",
        help=f"requests in one step (default: {SchedulerConfig.max_num_seqs})",
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        help=f"prompt and output tokens in one step (default: {SchedulerConfig.max_num_batched_tokens})",
    )
    group.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="prompt plus output tokens of one request (default: the model's)",
    )
    group.add_argument(
        "--no-prefix-caching",
        dest="enable_prefix_caching",
        action="store_false",
        default=None,
        help="compute every prompt from its first token, even where an earlier one began the same",
    )


def add_step_time_option(group: argparse._ArgumentGroup) -> None:
    """For commands that serve many at once, beside the model options."""
    group.add_argument(
        "--max-step-time",
        dest="max_step_s",
        type=parse_step_s,
        default=SERVING_STEP_S,
        metavar="S",
        help="seconds between two tokens of a request, about, while prompts of others are computed, which take longer "
        "for it; none lets prompts take all of --max-num-batched-tokens (default: %(default)s)",
    )


def make_llm(args: argparse.Namespace, *, show_progress: bool, require_tokenizer: bool = True) -> "LLM":
    """Load the model that the options name."""
    # Families take some 30 ms to import, which --help would wait for; torch takes seconds, which a misspelt name would.
    from headrace.models.config_file import check_local_model

    # Settings that cannot be used are said first.
    check_local_model(loading_config(args, show_progress=show_progress).load.model)
    return headrace.LLM(show_progress=show_progress, require_tokenizer=require_tokenizer, **_settings(args))


def loading_config(args: argparse.Namespace, *, show_progress: bool) -> EngineConfig:
    """The same settings, for commands that load the model themselves; remarks on more threads than there are CPUs."""
    config = engine_config(args, show_progress=show_progress)
    if config.num_threads is not None:
        # What asks the machine takes some 30 ms to import, which --help would wait for.
        from headrace.cli.thread_count import remark_on_threads

        remark_on_threads(config.num_threads, config.parallel)
    return config


def engine_config(args: argparse.Namespace, *, show_progress: bool) -> EngineConfig:
    """The same settings, for commands that load no model."""
    return config_settings.engine_config(show_progress=show_progress, **_settings(args))


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    model = str(demo_model_path()) if args.model in (None, DEMO) else args.model
    return given_of(args, config_settings.SETTINGS) | parallel_settings(args) | {"model": model}
