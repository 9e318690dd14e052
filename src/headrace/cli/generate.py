"""`headrace generate`: complete prompts."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.cli.form_options import add_form_options, form_changes
from headrace.cli.model_options import add_model_options, make_llm
from headrace.cli.option_values import parse_token_ids
from headrace.cli.results import cut_remark, summary, to_json
from headrace.cli.sampling_options import add_sampling_options, sampling_changes
from headrace.cli.terminal import bold, is_watched, note
from headrace.cli.text_input import check_text, read_file
from headrace.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from headrace.config import SamplingParams
    from headrace.engine.llm import LLM, Messages, Prompt
    from headrace.engine.outputs import CompletionOutput, RequestOutput

_MAX_TOKENS = 256
_LABEL_LENGTH = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "headrace generate [OPTIONS] [PROMPT ...]"
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to answer or continue; - is standard input")
    parser.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 file that is one prompt; - is standard input")
    parser.add_argument(
        "--prompt-token-ids", type=parse_token_ids, metavar="IDS", help="a prompt as token ids, such as 1,2,3"
    )
    style = parser.add_mutually_exclusive_group()
    style.add_argument(
        "--chat",
        dest="is_chat",
        action="store_true",
        default=None,
        help="send each prompt as a user message through the model's chat template (default where it has one)",
    )
    style.add_argument(
        "--raw", dest="is_chat", action="store_false", help="continue the bare text (default without a chat template)"
    )
    parser.add_argument("--n", type=int, metavar="N", help="independent outputs for each prompt (default: 1)")
    parser.add_argument("--logprobs", type=int, metavar="N", help="log probabilities of N likely tokens; needs --json")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write what every rank did and when, for ui.perfetto.dev",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per output, and nothing else")
    parser.add_argument("--quiet", action="store_true", help="print no figures after the text")
    add_sampling_options(parser, max_tokens=_MAX_TOKENS)
    add_form_options(parser)
    add_model_options(parser, with_ranks=True)


def run(args: argparse.Namespace) -> int:
    prompts, changes = _read_prompts(args), sampling_changes(args) | form_changes(args)
    if args.logprobs is not None and not args.json:
        raise ConfigError("--logprobs are only shown with --json; add it, or leave --logprobs out")
    llm = make_llm(
        args,
        show_progress=is_watched() and not args.json and not args.quiet,
        require_tokenizer=args.prompt_token_ids is None,
    )
    params = llm.default_sampling_params(**changes)
    if args.trace is not None:
        args.trace.touch()  # not writable is better said now than after all the work
        llm.engine.model.executor.start_trace()
    if args.json:
        results = _complete(llm, prompts, params, args)
        _print_json(results)
    elif len(prompts) == 1 and params.n == 1 and llm.engine.model.tokenizer is not None:
        results = [_stream(llm, prompts[0], params, args)]
    else:
        results = _complete(llm, prompts, params, args)
        _print_labelled(results)
    if args.trace is not None:
        from headrace.engine.trace import write_trace

        write_trace(llm.engine.model.executor.take_traces(), args.trace)
    remark = cut_remark(results, params.max_tokens, llm.engine.model.plan.max_model_len)
    if remark is not None:
        note(remark)
    if not args.json and not args.quiet:
        for line in summary(results):
            note(line)
    _raise_first_error(results)
    return 0


def _read_prompts(args: argparse.Namespace) -> "list[Prompt]":
    """What to complete, in the order given.

    Raises:
        ConfigError: none or too many sources, or a prompt that cannot be used.
    """
    sources = [args.prompts, args.prompt_file, args.prompt_token_ids]
    num_sources = sum(source not in ([], None) for source in sources)
    if num_sources > 1:
        raise ConfigError("prompts come from arguments, --prompt-file or --prompt-token-ids; give one of them")
    if args.prompt_token_ids is not None:
        if args.is_chat:
            raise ConfigError("--chat needs text; --prompt-token-ids are used as they are")
        return [{"prompt_token_ids": args.prompt_token_ids}]
    if args.prompt_file is not None:
        return [read_file(args.prompt_file)]
    if not args.prompts and sys.stdin.isatty():
        raise ConfigError("no prompt; give one as an argument, with --prompt-file, or through a pipe")
    return [read_file(p) if p == "-" else check_text(p, "the prompt") for p in args.prompts or ["-"]]


def _is_chat(llm: "LLM", args: argparse.Namespace) -> bool:
    if args.prompt_token_ids is not None:
        return False
    return llm.has_chat_template if args.is_chat is None else bool(args.is_chat)


def _message(prompt: "Prompt") -> "Messages":
    return [{"role": "user", "content": prompt}]


def _complete(
    llm: "LLM", prompts: "Sequence[Prompt]", params: "SamplingParams", args: argparse.Namespace
) -> "list[RequestOutput]":
    if _is_chat(llm, args):
        return llm.chat([_message(prompt) for prompt in prompts], params)
    return llm.generate(prompts, params)


def _stream(llm: "LLM", prompt: "Prompt", params: "SamplingParams", args: argparse.Namespace) -> "RequestOutput":
    open_stream = llm.stream_chat(_message(prompt), params) if _is_chat(llm, args) else llm.stream(prompt, params)
    with open_stream as stream:
        for chunk in stream:
            if chunk.text:
                print(chunk.text, end="", flush=True)
    print(flush=True)
    assert stream.output is not None
    return stream.output


def _print_json(results: "Sequence[RequestOutput]") -> None:
    for index, result in enumerate(results):
        for row in to_json(index, result):
            print(json.dumps(row, allow_nan=False))


def _print_labelled(results: "Sequence[RequestOutput]") -> None:
    num_texts = sum(len(result.outputs) for result in results)
    for index, result in enumerate(results, start=1):
        for output in result.outputs:
            if num_texts > 1:
                print(bold(_label(index, result, output), sys.stdout))
            print(_shown(result, output), end="\n\n" if num_texts > 1 else "\n", flush=True)


def _label(index: int, result: "RequestOutput", output: "CompletionOutput") -> str:
    return f"=== prompt {index}, output {output.index + 1} of {len(result.outputs)} ==="


def _shown(result: "RequestOutput", output: "CompletionOutput") -> str:
    """The text; a model without a tokenizer has none, and its tokens are all there is to show."""
    return output.text if result.prompt is not None or output.text else ",".join(map(str, output.token_ids))


def _raise_first_error(results: "Sequence[RequestOutput]") -> None:
    for index, result in enumerate(results, start=1):
        for output in result.outputs:
            if output.error is not None:
                raise RequestError(f"prompt {index}: {output.error}")
