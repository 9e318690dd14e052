"""Options that several commands share. Defaults and limits are those of the configuration dataclasses."""

import argparse
import re
from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING, Any

import headrace
from headrace.config import (
    AllReduceDtype,
    CacheConfig,
    DataflowChoice,
    Device,
    Dtype,
    EngineConfig,
    KvCacheDtype,
    KvSharding,
    LoadConfig,
    ParallelConfig,
    Quantize,
    SamplingParams,
    SchedulerConfig,
    Softmax,
    Transport,
)
from headrace.config.engine import GPU_MEMORY_FRACTION, HOST_MEMORY_FRACTION, SERVING_STEP_S
from headrace.demo_model import DEMO, demo_model_path

if TYPE_CHECKING:
    from headrace.engine.llm import LLM

_BYTE_UNITS = {"": 1, "B": 1}
_BYTE_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)}
_BYTE_UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)}

_ENGINE_SETTINGS = (
    "num_threads",
    "graphs",
    "graph_budget_s",
    "block_size",
    "kv_cache_bytes",
    "kv_cache_dtype",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "max_step_s",
    "enable_prefix_caching",
)

_SAMPLING_SETTINGS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "min_tokens",
    "ignore_eos",
    "n",
    "seed",
    "logprobs",
)


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
        choices=_values(Dtype),
        default=LoadConfig.dtype.value,
        help="type of activations, KV cache and unquantized weights (default: %(default)s, the checkpoint's)",
    )
    model.add_argument(
        "--quantize",
        choices=_values(Quantize),
        default=LoadConfig.quantize.value,
        help="format of linear weights, converted while loading (default: %(default)s, as stored)",
    )
    _add_engine_options(parser.add_argument_group("engine"))
    if with_ranks:
        _add_parallel_options(
            parser.add_argument_group(
                "ranks",
                "processes that share the model; started on this host, or by `mpiexec -n N headrace ...` on several",
            )
        )


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
        choices=_values(DataflowChoice),
        default=EngineConfig.dataflow.value,
        help="how linear layers are computed: as measured on this machine (on first use of a model, for some seconds), "
        "by default, or always one way; the results are the same, but on a GPU, where each way rounds differently, and "
        "`measured` also says who computes the attention of prompts (default: %(default)s)",
    )
    group.add_argument(
        "--softmax",
        choices=_values(Softmax),
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
        choices=_values(KvCacheDtype),
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


def _add_parallel_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--tp",
        dest="tensor_parallel_size",
        type=int,
        metavar="T",
        help="ranks that share each layer (tensor parallelism; default: 1)",
    )
    group.add_argument(
        "--pp",
        dest="pipeline_parallel_size",
        type=int,
        metavar="P",
        help="stages of layers, one after the other (pipeline parallelism; default: 1)",
    )
    group.add_argument(
        "--pp-layers",
        dest="pipeline_layers",
        type=parse_layer_counts,
        metavar="N,N",
        help="layers of each stage (default: as even as possible)",
    )
    group.add_argument(
        "--transport",
        choices=_values(Transport),
        help=f"what carries tensors between ranks (default: {ParallelConfig.transport.value}: nccl on GPUs; on CPUs "
        "mpi under mpiexec or srun, gloo under torchrun, else shm, shared memory)",
    )
    group.add_argument(
        "--all-reduce-dtype",
        choices=_values(AllReduceDtype),
        help="type that ranks' summands travel as (default: that of the activations); int8 serves long messages over "
        "slow links, and is a little less exact",
    )
    group.add_argument(
        "--kv-sharding",
        choices=_values(KvSharding),
        help="what ranks that share a KV head hold of its context: all of it, or a share "
        f"(default: {ParallelConfig.kv_sharding.value})",
    )
    group.add_argument(
        "--deadline",
        dest="deadline_s",
        type=float,
        metavar="S",
        help=f"give a rank up that shows no sign of life for so many seconds (default: {ParallelConfig.deadline_s:g})",
    )
    group.add_argument(
        "--literal",
        action="store_true",
        default=None,
        help="exchange what the published formulas count: --shard-embedding, --send-residual and --gather-logits",
    )
    group.add_argument("--shard-embedding", action="store_true", default=None, help="sum input embeddings over ranks")
    group.add_argument("--send-residual", action="store_true", default=None, help="two tensors from stage to stage")
    group.add_argument(
        "--slice-boundary", action="store_true", default=None, help="each rank sends its share, the next stage gathers"
    )
    group.add_argument("--gather-logits", action="store_true", default=None, help="gather whole logits for sampling")


def add_sampling_options(parser: argparse.ArgumentParser, *, max_tokens: int | None) -> None:
    """How tokens are chosen and when an output ends; max_tokens: this command's default, None is no limit."""
    group = parser.add_argument_group("sampling", "defaults are what the model's generation_config.json recommends")
    group.add_argument("--temperature", type=float, metavar="T", help="0 always takes the most likely token")
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K most likely tokens; 0 keeps all")
    group.add_argument("--top-p", type=float, metavar="P", help="keep the most likely tokens that sum to P")
    group.add_argument("--min-p", type=float, metavar="P", help="drop tokens below P times the most likely one")
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1 avoids tokens seen before")
    group.add_argument("--presence-penalty", type=float, metavar="X", help="-2 to 2, once per token in the output")
    group.add_argument("--frequency-penalty", type=float, metavar="X", help="-2 to 2, for each time in the output")
    group.add_argument(
        "--logit-bias",
        type=parse_bias,
        action="append",
        metavar="ID=BIAS",
        help="add BIAS (-100 to 100) to the logit of token ID; repeatable",
    )
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the output before TEXT; repeatable")
    group.add_argument(
        "--max-tokens",
        type=parse_max_tokens,
        default=max_tokens,
        metavar="N",
        help=f"output tokens at most; 'none' goes up to the model's length (default: {max_tokens or 'none'})",
    )
    group.add_argument("--min-tokens", type=int, metavar="N", help="output tokens at least")
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on after an end-of-sequence token")
    group.add_argument("--seed", type=int, metavar="N", help="makes the same call give the same text")


