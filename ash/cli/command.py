"""What a command is, and how its arguments are parsed. It prints only usage errors and help, as argparse does."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ash.cli.terminal import Terminal
from ash.errors import ConfigError


class UsageError(ConfigError):
    """A command was called in a way that argparse cannot see is wrong."""

    code = "usage"


class Command(NamedTuple):
    """One command. `talks` says that it talks to a server, and so takes its address and key."""

    help: str
    run: Callable[[argparse.Namespace, Terminal], int]
    configure: Callable[[argparse.ArgumentParser], None] | None = None
    talks: bool = True


def parse(command: Command, prog: str, arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command. Options may stand anywhere between the others. Exits with 2 when they do not fit."""
    parser = argparse.ArgumentParser(prog=prog, description=command.help, allow_abbrev=False)
    if command.configure is not None:
        command.configure(parser)
    common = parser.add_argument_group("common options")
    if command.talks:
        common.add_argument(
            "--server", metavar="URL", help="address of the server (ASH_SERVER_URL, else the linked one, else http://localhost:4100)"
        )
        common.add_argument("--api-key", metavar="KEY", help="key for the server (ASH_API_KEY, else the stored one)")
    common.add_argument("--json", action="store_true", help="output for programs")
    common.add_argument("--no-color", action="store_true", help="no colours (NO_COLOR)")
    before, separator, after = list(arguments), [], []
    if "--" in before:
        position = before.index("--")
        before, separator, after = before[:position], ["--"], before[position + 1 :]
    if not separator:
        return parser.parse_intermixed_args(before)
    # What follows `--` is taken literally; argparse would look for options in it a second time.
    marked = ["\0" + word for word in after]
    args = parser.parse_intermixed_args(before + marked)
    for name, value in vars(args).items():
        setattr(args, name, _unmark(value))
    return args


def _unmark(value: object) -> object:
    if isinstance(value, list):
        return [_unmark(item) for item in value]
    return value.removeprefix("\0") if isinstance(value, str) else value


def key_value(text: str) -> tuple[str, str]:
    """`KEY=VALUE` of an option; an argparse type."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"{text!r} must be KEY=VALUE")
    return name, value


def names(text: str) -> list[str]:
    """Names separated by commas; an argparse type."""
    return [name.strip() for name in text.split(",") if name.strip()]
