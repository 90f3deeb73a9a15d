"""`ash attack`: attacks a server that runs, from inside its own sandboxes and over HTTP, and says what held."""

from __future__ import annotations

import argparse
import json
import os
import signal
from types import FrameType
from typing import TYPE_CHECKING

from ash.cli import local, profile
from ash.cli.command import Command, UsageError, names
from ash.cli.terminal import DIM, GREEN, RED, YELLOW, Terminal
from ash.config import load_config
from ash.errors import ConfigError, Unauthorized

if TYPE_CHECKING:
    from ash.attack.report import Report, Result
    from ash.attack.scene import Target
    from ash.remote.server import Server

_COLORS = {"pass": GREEN, "fail": RED, "not applicable": DIM}


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only", metavar="NAME", type=names, action="extend", help="only probes with this id, or with this in it; repeatable"
    )
    parser.add_argument("--report", metavar="FILE", help="write the report there too: as Markdown if it ends in .md, else as JSON")
    parser.add_argument("--list", action="store_true", help="list the probes and what each attacks, and do nothing")
    parser.add_argument("--data-dir", help="data folder of the server, when it runs on this machine (ASH_DATA_DIR, else ~/.ash)")


def _attack(args: argparse.Namespace, terminal: Terminal) -> int:
    from ash.attack import campaign

    ids = _selected(args)
    if args.list:
        return _list(ids, terminal)
    target = _find_target(args)
    if not terminal.is_json:
        terminal.note(f"Attacking {target.server.url} with {len(ids)} probes", DIM)
    signal.signal(signal.SIGTERM, _interrupt)  # what was made on the server is then taken away again
    report = campaign.wage(target, ids, lambda result: _say_result(result, terminal))
    if args.report:
        _write(args.report, report)
    return _say_report(report, terminal)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _selected(args: argparse.Namespace) -> list[str]:
    from ash.attack.campaign import ATTACKS
    from ash.attack.report import select

    ids = [attack.id for attack in ATTACKS]
    try:
        return select(args.only, ids) if args.only else ids
    except ValueError as error:
        raise UsageError(f"there is no probe {error.args[0]!r}; `ash attack --list` shows them") from error


def _list(ids: list[str], terminal: Terminal) -> int:
    from ash.attack.campaign import explain

    rows = list(explain(ids))
    if terminal.is_json:
        terminal.data([{"id": id, "name": name, "layer": layer} for id, name, layer in rows])
    else:
        terminal.table(("ID", "ATTACKS"), [(id, layer) for id, _, layer in rows])
    return 0


def _find_target(args: argparse.Namespace) -> Target:
    """The server that commands talk to, or without one named the server of this machine's data folder."""
    from ash.attack.scene import Target

    config = load_config({"data_dir": args.data_dir})
    where, here = profile.address(args), local.find(config.data_dir)
    if args.data_dir and here is None:
        raise ConfigError(f"no server runs on {config.data_dir}; start one with `ash start`, or give --server")
    is_here = here is not None and (
        profile.same(here.url, where.url) or (args.data_dir is not None and not args.server) or not where.is_explicit
    )
    url = here.url if here is not None and is_here else where.url
    server = _with_key(url, where)
    if here is None or not is_here:
        return Target(server, why_far="no server of this machine's data folder is meant: it runs elsewhere, or --data-dir says where")
    return Target(server, here.data_dir, here.pid, program=_program())


def _with_key(url: str, where: profile.Address) -> Server:
    """The server's address, with the key if it wants one: as every command does it."""
    from ash.remote import calls
    from ash.remote.connection import exchange
    from ash.remote.server import parse_server, with_stored_key
    from ash.remote.streams import explained

    stored = where.key if where.key_source == "config" else None
    server = parse_server(url, None if stored else where.key, 60.0, 60.0, None, stored)
    with explained(server):
        try:
            _ = exchange(server._replace(stored_key=None), calls.list_agents())
        except Unauthorized as refused:
            return with_stored_key(server, refused)
    return server


def _program() -> str:
    from ash import cache

    return cache.running_file() or os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def _say_result(result: Result, terminal: Terminal) -> None:
    if not terminal.is_json:
        why = f": {result.detail}" if result.detail else ""
        terminal.note(f"{result.verdict:<15}{result.name}{why}", _COLORS[result.verdict])


def _say_report(report: Report, terminal: Terminal) -> int:
    if terminal.is_json:
        terminal.data(report.to_json())
    else:
        for left in report.leftovers:
            terminal.note(f"Not taken away: {left}", YELLOW)
        terminal.line(f"{report.started_at}  {report.server['url']}  {report.summary}")
    return 0 if report.holds else 1


def _write(path: str, report: Report) -> None:
    text = report.to_markdown() if path.endswith(".md") else json.dumps(report.to_json(), indent=2) + "\n"
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"the report cannot be written to {path}: {error.strerror}") from error


COMMANDS = {
    "attack": Command("Attack a server that runs, from inside its own sandboxes and over HTTP, and say what held.", _attack, _configure)
}
