"""`ash cache`: what ash.pyz has unpacked on this machine."""

from __future__ import annotations

import argparse

from ash import cache
from ash.cli.command import Command
from ash.cli.terminal import Terminal, size


def _row(found: cache.Unpacked) -> dict[str, object]:
    return {"path": found.path, "sizeBytes": found.size_bytes, "isCurrent": found.is_current, "isUsed": found.is_used}


def _list(_args: argparse.Namespace, terminal: Terminal) -> int:
    found = cache.describe()
    if terminal.is_json:
        terminal.data([_row(one) for one in found])
        return 0
    for one in found:
        marks = [word for word, is_true in (("current", one.is_current), ("in use", one.is_used)) if is_true]
        terminal.line(f"{size(one.size_bytes):>10}  {one.path}{f'  ({chr(44).join(marks)})' if marks else ''}")
    if not found:
        terminal.note("Nothing is unpacked.")
    return 0


def _prune(_args: argparse.Namespace, terminal: Terminal) -> int:
    removed = cache.prune()
    if terminal.is_json:
        terminal.data([_row(one) for one in removed])
        return 0
    for one in removed:
        terminal.line(f"Removed {one.path} ({size(one.size_bytes)})")
    if not removed:
        terminal.note("There was nothing to remove.")
    return 0


COMMANDS = {
    "list": Command("List what is unpacked.", _list, talks=False),
    "prune": Command("Remove what belongs to other versions and is not in use.", _prune, talks=False),
}
