"""Options that prescribe an output's form."""

import argparse
from typing import Any

from headrace.cli.text_input import read_file
from headrace.config import StructuredOutputs


def add_form_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("form of the output", "one of these").add_mutually_exclusive_group()
    group.add_argument(
        "--json-schema", metavar="SCHEMA", help="JSON of this schema; a file, or the schema itself, such as '{}'"
    )
    group.add_argument("--json-object", action="store_true", help="a JSON object")
    group.add_argument("--regex", metavar="REGEX", help="text that matches as a whole")
    group.add_argument("--choice", action="append", metavar="TEXT", help="one of several texts; repeatable")
    group.add_argument("--grammar", metavar="FILE", help="text of this grammar (Lark as llguidance reads it, or GBNF)")


def form_changes(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling setting that was given, if one was.

    Raises:
        ConfigError: a file that cannot be read.
        RequestError: no form.
    """
    given: dict[str, Any] = {
        "json": _read_schema(args.json_schema),
        "json_object": args.json_object or None,
        "regex": args.regex,
        "choice": args.choice,
        "grammar": None if args.grammar is None else read_file(args.grammar),
    }
    form = {name: value for name, value in given.items() if value is not None}
    return {"structured_outputs": StructuredOutputs.from_mapping(form)} if form else {}


def _read_schema(given: str | None) -> str | None:
    """A schema begins with a brace, and files do not, or can be called ./{..."""
    if given is None or given.lstrip().startswith("{"):
        return given
    return read_file(given)
