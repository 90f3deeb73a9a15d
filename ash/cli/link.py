"""`ash link` and `ash unlink`: which server the commands talk to when nothing else says so."""

from __future__ import annotations

import argparse
import sys

from ash.cli import profile
from ash.cli.command import Command
from ash.cli.terminal import YELLOW, Terminal
from ash.errors import AshError


def _configure_link(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", nargs="?", help="address of the server; without it the present link is shown")
    parser.add_argument("--api-key", metavar="KEY", help="its API key; - reads it from standard input, so that it is in no shell history")


def _link(args: argparse.Namespace, terminal: Terminal) -> int:
    if args.url is None:
        return _show(terminal)
    from ash.client import AshClient

    key = sys.stdin.readline().strip() if args.api_key == "-" else args.api_key
    url = args.url.rstrip("/")
    client = AshClient(url, key, timeout=10)
    profile.link(url, key)
    try:
        client.list_agents()
    except AshError as error:
        terminal.note(f"The link is stored, but the server cannot be used yet: {error}", YELLOW)
    if terminal.is_json:
        terminal.data({"serverUrl": url, "hasKey": bool(key)})
    else:
        terminal.line(f"Linked to {url}; `ash unlink` goes back to this machine.")
    return 0


def _show(terminal: Terminal) -> int:
    url = profile.load().get("server_url")
    if terminal.is_json:
        terminal.data({"serverUrl": url, "hasKey": bool(profile.load().get("api_key"))})
    else:
        terminal.line(f"Linked to {url}" if url else f"Not linked; commands talk to {profile.DEFAULT_URL}")
    return 0


def _unlink(_args: argparse.Namespace, terminal: Terminal) -> int:
    url = profile.unlink()
    if terminal.is_json:
        terminal.data({"unlinked": url})
    else:
        terminal.line(f"No longer linked to {url}; commands talk to {profile.DEFAULT_URL}" if url else "There was no link.")
    return 0


COMMANDS = {
    "link": Command("Remember another server, and its key, for all commands.", _link, _configure_link, talks=False),
    "unlink": Command("Forget the linked server; talk to the one on this machine again.", _unlink, talks=False),
}
