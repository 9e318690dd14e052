"""The README is executed: its Python block runs, its commands parse, its files and links exist."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from headrace.cli.main import COMMANDS, main, split_command
from headrace.cli.parser import Parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


def test_python_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    [block] = blocks("python")
    exec(compile(block, "README.md", "exec"), {})
    assert "Pacific" in capsys.readouterr().out


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
        text = (ROOT / path).read_text(encoding="utf-8") if path else README
        headings = {
            re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)
        }
        assert not anchor or anchor in headings, f"{target} leads to no heading"
