"""The README is executed: its Python blocks run, its commands parse, its files and links exist."""

import json
import re
import shlex
import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from headrace.cli.main import COMMANDS, main, split_command
from headrace.cli.parser import Parser
from tests.serving import running_server

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


def test_python_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    [_, block] = blocks("python")
    exec(compile(block, "README.md", "exec"), {})
    assert "Pacific" in capsys.readouterr().out


def test_clients_are_answered(capsys: pytest.CaptureFixture[str]) -> None:
    """The curl call and the openai client, as they stand there but for the port."""
    [block, _] = blocks("python")
    [call] = [block for block in blocks("bash") if block.startswith("curl ")]
    with running_server() as server:
        exec(compile(block.replace("http://127.0.0.1:8000", server.url), "README.md", "exec"), namespace := {})
        namespace["stream"].close()
        namespace["client"].close()
        assert "fox" in capsys.readouterr().out
        if shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        call = call.replace("http://127.0.0.1:8000", server.url).replace("curl ", "curl --silent ", 1)
        answer = subprocess.run(["bash", "-c", call], capture_output=True, check=True)
    assert "Pacific" in json.loads(answer.stdout)["choices"][0]["message"]["content"]


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("headrace ")])
def test_command_is_understood(command: str) -> None:
    """Parsed as the command line does it, without being run."""
    name, argv = split_command(shlex.split(command)[1:])
    module_name, summary = COMMANDS[name]
    parser = Parser(prog=f"headrace {name}", summary=summary)
    import_module(module_name).add_arguments(parser)
    assert parser.parse(argv) is not None


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith(("headrace generate", "headrace info"))])
def test_command_runs(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out.strip()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [command.split()[1] for command in commands() if command.startswith("make ")]
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", README):
        path, _, anchor = target.partition("#")
        if path and not path.endswith(".md"):
            assert (ROOT / path).exists()
            continue
        text = (ROOT / path).read_text(encoding="utf-8") if path else README
        headings = {
            re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)
        }
        assert not anchor or anchor in headings, f"{target} leads to no heading"