def parallel_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of the layout, `--literal` as what it stands for."""
    given = _given(args, tuple(ParallelConfig.__dataclass_fields__))
    if getattr(args, "literal", None):
        given |= {"shard_embedding": True, "send_residual": True, "gather_logits": True}
    return given


def make_llm(args: argparse.Namespace, *, show_progress: bool, require_tokenizer: bool = True) -> "LLM":
    """Load the model that the options name."""
    # Families take some 30 ms to import, which --help would wait for; torch takes seconds, which a misspelt name would.
    from headrace.models.config_file import check_local_model

    name = engine_config(args, show_progress=show_progress).load.model  # settings that cannot be used are said first
    check_local_model(name)
    return headrace.LLM(
        name,
        revision=args.revision,
        dtype=args.dtype,
        quantize=args.quantize,
        device=args.device,
        show_progress=show_progress,
        require_tokenizer=require_tokenizer,
        dataflow=args.dataflow,
        softmax=args.softmax,
        **_given(args, _ENGINE_SETTINGS),
        **parallel_settings(args),
    )


def engine_config(args: argparse.Namespace, *, show_progress: bool) -> EngineConfig:
    """The same settings, for commands that load no model."""
    return EngineConfig(
        load=LoadConfig(
            model=_model_name(args),
            revision=args.revision,
            dtype=Dtype(args.dtype),
            quantize=Quantize(args.quantize),
            show_progress=show_progress,
        ),
        cache=CacheConfig(**_cache_settings(_given(args, tuple(CacheConfig.__dataclass_fields__)))),
        scheduler=SchedulerConfig(**_given(args, tuple(SchedulerConfig.__dataclass_fields__))),
        parallel=parallel_config(args),
        softmax=Softmax(args.softmax),
        dataflow=DataflowChoice(args.dataflow),
        device=Device.parse(args.device),
        **_given(args, ("num_threads", "graphs", "graph_budget_s")),
    )


def parallel_config(args: argparse.Namespace) -> ParallelConfig:
    """The layout that the options describe."""
    given = parallel_settings(args)
    kinds: dict[str, type[Enum]] = {
        "transport": Transport,
        "all_reduce_dtype": AllReduceDtype,
        "kv_sharding": KvSharding,
    }
    return ParallelConfig(**(given | {k: kind(given[k]) for k, kind in kinds.items() if k in given}))


def _cache_settings(given: dict[str, Any]) -> dict[str, Any]:
    if "kv_cache_dtype" in given:
        given["kv_cache_dtype"] = KvCacheDtype(given["kv_cache_dtype"])
    return given


def sampling_changes(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings that were given, checked before any time goes into loading a model.

    Raises:
        RequestError: a value outside its range.
    """
    changes = _given(args, _SAMPLING_SETTINGS) | {"max_tokens": args.max_tokens}
    if args.logit_bias:
        changes["logit_bias"] = dict(args.logit_bias)
    SamplingParams.from_mapping(changes)
    return changes


def parse_bytes(text: str) -> int:
    """512MiB, 1.5GB, 1073741824: a number and its unit, decimal (MB) or binary (MiB)."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?) ?([A-Za-z]*)", text.strip(), re.ASCII)
    units = {name.lower(): factor for name, factor in _BYTE_UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size; write 512MiB, 2GiB, 1.5GB or a number of bytes")
    return (
        int(float(match[1]) * units[match[2].lower()]) if "." in match[1] else int(match[1]) * units[match[2].lower()]
    )


def parse_bias(text: str) -> tuple[int, float]:
    """ID=BIAS, such as 13=-100."""
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not ID=BIAS; write 13=-100 for token 13") from None


def parse_max_tokens(text: str) -> int | None:
    """A number of tokens, or `none` for as many as the model's length allows."""
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text[:80]}' is neither a number of tokens nor 'none'") from None


def parse_step_s(text: str) -> float | None:
    """A number of seconds, or `none` for no limit."""
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text[:80]}' is neither a number of seconds nor 'none'") from None


def parse_layer_counts(text: str) -> tuple[int, ...]:
    """Numbers of layers separated by commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text[:80]}' is not a list of layer counts; write 10,12") from None


def parse_token_ids(text: str) -> list[int]:
    """Token ids separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text[:80]}' is not a list of token ids; write 1,2,3") from None


def _model_name(args: argparse.Namespace) -> str:
    return str(demo_model_path()) if args.model in (None, DEMO) else str(args.model)


def _given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """What was given on the command line; the rest keeps the defaults of its dataclass."""
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def _values(kind: type[Enum]) -> list[str]:
    return [member.value for member in kind]
