"""The `ash` command: finds the command that is meant, loads its module alone, and turns errors into exit codes.

0 done · 1 it failed · 2 it was called the wrong way · 130 interrupted. It imports nothing that a command does not need.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ash.cli.command import Command


class Entry(NamedTuple):
    """A command or a group of commands, as `ash --help` lists it. `module` is below `ash.cli`."""

    module: str
    help: str
    is_group: bool = False


COMMANDS = {
    "start": Entry("server", "start the server"),
    "stop": Entry("server", "stop the server that runs on this machine"),
    "status": Entry("server", "say whether the server runs, and what it does"),
    "logs": Entry("server", "show the log of a server started with --detach"),
    "deploy": Entry("deploy", "upload an agent folder"),
    "chat": Entry("chat", "talk to an agent"),
    "session": Entry("session", "create, message, inspect and change sessions", is_group=True),
    "agent": Entry("agent", "list, show and delete agents", is_group=True),
    "credential": Entry("credential", "store, list and delete secrets that agents use but cannot read", is_group=True),
    "health": Entry("health", "show what the server says of itself"),
    "link": Entry("link", "remember another server to talk to"),
    "unlink": Entry("link", "talk to the server on this machine again"),
    "config": Entry("settings", "show every setting as a start would use it, and where it comes from"),
    "policy": Entry("policy", "show the operator's policy, or check a policy file"),
    "offline-model": Entry("offline_model", "serve the built-in demo model on a port of its own"),
    "doctor": Entry("doctor", "measure what this machine can enforce, and say how to mend what it cannot"),
    "attack": Entry("attack", "attack a server that runs, and say what held"),
    "service": Entry("service", "install Ash as a system service, show it, uninstall it", is_group=True),
    "cache": Entry("cache", "list or prune what ash.pyz unpacked", is_group=True),
    "version": Entry("health", "show the version"),
}
_LEADING = {"--server": 1, "--api-key": 1, "--json": 0, "--no-color": 0}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to fail
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except SystemExit as exit:  # argparse's way to say usage error or help
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has left (`ash … | head`). What is still buffered must not fail again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(arguments: list[str]) -> int:
    leading, rest = _split_leading(arguments)
    if not rest:
        print(help_text(), end="", file=sys.stderr)  # noqa: T201
        return 2
    name, *rest = rest
    if name in ("-h", "--help", "help"):
        print(help_text(), end="")  # noqa: T201
        return 0
    if name in ("-V", "--version"):
        name = "version"
    if name not in COMMANDS:
        return _unknown(f"ash: there is no command {name!r}", name, list(COMMANDS), "ash --help")
    return _load(name, leading + rest)


def _split_leading(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Common options before the command, and the rest."""
    position = 0
    while position < len(arguments) and arguments[position].partition("=")[0] in _LEADING:
        word = arguments[position]
        position += 1 + (0 if "=" in word else _LEADING[word])
    return arguments[:position], arguments[position:]


def _load(name: str, arguments: list[str]) -> int:
    from importlib import import_module

    entry = COMMANDS[name]
    commands: dict[str, Command] = import_module(f"ash.cli.{entry.module}").COMMANDS
    if not entry.is_group:
        return _call(commands[name], f"ash {name}", arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        listing = "".join(f"  {word:<12} {command.help}\n" for word, command in commands.items())
        print(f"usage: ash {name} COMMAND …\n\n{listing}", end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    leading, rest = _split_leading(arguments)
    if not rest or rest[0] not in commands:
        return _unknown(f"ash {name}: there is no command {(rest or [''])[0]!r}", (rest or [""])[0], list(commands), f"ash {name} --help")
    return _call(commands[rest[0]], f"ash {name} {rest[0]}", leading + rest[1:])


def _call(command: Command, prog: str, arguments: list[str]) -> int:
    from ash.cli.command import parse
    from ash.cli.terminal import Terminal
    from ash.errors import AshError, ConfigError

    args = parse(command, prog, arguments)
    terminal = Terminal(is_json=args.json, no_color=args.no_color)
    try:
        return command.run(args, terminal)
    except AshError as error:
        from ash.cli.complaint import reworded

        terminal.error(*reworded(error, args))
        return 2 if isinstance(error, ConfigError) else 1


def _unknown(complaint: str, word: str, known: list[str], help_command: str) -> int:
    from difflib import get_close_matches

    near = get_close_matches(word, known, 1)
    print(f"{complaint}{f'; did you mean {near[0]!r}?' if near else ''} (see `{help_command}`)", file=sys.stderr)  # noqa: T201
    return 2


def help_text() -> str:
    listing = "".join(f"  {name:<14} {entry.help}\n" for name, entry in COMMANDS.items())
    return (
        "usage: ash COMMAND …\n\nTurns a folder into a production agent API.\n\n"
        f"{listing}\n"
        "`ash COMMAND --help` says more. Every command takes --json, and those that talk to a server take\n"
        "--server URL and --api-key KEY.\n\n"
        '  ash chat ./my-agent "Hello"      talk to a folder at once, without a running server\n'
    )


if __name__ == "__main__":
    sys.exit(main())
