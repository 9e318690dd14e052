"""`headrace chat`: a conversation in the terminal."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.cli.conversation import Conversation, Message
from headrace.cli.interrupt import deferred_interrupt
from headrace.cli.line_input import LineInput
from headrace.cli.model_options import add_model_options, make_llm
from headrace.cli.results import cut_remark, summary_line
from headrace.cli.sampling_options import add_sampling_options, sampling_changes
from headrace.cli.terminal import is_watched, note
from headrace.cli.text_input import check_text
from headrace.demo_model import DEMO
from headrace.errors import ConfigError, RequestError, nearest_name

if TYPE_CHECKING:
    from headrace.config import SamplingParams
    from headrace.engine.llm import LLM
    from headrace.engine.outputs import RequestOutput

_COMMANDS = {
    "/help": "show this text",
    "/reset": "forget the conversation, keep the system message",
    "/stats": "figures of the last answer and of the conversation",
    "/exit": "leave, as Ctrl-D does",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Type a message and Enter; a backslash at the end of a line continues it on the next.\n"
        f"Ctrl-C stops an answer, and leaves at the prompt. Commands: {', '.join(_COMMANDS)}.\n"
        "From a pipe, each line is a message."
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message that stays for the whole conversation")
    add_sampling_options(parser, max_tokens=None)
    add_model_options(parser, with_ranks=True)


def run(args: argparse.Namespace) -> int:
    changes = sampling_changes(args)
    system = None if args.system is None else check_text(args.system, "--system")
    _check_has_template(args.model)
    llm = make_llm(args, show_progress=is_watched())
    chat = Chat(llm, llm.default_sampling_params(**changes), Conversation(system))
    chat.check_template()
    lines = LineInput()
    if lines.is_interactive:
        note("Ctrl-D leaves, /help shows the commands.")
    try:
        while chat.handle_next(lines):
            pass
    except KeyboardInterrupt:
        # At the prompt this is a way to leave, not an accident.
        print()
    return 0


def _check_has_template(model: str | None) -> None:
    """Before minutes of loading. What comes from the hub is checked when it is here."""
    if model in (None, DEMO) or not Path(model).expanduser().is_dir():
        return
    # Its libraries take a tenth of a second to import, which --help would wait for.
    from headrace.tokenizer import ChatTemplate

    if not ChatTemplate.from_folder(Path(model).expanduser()).is_available:
        raise ConfigError(
            f"{model} has no chat template; complete plain text with `headrace generate --raw`, or put a "
            "chat_template.jinja into the folder"
        )


class Chat:
    """One conversation with one model: reads messages, streams answers to standard output."""

    def __init__(self, llm: "LLM", params: "SamplingParams", conversation: Conversation) -> None:
        self._llm, self._params, self._conversation = llm, params, conversation
        self._last: RequestOutput | None = None

    def check_template(self) -> None:
        """Try the template on a first message.

        Raises:
            RequestError: the model has no chat template, or it refuses the system message.
        """
        self._llm.chat_prompt([*self._conversation.messages, {"role": "user", "content": "Hello"}])

    def handle_next(self, lines: LineInput) -> bool:
        """Read and answer one message; false when there are no more."""
        try:
            text = lines.read()
            if text is None or text.strip() == "/exit":
                if text is None and lines.is_interactive:
                    print()
                return False
            if text.startswith("/") and len(text.split()) == 1:
                self._run_command(text.strip())
            elif text.strip():
                self._answer(text)
        except RequestError as error:
            note(f"error: {error}")
        return True

    def _run_command(self, name: str) -> None:
        match name:
            case "/help":
                for command, summary in _COMMANDS.items():
                    note(f"{command:<7} {summary}")
            case "/reset":
                self._conversation.reset()
                note("a new conversation")
            case "/stats":
                self._show_stats()
            case _:
                raise RequestError(f"unknown command '{name[:80]}'; {nearest_name(name[:80], _COMMANDS)}")

    def _answer(self, text: str) -> None:
        self._conversation.ask(text)
        try:
            self._make_room()
            output = self._stream()
        except RequestError:
            self._conversation.take_back()
            raise
        self._last = output
        answer = output.outputs[0]
        if answer.text or answer.finish_reason == "stop":
            self._conversation.answer(answer.text)
        else:
            self._conversation.take_back()
        if answer.error is not None:
            raise RequestError(answer.error)

    def _stream(self) -> "RequestOutput":
        """Print the answer as it comes; Ctrl-C ends it early and keeps what there is."""
        stream = self._llm.stream_chat(self._conversation.messages, self._params)
        with deferred_interrupt() as interrupt, stream:
            while not stream.is_finished and not interrupt.was_requested:
                print("".join(chunk.text for chunk in stream.advance()), end="", flush=True)
        print(flush=True)
        if interrupt.was_requested:
            note("stopped")
        assert stream.output is not None
        remark = cut_remark([stream.output], self._params.max_tokens, self._max_model_len)
        if remark is not None:
            note(remark)
        return stream.output

    def _make_room(self) -> None:
        num_dropped = self._conversation.drop_oldest(self._max_prompt_tokens, self._count_tokens)
        if num_dropped:
            turns = "turn" if num_dropped == 1 else f"{num_dropped} turns"
            note(f"dropped the oldest {turns}: the conversation outgrew {self._max_model_len} tokens")

    @property
    def _max_model_len(self) -> int:
        return self._llm.engine.model.plan.max_model_len

    @property
    def _max_prompt_tokens(self) -> int:
        """Leaves a quarter of the model's length for the answer, or what the answer may have if that is less."""
        reserve = max(1, self._max_model_len // 4)
        if self._params.max_tokens is not None:
            reserve = min(reserve, self._params.max_tokens)
        return self._max_model_len - reserve

    def _count_tokens(self, messages: Sequence[Message]) -> int:
        tokenizer = self._llm.engine.model.tokenizer
        assert tokenizer is not None, "a model with a chat template has a tokenizer"
        return len(tokenizer.encode(self._llm.chat_prompt(messages), add_special_tokens=False))

    def _show_stats(self) -> None:
        if self._last is not None:
            note(summary_line(self._last.metrics))
        num_tokens = self._count_tokens(self._conversation.messages) if self._conversation.num_turns else 0
        metrics = self._llm.engine.metrics()
        note(
            f"turns: {self._conversation.num_turns}; {num_tokens} of {self._max_model_len} tokens; "
            f"{metrics.prefix_hit_rate:.0%} of prompt tokens came from the cache"
        )
