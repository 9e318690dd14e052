"""The command line: what it prints, what it refuses, how it ends. Mostly in process: a process costs seconds."""

import argparse
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

import headrace
from headrace.cli import environment, thread_count
from headrace.cli.conversation import Conversation
from headrace.cli.info import _kernels_text
from headrace.cli.interrupt import deferred_interrupt
from headrace.cli.main import COMMANDS, main
from headrace.cli.option_values import parse_bytes
from headrace.cli.terminal import aligned, format_bytes, format_ms, has_color
from headrace.config import ParallelConfig
from headrace.engine import devices
from headrace.engine.devices import Gpu, GpuFacts
from headrace.machine import CpuLimits

HEADRACE = [sys.executable, "-m", "headrace"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def llm(model):
    return headrace.LLM(model)


@pytest.fixture
def run(capsys):
    """Run a command line; returns its exit code, output and error output."""

    def call(*argv):
        code = main([str(arg) for arg in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def refused(run):
    """Run a command line that must end with exit code 2 and one line; returns the line."""

    def call(*argv):
        code, out, err = run(*argv)
        assert (code, out) == (2, "")
        assert err.startswith("headrace: error: ")
        assert err.count("\n") == 1
        return err

    return call


@pytest.fixture
def stdin(monkeypatch):
    def give(data):
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(data if isinstance(data, bytes) else data.encode())))

    return give


class TestMain:
    def test_help_of_every_command_answers_without_torch(self):
        """Importing torch takes seconds; nobody waits that long to read help or an error."""
        mistakes = [["generate", "--nope"], ["generate", "x", "--model", "/no/such/folder"]]
        calls = [["--help"], ["--version"], *mistakes, *([*name.split(), "--help"] for name in COMMANDS)]
        script = (
            "import sys; from headrace.cli.main import main\n"
            f"codes = [main(argv) for argv in {calls!r}]\n"
            "assert not {'torch', 'rich', 'tokenizers', 'transformers'} & set(sys.modules), set(sys.modules)\n"
            "print(codes)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == str([0, 0, 2, 2] + [0] * len(COMMANDS))

    def test_help_lists_every_command(self, run):
        code, out, _ = run("--help")
        assert code == 0
        assert all(f"  {name} " in out for name in COMMANDS)

    def test_help_of_a_default_names_what_else_there_is(self, run):
        _, out, _ = run("bench", "--help")
        assert out.startswith("usage: headrace bench model ")
        assert all(f"headrace {name} " in out for name in COMMANDS if name.startswith("bench "))
        assert "others:" not in run("bench", "kernels", "--help")[1]

    def test_version(self, run):
        assert run("--version") == (0, f"headrace {headrace.__version__}\n", "")

    def test_no_command_shows_help_as_an_error(self, run):
        code, out, err = run()
        assert (code, out) == (2, "")
        assert "commands:" in err

    @pytest.mark.parametrize(
        ("argv", "hint"),
        [
            (["genrate"], "did you mean 'generate'?"),
            (["--versoin"], "did you mean '--version'?"),
            (["generate", "--temprature", "1", "hi"], "did you mean '--temperature'?"),
            (["generate", "--temprature=1", "hi"], "did you mean '--temperature'?"),
            (["chat", "hello"], "unexpected argument 'hello'"),
            (["benhc"], "did you mean 'bench'?"),
            (["bench", "modle"], "did you mean 'bench model'?"),
            (["bench", "nonsense"], "known: bench ablation, bench kernels, bench model, bench quality, bench serve"),
            (["generate", "--max", "5", "hi"], "unknown option '--max'"),
        ],
    )
    def test_unknown_names_are_refused_with_a_hint(self, refused, argv, hint):
        assert hint in refused(*argv)

    def test_module_runs_as_a_program(self):
        done = subprocess.run([*HEADRACE, "nope"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("headrace: error: unknown command 'nope'")

    def test_a_full_disk_is_one_line(self):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run([*HEADRACE, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert (done.returncode, done.stderr) == (2, "headrace: error: No space left on device\n")

    def test_a_reader_that_has_left_is_no_error(self):
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as pipe:
            done = subprocess.run([*HEADRACE, "--help"], stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
        assert (done.returncode, done.stderr) == (141, "")

    def test_closed_streams_are_empty_ones(self):
        command = f"{sys.executable} -m headrace generate <&-; {sys.executable} -m headrace --help >&-"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr == "headrace: error: standard input is empty; give at least one word to go on from\n"

    def test_interrupt_is_quiet(self, run, monkeypatch):
        monkeypatch.setattr("headrace.cli.info.run", _raiser(KeyboardInterrupt()))
        assert run("info") == (130, "", "")

    def test_errors_of_several_lines_become_one(self, refused, monkeypatch):
        monkeypatch.setattr("headrace.cli.info.run", _raiser(OSError("no\n   such\nluck")))
        assert refused("info") == "headrace: error: no such luck\n"

    def test_unexpected_exceptions_keep_their_traceback(self, monkeypatch):
        monkeypatch.setattr("headrace.cli.info.run", _raiser(ZeroDivisionError("a bug")))
        with pytest.raises(ZeroDivisionError, match="a bug"):
            main(["info"])


class TestOptions:
    @pytest.mark.parametrize(
        ("text", "num_bytes"),
        [
            ("1000", 1000),
            ("512MiB", 512 * 2**20),
            ("2GiB", 2 * 2**30),
            ("2 gib", 2 * 2**30),
            ("1.5GB", 1_500_000_000),
            ("3KB", 3000),
            ("7B", 7),
        ],
    )
    def test_sizes(self, text, num_bytes):
        assert parse_bytes(text) == num_bytes

    @pytest.mark.parametrize("text", ["", "x", "-1", "1G", "1.5.2GB", "1e9", "nan", "2GiBs", "GB"])
    def test_sizes_that_are_none(self, text):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a size; write 512MiB"):
            parse_bytes(text)

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            (["--temperature", "-1"], "temperature is -1.0; allowed"),
            (["--temperature", "hot"], "invalid float value: 'hot'"),
            (["--top-p", "1.5"], "top_p is 1.5"),
            (["--max-tokens", "0"], "max_tokens is 0"),
            (["--max-tokens", "many"], "neither a number of tokens nor 'none'"),
            (["--min-tokens", "300"], "at most max_tokens, which is 256"),
            (["--logit-bias", "5"], "'5' is not ID=BIAS"),
            (["--logit-bias", "5=200"], "logit_bias of token 5 is 200.0"),
            (["--kv-cache-bytes", "lots"], "'lots' is not a size"),
            (["--kv-cache-bytes", "0"], "kv_cache_bytes is 0"),
            (["--threads", "0"], "num_threads is 0"),
            (["--max-num-seqs", "64", "--max-num-batched-tokens", "32"], "is below max_num_seqs"),
            (["--dtype", "float16"], "invalid choice: 'float16'"),
            (["--logprobs", "2"], "--json"),
            (["--raw", "--chat"], "not allowed with argument"),
            (["--regex", "a", "--choice", "b"], "not allowed with argument"),
            (["--choice", ""], "a string of choice of structured_outputs is ''"),
            (["--json-schema", "{"], "json of structured_outputs is not a JSON schema"),
            (["--json-schema", "/no/such/schema"], "cannot read '/no/such/schema'"),
            (["--grammar", "/no/such/grammar"], "cannot read '/no/such/grammar'"),
        ],
    )
    def test_bad_values_are_refused_before_a_model_is_loaded(self, refused, option, message):
        assert message in refused("generate", "hi", "--model", "/no/such/model", *option)

    def test_a_missing_model_is_one_line(self, refused):
        assert "'/no/such/model' does not exist" in refused("generate", "hi", "--model", "/no/such/model")

    def test_settings_reach_the_engine(self, run, model):
        code, out, _ = run("info", "--json", "--model", model, "--kv-cache-bytes", "1MB", "--max-model-len", "100")
        assert code == 0
        found = json.loads(out)["model"]
        assert found["max_model_len"] == 100
        assert found["kv_cache_bytes"] <= 1_000_000


class TestThreads:
    @pytest.fixture(autouse=True)
    def _two_cpus(self, monkeypatch):
        for module in (thread_count, environment):
            monkeypatch.setattr(module, "cpu_limits", lambda: CpuLimits(affinity=2, quota=None))

    @pytest.mark.parametrize(
        "command", [["generate", "hi", "--max-tokens", "1", "--json"], ["volume", "--measure", "--output", "1"]]
    )
    def test_more_than_there_are_cpus_are_remarked_on_once(self, run, model, command):
        code, _, err = run(*command, "--model", model, "--threads", 3)
        assert code == 0
        assert err.count("--threads 3 is slower than 2: this process may use 2 CPUs") == err.count("\n") == 1
        assert run(*command, "--model", model, "--threads", 2)[2] == ""

    def test_info_says_it_in_its_reason(self, run, model):
        code, out, err = run("info", "--json", "--model", model, "--threads", 3)
        assert (code, err) == (0, "")
        assert json.loads(out)["machine"]["threads_reason"].startswith("asked for by --threads, and slower than 2: ")

    def test_ranks_share_the_cpus_of_their_host(self, capsys, monkeypatch):
        thread_count.remark_on_threads(2, ParallelConfig(tensor_parallel_size=2))
        assert "--threads 2 is slower than 1: 2 ranks together may use 2 CPUs" in capsys.readouterr().err
        thread_count.remark_on_threads(1, ParallelConfig(tensor_parallel_size=4))
        # Launched ranks may be on hosts of their own, each with CPUs of its own.
        monkeypatch.setenv("PMI_RANK", "0")
        monkeypatch.setenv("PMI_SIZE", "2")
        thread_count.remark_on_threads(2, ParallelConfig(tensor_parallel_size=2))
        assert capsys.readouterr().err == ""


class TestGenerate:
    def test_streams_the_answer_of_the_chat_template(self, run, model, llm):
        params = llm.default_sampling_params(max_tokens=12)
        expected = llm.chat([{"role": "user", "content": "hello"}], params)[0].outputs[0].text
        code, out, err = run("generate", "hello", "--model", model, "--max-tokens", 12)
        assert (code, out) == (0, expected + "\n")
        assert "12 generated tokens; time to first token" in err
        assert "ms per output token" in err

    def test_raw_continues_the_text(self, run, model, llm):
        expected = llm.generate("hello", llm.default_sampling_params(max_tokens=8))[0].outputs[0].text
        assert run("generate", "hello", "--raw", "--quiet", "--model", model, "--max-tokens", 8) == (
            0,
            expected + "\n",
            "",
        )

    def test_an_output_has_the_form_asked_for(self, run, model, tmp_path):
        schema = {
            "type": "object",
            "properties": {"a": {"enum": [7]}},
            "required": ["a"],
            "additionalProperties": False,
        }
        (tmp_path / "schema.json").write_text(json.dumps(schema))
        (tmp_path / "grammar.lark").write_text('start: "x" "y"~2')
        for option, allowed in (
            (["--json-schema", json.dumps(schema)], {'{"a":7}', '{"a": 7}'}),
            (["--json-schema", tmp_path / "schema.json"], {'{"a":7}', '{"a": 7}'}),
            (["--regex", "[ab]c"], {"ac", "bc"}),
            (["--choice", "yes", "--choice", "no"], {"yes", "no"}),
            (["--grammar", tmp_path / "grammar.lark"], {"xyy"}),
        ):
            code, out, err = run("generate", "hello", "--quiet", "--model", model, *option)
            assert (code, err) == (0, "")
            assert out.removesuffix("\n") in allowed
        code, out, _ = run("generate", "hello", "--quiet", "--model", model, "--json-object", "--max-tokens", 5)
        assert out.startswith("{")

    def test_a_form_that_cannot_be_had_is_one_line(self, refused, model):
        assert "'not'" in refused("generate", "hello", "--model", model, "--json-schema", '{"not": {}}')

    def test_json_has_one_object_per_output_and_nothing_else(self, run, model):
        code, out, err = run(
            "generate", "one", "two", "--n", 2, "--json", "--logprobs", 1, "--max-tokens", 3, "--model", model
        )
        rows = [json.loads(line) for line in out.splitlines()]
        assert (code, err, len(rows)) == (0, "", 4)
        assert [(row["prompt_index"], row["output_index"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        first = rows[0]
        assert len(first["token_ids"]) == len(first["logprobs"]) == 3
        assert first["finish_reason"] == "length"
        assert first["logprobs"][0].keys() == {"token_id", "token", "logprob", "rank", "top"}
        assert first["metrics"]["num_completion_tokens"] == 6
        assert first["metrics"]["ttft_ms"] > 0

    @pytest.mark.parametrize("option", ["--json", "--quiet"])
    def test_an_output_that_the_models_length_cuts_is_remarked_on(self, run, model, option):
        """--max-tokens beyond what the model's length leaves was cut without a word, where the server refuses it."""
        call = ("generate", "--prompt-token-ids", "5,6,7", "--ignore-eos", "--max-model-len", 20, "--model", model)
        code, out, err = run(*call, option, "--max-tokens", 18)
        assert code == 0
        assert err == "--max-tokens is 18, but the model's length of 20 leaves 17 after a prompt of 3 tokens\n"
        if option == "--json":
            found = json.loads(out)
            assert (len(found["token_ids"]), found["finish_reason"]) == (17, "length")
        for max_tokens in (17, "none"):
            assert run(*call, option, "--max-tokens", max_tokens)[2] == ""

    def test_one_remark_is_of_all_prompts_that_were_cut(self, run, model, llm):
        prompts = ["a", "b c d e f", "a"]
        room = [40 - len(llm.engine.model.tokenizer.encode(prompt)) for prompt in prompts]
        call = ("generate", *prompts, "--raw", "--ignore-eos", "--quiet", "--max-model-len", 40, "--model", model)
        for max_tokens, left in ((41, f"{room[1]} to {room[0]} after 3"), (room[1] + 1, f"{room[1]} after 1")):
            _, _, err = run(*call, "--max-tokens", max_tokens)
            remark = f"--max-tokens is {max_tokens}, but the model's length of 40 leaves {left} of 3 prompts\n"
            assert err == remark

    def test_an_output_that_ends_before_is_not_cut(self, run, model):
        call = ("generate", "hello", "--choice", "yes", "--quiet", "--max-model-len", 100, "--model", model)
        assert run(*call, "--max-tokens", 1000) == (0, "yes\n", "")

    def test_several_outputs_are_labelled(self, run, model):
        code, out, err = run("generate", "one", "two", "--max-tokens", 2, "--model", model)
        assert code == 0
        assert out.count("=== prompt ") == 2
        assert "=== prompt 2, output 1 of 1 ===" in out
        assert err.splitlines()[-1].startswith("all ")

    def test_seed_repeats_a_text(self, run, model):
        call = ("generate", "hi", "--model", model, "--seed", 3, "--temperature", 1, "--max-tokens", 8, "--quiet")
        assert run(*call) == run(*call)

    def test_token_ids_need_no_tokenizer(self, run, refused, tmp_path):
        folder = write_tiny_model(tmp_path / "bare", with_tokenizer=False)
        code, out, _ = run("generate", "--prompt-token-ids", "5,6,7", "--max-tokens", 3, "--model", folder)
        assert code == 0
        assert len(out.strip().split(",")) == 3
        assert "copy the tokenizer files" in refused("generate", "hi", "--model", folder)

    def test_prompts_come_from_files_and_pipes(self, run, model, tmp_path, stdin):
        file = tmp_path / "prompt.txt"
        file.write_bytes("\ufeffhello wörld\n".encode())
        call = ("--raw", "--json", "--max-tokens", 1, "--model", model)
        outputs = [run("generate", "--prompt-file", file, *call)]
        for argv in (["generate"], ["generate", "-"], ["generate", "--prompt-file", "-"]):
            stdin("hello wörld\n")
            outputs.append(run(*argv, *call))
        assert [json.loads(out)["prompt"] for _, out, _ in outputs] == ["hello wörld"] * 4

    @pytest.mark.parametrize(
        ("data", "message"),
        [(b"", "is empty"), (b" \n", "is empty"), (b"ab\xff", "not UTF-8 text (byte 2)"), (None, "cannot read")],
    )
    def test_bad_prompt_files(self, refused, tmp_path, data, message):
        file = tmp_path / "prompt.txt"
        if data is not None:
            file.write_bytes(data)
        assert message in refused("generate", "--prompt-file", file)

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            ([""], "the prompt is empty"),
            (["ab\udcff"], "the prompt is not UTF-8"),
            (["hi", "--prompt-file", "x"], "give one of them"),
            (["--prompt-token-ids", "1,x"], "is not a list of token ids"),
            (["--prompt-token-ids", "1,2", "--chat"], "--chat needs text"),
        ],
    )
    def test_bad_prompts(self, refused, argv, message):
        assert message in refused("generate", *argv)

    def test_a_folder_is_no_prompt_file(self, refused, tmp_path):
        assert "Is a directory" in refused("generate", "--prompt-file", tmp_path)

    def test_token_ids_outside_the_vocabulary(self, refused, model):
        assert "prompt token 99999" in refused("generate", "--prompt-token-ids", "99999", "--model", model)

    def test_chat_without_a_template_is_refused(self, refused, tmp_path):
        folder = write_tiny_model(tmp_path / "base", chat_template=None)
        assert "no chat template" in refused("generate", "hi", "--chat", "--model", folder)


class TestChat:
    def test_a_model_without_a_template_is_refused_before_it_is_loaded(self, refused, model, tmp_path, monkeypatch):
        folder = shutil.copytree(model, tmp_path / "plain")
        config = folder / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": None}))
        monkeypatch.setattr("headrace.LLM", None)
        assert "has no chat template; complete plain text with `headrace generate --raw`" in refused(
            "chat", "--model", folder
        )

    def test_answers_each_line_of_a_pipe(self, run, model, llm, stdin):
        params = llm.default_sampling_params(max_tokens=4)
        first = llm.chat([{"role": "user", "content": "hello"}], params)[0].outputs[0].text
        messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first}]
        second = llm.chat([*messages, {"role": "user", "content": "a\nb"}], params)[0].outputs[0].text
        stdin("hello\n\na\\\nb\n")
        assert run("chat", "--model", model, "--max-tokens", 4) == (0, f"{first}\n{second}\n", "")

    def test_commands(self, run, model, stdin):
        stdin("hello\n/stats\n/reset\n/stats\n/help\n/rest\n/exit\nnever read\n")
        code, out, err = run("chat", "--model", model, "--max-tokens", 2)
        assert code == 0
        assert out.count("\n") >= 1
        assert "turns: 1;" in err
        assert "turns: 0;" in err
        assert "/exit   leave" in err
        assert "unknown command '/rest'; did you mean '/reset'?" in err
        assert "never" not in out

    def test_a_bad_request_ends_one_message_only(self, run, model, stdin):
        stdin(b"x " * 300 + b"\nab\xff\nhello\n/stats\n")
        code, out, err = run("chat", "--model", model, "--max-tokens", 2, "--max-model-len", 100)
        assert code == 0
        assert "error: the prompt has" in err
        assert "error: that line is not UTF-8" in err
        assert "turns: 1;" in err
        assert out.strip()

    def test_oldest_turns_make_room(self, run, model, stdin):
        stdin("hello there hello there\n" * 6 + "/stats\n")
        code, _, err = run("chat", "--system", "be brief", "--model", model, "--max-tokens", 4, "--max-model-len", 120)
        assert code == 0
        assert "dropped the oldest turn: the conversation outgrew 120 tokens" in err
        assert "error" not in err

    def test_an_answer_that_the_models_length_cuts_is_remarked_on(self, run, model, stdin):
        stdin("hello\n")
        _, _, err = run("chat", "--ignore-eos", "--model", model, "--max-tokens", 90, "--max-model-len", 100)
        assert re.fullmatch(r"--max-tokens is 90, but the model's length of 100 leaves \d+ after a prompt of .*\n", err)

    def test_a_model_without_a_template_is_refused(self, refused, tmp_path, stdin):
        stdin("hello\n")
        folder = write_tiny_model(tmp_path / "base", chat_template=None)
        assert "no chat template" in refused("chat", "--model", folder)

    def test_a_system_message_that_the_template_refuses_is_said_at_once(self, refused, tmp_path, stdin):
        stdin("hello\n")
        template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        folder = write_tiny_model(tmp_path / "strict", chat_template=template)
        assert "no system role" in refused("chat", "--system", "be brief", "--model", folder)

    def test_ctrl_c_stops_the_answer_and_leaves_at_the_prompt(self, model):
        """On a real terminal: the program survives the first Ctrl-C and keeps what it had said."""
        with _Terminal([*HEADRACE, "chat", "--model", model, "--ignore-eos", "--seed", "1"]) as terminal:
            terminal.wait_for(">>> ")
            terminal.type("hello\n")
            terminal.wait_for("hello\r\n")
            terminal.wait_for_more()
            terminal.interrupt()
            terminal.wait_for("stopped")
            terminal.wait_for(">>> ")
            terminal.type("/stats\n")
            terminal.wait_for("turns: 1;")
            terminal.wait_for(">>> ")
            assert terminal.interrupt_until_exit() == 0
            assert "Traceback" not in terminal.seen


class TestConversation:
    def test_keeps_the_system_message_and_the_last_question(self):
        conversation = Conversation("rules")
        for i in range(3):
            conversation.ask(f"q{i}")
            conversation.answer(f"a{i}")
        conversation.ask("q3")
        assert conversation.drop_oldest(0, len) == 3
        assert [m["content"] for m in conversation.messages] == ["rules", "q3"]

    def test_drops_no_more_than_needed(self):
        conversation = Conversation()
        for i in range(3):
            conversation.ask(f"q{i}")
            conversation.answer(f"a{i}")
        conversation.ask("q3")
        assert conversation.drop_oldest(5, len) == 1
        assert [m["content"] for m in conversation.messages] == ["q1", "a1", "q2", "a2", "q3"]
        assert conversation.drop_oldest(5, len) == 0

    def test_take_back_and_reset(self):
        conversation = Conversation("rules")
        conversation.ask("q")
        assert conversation.num_turns == 1
        conversation.take_back()
        assert conversation.num_turns == 0
        conversation.ask("q")
        conversation.answer("a")
        conversation.reset()
        assert conversation.messages == [{"role": "system", "content": "rules"}]


class TestInterrupt:
    def test_the_first_is_a_wish_and_the_second_an_order(self):
        before = signal.getsignal(signal.SIGINT)
        with deferred_interrupt() as interrupt:
            assert not interrupt.was_requested
            signal.raise_signal(signal.SIGINT)
            assert interrupt.was_requested
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before


class TestInfo:
    def test_describes_machine_and_model(self, run, model):
        code, out, _ = run("info", "--json", "--model", model, "--threads", 1)
        found = json.loads(out)
        assert code == 0
        assert found["versions"]["headrace"] == headrace.__version__
        assert found["machine"]["num_threads"] == 1
        assert found["machine"]["threads_reason"] == "asked for by --threads"
        assert {"op", "implementation", "reason"} == found["kernels"][0].keys()
        assert found["model"]["architecture"] == "LlamaForCausalLM"
        assert found["model"]["kv_per_token_bytes"] == 2 * 2 * 2 * 8 * 4

    def test_says_where_a_model_would_run_and_why(self, run, monkeypatch):
        gpu = Gpu(index=0, name="card", capability="9.0", memory_bytes=80 * 2**30, obstacle="it is too old")
        facts = GpuFacts(gpus=(gpu,), obstacle=None, versions={"cuda": "13.0", "hip": None, "triton": "3.6.0"})
        monkeypatch.setattr(devices, "gpu_facts", lambda: facts)
        found = json.loads(run("info", "--json")[1])
        assert found["device"]["device"] == "cpu"
        assert found["device"]["reason"] == "auto: GPU 0, card: it is too old"
        assert found["device"]["triton"] == "3.6.0"
        assert found["gpus"][0]["memory_bytes"] == 80 * 2**30
        text = run("info")[1]
        assert re.search(r"cuda:0 +card +80.0 GiB +9.0 +it is too old", text)
        assert json.loads(run("info", "--json", "--device", "cpu")[1])["device"]["reason"] == "asked for"

    @pytest.mark.parametrize("command", [["info"], ["generate", "x"], ["bench", "model"]])
    def test_a_device_that_is_not_there_is_refused(self, refused, monkeypatch, command):
        facts = GpuFacts(gpus=(), obstacle="torch sees no GPU", versions={})
        monkeypatch.setattr(devices, "gpu_facts", lambda: facts)
        assert "device is 'cuda', but torch sees no GPU; use --device cpu" in refused(*command, "--device", "cuda")
        assert "device is 'gpu'; allowed: auto, cpu, cuda" in refused(*command, "--device", "gpu")

    def test_what_it_foresees_is_what_an_engine_has(self, run, model, llm):
        _, out, _ = run("info", "--json", "--model", model)
        found = json.loads(out)["model"]
        assert found["weight_bytes"] == llm.engine.model.weight_bytes
        assert found["blocks"] == llm.engine.model.plan.num_blocks

    def test_ops_that_run_alike_share_a_line(self, run, monkeypatch):
        kernels = json.loads(run("info", "--json", "--device", "cpu")[1])["kernels"]
        reason = kernels[0]["reason"]
        assert {kernel["reason"] for kernel in kernels} == {reason}
        assert (
            f"kernels\n  all {len(kernels)} ops  {kernels[0]['implementation']}  {reason}\n"
            in run("info", "--device", "cpu")[1]
        )
        kernels[3]["reason"] = "asked for"
        shown = _kernels_text(kernels)
        assert shown == [kernels[3], kernels[0] | {"op": f"the other {len(kernels) - 1} ops"}]

    def test_text_is_plain_without_a_terminal(self, run):
        code, out, _ = run("info")
        assert code == 0
        assert "kernels" in out
        assert "\x1b" not in out


class TestTerminal:
    def test_color_needs_a_terminal_that_wants_it(self, monkeypatch):
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "xterm")
        assert has_color(_FakeTerminal())
        assert not has_color(StringIO())
        monkeypatch.setenv("NO_COLOR", "1")
        assert not has_color(_FakeTerminal())
        monkeypatch.delenv("NO_COLOR")
        monkeypatch.setenv("TERM", "dumb")
        assert not has_color(_FakeTerminal())

    def test_columns_are_aligned(self):
        assert aligned([("a", "10"), ("bbb", "2")]) == ["a    10", "bbb   2"]

    def test_numbers_have_units(self):
        assert (format_ms(None), format_ms(0.001234), format_ms(1.5)) == ("-", "1.23 ms", "1500 ms")
        assert (format_bytes(12), format_bytes(3 * 2**20)) == ("12 bytes", "3.0 MiB")


class _FakeTerminal(StringIO):
    def isatty(self):
        return True


def heed_interrupts():
    """A shell starts background jobs with Ctrl-C ignored, and what they start inherits that: undone for the child."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class _Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, command):
        self.seen = ""
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=heed_interrupts,  # noqa: PLW1509
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(slave)
        self._position = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def type(self, text):
        os.write(self._master, text.encode())

    def interrupt(self):
        os.kill(self.process.pid, signal.SIGINT)

    def interrupt_until_exit(self):
        """Readline misses a signal that comes between its printing the prompt and its waiting for a key.

        One that comes while the interpreter already ends would kill it, and on a busy machine that takes seconds.
        """
        for _ in range(3):
            time.sleep(0.2)
            self.interrupt()
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(timeout=12)
        return self.process.wait(timeout=5)

    def wait_for(self, text, timeout_s=45.0):
        """Read until `text` appears after what was waited for before."""
        deadline = time.monotonic() + timeout_s
        while text not in self.seen[self._position :]:
            self._read(deadline)
        self._position = self.seen.index(text, self._position) + len(text)

    def wait_for_more(self, timeout_s=45.0):
        deadline = time.monotonic() + timeout_s
        while len(self.seen) == self._position:
            self._read(deadline)

    def _read(self, deadline):
        ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"nothing more came after {self.seen[-500:]!r}"
        self.seen += os.read(self._master, 65536).decode(errors="replace")


def _raiser(error):
    def run(_):
        raise error

    return run
