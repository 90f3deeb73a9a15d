"""`ash config`: every setting as a start of the server would use it, with its source, and the server that commands talk to.

Secrets are masked.
"""

from __future__ import annotations

import argparse
from typing import Any

from ash.cli import profile
from ash.cli.command import Command
from ash.cli.terminal import Terminal
from ash.config import SETTINGS, Secret, load_config


def _shown(value: Any) -> Any:
    return ("***" if value else None) if isinstance(value, Secret) else value


def _config(args: argparse.Namespace, terminal: Terminal) -> int:
    config = load_config()
    where = profile.address(args)
    if terminal.is_json:
        settings = [
            {
                "name": row.name,
                "value": _shown(getattr(config, row.name)),
                "source": config.sources[row.name],
                "flag": row.flag,
                "variable": row.env,
            }
            for row in SETTINGS
        ]
        key = {"apiKey": "***" if where.key else None, "apiKeySource": where.key_source or None}
        terminal.data({"settings": settings, "client": {"serverUrl": where.url, "source": where.source, **key, "home": profile.home()}})
        return 0
    rows = [(row.name, _text(_shown(getattr(config, row.name))), config.sources[row.name], row.env) for row in SETTINGS]
    terminal.line("What `ash start` would use here and now; a server that runs may have been started with other settings.\n")
    terminal.table(("SETTING", "VALUE", "SOURCE", "VARIABLE"), rows)
    terminal.line(
        f"\nCommands talk to {where.url} ({where.source}), {f'with the key from {where.key_source}' if where.key else 'without a key'}."
    )
    return 0


def _text(value: Any) -> str:
    return "" if value is None else str(value)


COMMANDS = {"config": Command("Show every setting as `ash start` would use it here and now, and where it comes from.", _config)}
