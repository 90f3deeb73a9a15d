"""What a command is, and how its arguments are parsed. It prints only usage errors and help, as argparse does."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from ash.cli.terminal import Terminal
from ash.errors import ConfigError


class UsageError(ConfigError):
    """A command was called in a way that argparse cannot see is wrong."""

    code = "usage"


class Command(NamedTuple):
    """One command. `talks` says that it talks to a server, and so takes its address and key.

    `ends_literally`: its last argument takes all words from its first one on as they are, options too.
    """

    help: str
    run: Callable[[argparse.Namespace, Terminal], int]
    configure: Callable[[argparse.ArgumentParser], None] | None = None
    talks: bool = True
    ends_literally: bool = False


class _Parser(argparse.ArgumentParser):
    """Says in one line what does not fit; the usage of some commands fills a screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see: {self.prog} --help\n")


def parse(command: Command, prog: str, arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command. Options may stand anywhere between the others. Exits with 2 when they do not fit."""
    parser = _Parser(prog=prog, description=command.help, allow_abbrev=False)
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
    if command.ends_literally:
        return _parse_literal_end(parser, before, separator + after)
    if not separator:
        return parser.parse_intermixed_args(before)
    # What follows `--` is taken literally; argparse would look for options in it a second time.
    return _unmarked(parser.parse_intermixed_args(before + _marked(after)))


def _parse_literal_end(parser: argparse.ArgumentParser, before: list[str], after: list[str]) -> argparse.Namespace:
    """The last argument is one of argparse.PARSER, called `words`. A `--` among them is theirs, one before them is not."""
    args = _unmarked(parser.parse_args(before + _marked(after)))
    if args.words[0] == "--":
        del args.words[0]
    if not args.words:
        parser.error("the following arguments are required: command")
    return args


def _marked(words: list[str]) -> list[str]:
    return ["\0" + word for word in words]


def _unmarked(args: argparse.Namespace) -> argparse.Namespace:
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


def limit(text: str) -> tuple[str, float]:
    """`NAME=VALUE` of `--limit`; an argparse type. Which names there are the server knows."""
    name, value = key_value(text)
    try:
        number = float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {value!r} is not a number") from error
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r}: {value!r} is no limit")
    return name.replace("-", "_"), int(number) if number.is_integer() else number


def names(text: str) -> list[str]:
    """Names separated by commas; an argparse type."""
    return [name.strip() for name in text.split(",") if name.strip()]
