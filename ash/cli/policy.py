"""`ash policy`: what the policy in force on the server says, or, with `--check`, what a file would say. It changes nothing."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ash.cli import profile
from ash.cli.command import Command, UsageError
from ash.cli.terminal import YELLOW, Terminal
from ash.config import load_config

Json = dict[str, Any]
_TABLES = ("egress", "models", "limits", "hooks", "runtimes", "deploy")


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", metavar="FILE", help="read this file instead of asking the server, and say what is wrong with it")


def _policy(args: argparse.Namespace, terminal: Terminal) -> int:
    if args.check is not None:
        return _check(args.check, terminal)
    answer = profile.client(args).policy()
    if terminal.is_json:
        terminal.data(answer)
        return 0
    _show(answer["policy"], terminal)
    if answer.get("problem"):
        terminal.note(f"\nWarning: the file was refused, and the policy above stays in force: {answer['problem']}", YELLOW)
    return 0


def _check(path: str, terminal: Terminal) -> int:
    """Raises ConfigError with what is wrong with the file."""
    if not path:
        raise UsageError("--check needs the path of a policy file")
    from ash import limits
    from ash.policy import load_policy

    config = load_config()
    policy = load_policy(os.path.abspath(os.path.expanduser(path)), config.data_dir)
    shown = policy.describe(limits.of_server(config))
    if terminal.is_json:
        terminal.data({"policy": shown, "problem": None})
        return 0
    terminal.line(f"{path} can be used. With the settings of here and now it says:\n")
    _show(shown, terminal)
    return 0


def _show(policy: Json, terminal: Terminal) -> None:
    origins = policy["origins"]
    tables = {f"{table}.{key}": value for table in _TABLES for key, value in policy[table].items()}
    rows = [(key, _text(value), origins.get(key, "")) for key, value in tables.items()]
    rows += [("mounts", " at ".join(filter(None, (mount.get("source"), mount["target"]))), "policy") for mount in policy["mounts"]]
    for name, agent in policy["agents"].items():
        rows += [(f"agents.{name}.{table}.{key}", _text(value), "policy") for table in agent for key, value in agent[table].items()]
    terminal.line("No policy file: all is as it is without one." if policy["source"] == "default" else f"From {policy['source']}")
    terminal.line("")
    terminal.table(("KEY", "VALUE", "FROM"), rows)
    for key, note in policy["notes"].items():
        terminal.note(f"{key}: {note}")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "(none)"
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


COMMANDS = {"policy": Command("Show the operator's policy that is in force on the server, or check a policy file.", _policy, _configure)}
