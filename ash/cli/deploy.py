"""`ash deploy`: upload an agent folder. Variables for its tools come from `.env`, `.env.local` and -e; those files are not uploaded."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ash.cli import profile
from ash.cli.command import Command, key_value, limit
from ash.cli.terminal import DIM, YELLOW, Terminal
from ash.errors import InvalidRequest
from ash.models import RESERVED_VARIABLES

if TYPE_CHECKING:
    from ash.client import Agent, AshClient
    from ash.models import Json

_ENV_FILES = (".env", ".env.local")


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="the agent's folder, with a CLAUDE.md in it")
    parser.add_argument("--name", "-n", help="name of the agent (default: the folder's name)")
    add_env(parser, "a variable for the agent's tools; overrides .env.local, which overrides .env")
    add_limits(parser, "a limit of the agent's sessions, such as memory_mb=512; without one the agent keeps those it has")


def add_env(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--env", "-e", action="append", default=[], type=key_value, metavar="KEY=VALUE", help=f"{help} (may be repeated)")


def add_limits(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--limit", action="append", default=[], type=limit, metavar="NAME=VALUE", help=f"{help} (may be repeated)")


def _deploy(args: argparse.Namespace, terminal: Terminal) -> int:
    agent = deploy(profile.client(args), args.path, terminal, name=args.name, env=args.env, limits=args.limit)
    if terminal.is_json:
        terminal.data(agent.raw)
        return 0
    terminal.line(f'Deployed agent "{agent.name}" (v{agent.version})')
    if agent.env:
        terminal.line(f"  env: {', '.join(sorted(agent.env))}")
    return 0


def deploy(
    client: AshClient, path: str, terminal: Terminal, *,
    name: str | None = None, env: Iterable[tuple[str, str]] = (), limits: Iterable[tuple[str, float]] = (),
) -> Agent:  # fmt: skip
    """Upload `path` with its variables, showing progress."""
    from ash.client import agent_name

    wanted = name or agent_name(path)
    if name is None and wanted != os.path.basename(os.path.realpath(path)):
        terminal.note(f"Normalized agent name: {wanted}", DIM)
    variables = {**_without_reserved(_read_env_files(path, terminal), terminal), **dict(env)}

    def show(done: int, total: int) -> None:
        terminal.progress(f"Uploading {wanted}", done, total)

    agent = client.deploy_agent(wanted, path, env=variables or None, config=_config(limits), on_progress=show)
    terminal.clear_progress()
    ignored = agent.config.get("ignored")
    if isinstance(ignored, list) and ignored:
        terminal.note(f"Not used yet: {', '.join(map(str, ignored))}", YELLOW)
    return agent


def _config(limits: Iterable[tuple[str, float]]) -> Json | None:
    """What is sent as the agent's configuration; None keeps the one it has."""
    from ash.remote.records import camel

    return {"limits": given} if (given := {camel(name): value for name, value in limits}) else None


def _without_reserved(found: dict[str, str], terminal: Terminal) -> dict[str, str]:
    """An `.env` file often holds the model's key as well. It stays here: the server has its own, and no sandbox gets one."""
    left_out = sorted(name for name in found if name.upper().startswith(RESERVED_VARIABLES))
    if left_out:
        terminal.note(f"Not uploaded: {', '.join(left_out)}; set them where the server runs", DIM)
    return {name: value for name, value in found.items() if name not in left_out}


def _read_env_files(folder: str, terminal: Terminal) -> dict[str, str]:
    variables: dict[str, str] = {}
    for name in _ENV_FILES:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            found = read_env(path)
            variables.update(found)
            terminal.note(f"Loaded {len(found)} env var(s) from {name}", DIM)
    return variables


def read_env(path: str) -> dict[str, str]:
    """The variables of a `.env` file: KEY=VALUE lines, quotes and `export` allowed. Raises InvalidRequest with the line that is none."""
    variables: dict[str, str] = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            name, separator, value = text.removeprefix("export ").partition("=")
            if not separator or not name.strip().isidentifier():
                raise InvalidRequest(f"{path}, line {number}: not a KEY=VALUE line")
            variables[name.strip()] = _unquote(value.strip())
    return variables


def _unquote(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] == "'":
        return value[1:-1]
    if len(value) >= 2 and value[0] == value[-1] == '"':
        return value[1:-1].replace("\\n", "\n").replace('\\"', '"').replace("\\\\", "\\")
    return value.partition(" #")[0].rstrip()


COMMANDS = {"deploy": Command("Upload an agent folder as the newest version of an agent.", _deploy, _configure)}
