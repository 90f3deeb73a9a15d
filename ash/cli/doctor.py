"""`ash doctor`: measures what this machine and this installation can do, and prints for each shortcoming what mends it. Changes nothing."""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter

from ash import __version__
from ash.cli import local
from ash.cli.command import Command
from ash.cli.terminal import GREEN, RED, YELLOW, Terminal
from ash.config import SETTINGS, Config, load_config
from ash.errors import ConfigError
from ash.isolation import checks
from ash.isolation.machine import FAIL, Finding
from ash.isolation.prepare import Choices
from ash.isolation.records import Limits
from ash.models import now

_COLORS = {"ok": GREEN, "warn": YELLOW, "fail": RED, "unknown": YELLOW}
_SETTINGS = ("data_dir", "host", "port", "sandbox", "sandbox_python", "rootfs", "cgroup_root", "policy_file")
"""Those that can be given; the others come from the variables, as for `ash start`."""


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--online", action="store_true", help="ask the model provider too, with a request that costs nothing")
    for setting in SETTINGS:
        if setting.name in _SETTINGS:
            choices = "|".join(setting.kind) if isinstance(setting.kind, tuple) else setting.name.rpartition("_")[2].upper()
            parser.add_argument(setting.flag, dest=setting.name, metavar=choices, help=f"{setting.help} [{setting.env}]".replace("%", "%%"))


def _doctor(args: argparse.Namespace, terminal: Terminal) -> int:
    from ash.cli.checkup import check_installation

    config = load_config({name: getattr(args, name) for name in _SETTINGS})
    server = local.find(config.data_dir)
    findings = [*asyncio.run(_check_host(config, server)), *check_installation(config, server, online=args.online)]
    counts = Counter(finding.verdict for finding in findings)
    if terminal.is_json:
        terminal.data({
            "checkedAt": now(), "version": __version__, "dataDir": config.data_dir, "ok": not counts[FAIL],
            "totals": {verdict: counts[verdict] for verdict in _COLORS}, "checks": [finding._asdict() for finding in findings],
        })  # fmt: skip
    else:
        _show(findings, terminal)
        terminal.line(", ".join(f"{counts[verdict]} {verdict}" for verdict in _COLORS if counts[verdict]))
    return 1 if counts[FAIL] else 0


async def _check_host(config: Config, server: local.LocalServer | None) -> list[Finding]:
    limits = Limits(**{name: getattr(config, name) for name in Limits._fields})
    pid = server.pid if server is not None else 0
    return await checks.check_host(config.sandbox, config.data_dir, limits, _choices(config), server_pid=pid, warm=config.warm_sandboxes)


def _choices(config: Config) -> Choices:
    """What the operator has chosen for sandboxes. A policy that cannot be read is a finding of its own."""
    from ash.policy import open_policies

    try:
        mounts = open_policies(config).current.mounts
    except ConfigError:
        mounts = ()
    return Choices(config.sandbox_python, config.cgroup_root, config.rootfs, mounts, config.sandbox_ptrace)


def _show(findings: list[Finding], terminal: Terminal) -> None:
    for finding in findings:
        terminal.line(f"{finding.verdict:<8}{finding.id:<18}{finding.found}")
        if finding.fix and finding.verdict != "ok":
            terminal.line(f"{'':<26}-> {finding.fix}")


COMMANDS = {
    "doctor": Command("Measure what this machine can enforce, and say how to mend what it cannot.", _doctor, _configure, talks=False)
}
