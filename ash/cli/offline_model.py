"""`ash offline-model`: the built-in demo model on a port of its own, for other clients of the Messages API."""

from __future__ import annotations

import argparse

from ash.cli.command import Command
from ash.cli.terminal import Terminal
from ash.errors import ConfigError


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=4110, help="port to listen on; 0 takes a free one (default 4110)")
    parser.add_argument("--script", metavar="FILE", help="JSON file of replies to play instead")


def _serve(args: argparse.Namespace, _terminal: Terminal) -> int:
    from ash import offline

    try:
        offline.run(args.host, args.port, args.script)
    except (OSError, OverflowError, UnicodeError) as error:  # the last two: a port beyond 65535, a name that is none
        raise ConfigError(f"cannot listen on {args.host}, port {args.port}: {getattr(error, 'strerror', None) or error}") from error
    return 0


COMMANDS = {
    "offline-model": Command("Serve the built-in demo model as a Messages API of its own, until Ctrl-C.", _serve, _configure, talks=False)
}
