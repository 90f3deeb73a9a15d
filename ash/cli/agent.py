"""`ash agent`: list, show and delete agents."""

from __future__ import annotations

import argparse

from ash.cli import profile
from ash.cli.command import Command
from ash.cli.terminal import Terminal


def _configure_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="name of the agent")


def _list(args: argparse.Namespace, terminal: Terminal) -> int:
    agents = profile.client(args).list_agents()
    if terminal.is_json or not terminal.out_is_tty:
        terminal.data([agent.raw for agent in agents])
    elif agents:
        terminal.table(("NAME", "VERSION", "UPDATED"), [(agent.name, str(agent.version), agent.updated_at) for agent in agents])
    else:
        terminal.note("No agent is deployed yet; `ash deploy ./my-agent` uploads one.")
    return 0


def _info(args: argparse.Namespace, terminal: Terminal) -> int:
    terminal.data(profile.client(args).get_agent(args.name).raw)
    return 0


def _delete(args: argparse.Namespace, terminal: Terminal) -> int:
    profile.client(args).delete_agent(args.name)
    if terminal.is_json:
        terminal.data({"deleted": args.name})
    else:
        terminal.line(f"Deleted agent: {args.name}")
    return 0


COMMANDS = {
    "list": Command("List the deployed agents; JSON when piped.", _list),
    "info": Command("Show an agent, as JSON.", _info, _configure_name),
    "delete": Command("Delete an agent.", _delete, _configure_name),
}
