"""`ash health` and `ash version`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ash import __version__
from ash.cli import profile
from ash.cli.command import Command
from ash.cli.terminal import Terminal

if TYPE_CHECKING:
    from ash.client import Health


def describe(health: Health) -> Iterator[str]:
    """What a person wants to know of a server, line by line."""
    yield f"Version:          {health.version}"
    yield f"Uptime:           {health.uptime:g} s"
    yield f"Active sessions:  {health.active_sessions}"
    yield f"Active sandboxes: {health.active_sandboxes}"
    shown = [f"{health.pool[state]} {state}" for state in ("running", "waiting", "warm", "warming") if health.pool.get(state)]
    if health.pool:
        yield f"Pool:             {', '.join(shown) or 'empty'} (max {health.pool.get('maxCapacity', '?')})"
    if health.isolation:
        yield f"Isolation:        {health.isolation}"
    if health.model:
        yield f"Model:            {health.model.get('provider', '')} {health.model.get('model') or ''}".rstrip()
    for warning in health.warnings:
        yield f"Warning:          {warning}"


def _health(args: argparse.Namespace, terminal: Terminal) -> int:
    terminal.data(profile.client(args).health().raw)
    return 0


def _version(args: argparse.Namespace, terminal: Terminal) -> int:
    if args.json:
        terminal.data({"version": __version__, "python": sys.version.split()[0], "executable": sys.executable})
    else:
        terminal.line(f"ash {__version__}")
    return 0


COMMANDS = {
    "health": Command("Show what the server says of itself, as JSON.", _health),
    "version": Command("Show the version of this program.", _version, talks=False),
}
