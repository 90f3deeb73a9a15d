"""`ash service`: installs this file as a systemd service of the machine, upgrades it in place, shows it and takes it away again.

Replaces files in one step and touches nothing that it did not make; says what to do where there is no systemd or no root.
"""

from __future__ import annotations

import argparse
import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress

from ash.cli import local, unit
from ash.cli.command import Command, UsageError
from ash.cli.terminal import DIM, YELLOW, Terminal
from ash.cli.unit import Plan
from ash.errors import AshError, ConfigError, Conflict, Forbidden, NotFound, SandboxFailed

UNITS = "/etc/systemd/system"
PROGRAMS = "/usr/local/lib/ash"
COMMANDS_DIR = "/usr/local/bin"
ENV_DIR = "/etc/ash"
_SYSTEMD = "/run/systemd/system"
_WRAPPER_MARK = "# written by `ash service install`"
_ENV_TEMPLATE = """\
# Settings of the Ash service, one NAME=VALUE a line; `ash config` lists the names. Only root can read this file.
# After a change: systemctl restart {name}
#ANTHROPIC_API_KEY=
#ASH_MODEL=
#ASH_HOST=127.0.0.1
#ASH_PORT=4100
"""
_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,30}")
_SYSTEMCTL_TIMEOUT = 720.0
"""Seconds for one call of systemctl: longer than the unit lets a start or a stop take."""
_MINIMUM = (3, 11)


# Which service is meant


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default="ash", help="name of the service, for more than one on a machine (default ash)")


def _unit_path(name: str) -> str:
    return os.path.join(UNITS, f"{name}.service")


def _program_path(name: str) -> str:
    return os.path.join(PROGRAMS, f"{name}.pyz")


def _command_path(name: str) -> str:
    return os.path.join(COMMANDS_DIR, name)


def _find_installed(name: str) -> Plan | None:
    """What stands in the unit of that name. Raises Conflict for a unit that is somebody else's, UsageError for a bad name."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"--name {name!r}: use lower-case letters, digits and dashes, beginning with a letter")
    try:
        with open(_unit_path(name), encoding="utf-8") as file:
            plan = unit.parse_unit(file.read())
    except FileNotFoundError:
        return None
    if plan is None:
        raise Conflict(f"{_unit_path(name)} was not written by `ash service install`; choose another --name, or remove that file")
    return plan


def _get_installed(name: str) -> Plan:
    plan = _find_installed(name)
    if plan is None:
        raise NotFound(f"there is no service {name!r} of Ash on this machine; `ash service install` makes one")
    return plan


def _require_systemd() -> None:
    if not os.path.isdir(_SYSTEMD) or shutil.which("systemctl") is None:
        raise ConfigError("this machine does not run systemd; use `ash start --detach`, or whatever starts services here")


def _require_root(what: str) -> None:
    if os.geteuid():
        raise Forbidden(f"{what} a service of this machine takes root; run the same command with sudo")


def _systemctl(*words: str, check: bool = True) -> str:
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, timeout=_SYSTEMCTL_TIMEOUT, check=False)
    if check and done.returncode:
        raise SandboxFailed(f"systemctl {' '.join(words)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


# install


def _configure_install(parser: argparse.ArgumentParser) -> None:
    _add_name(parser)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--root", action="store_true", help="run as root: every sandbox gets a user id of its own (the default)")
    kinds.add_argument("--user", metavar="NAME", help="run as this user, made when there is none")
    kinds.add_argument("--dynamic-user", action="store_true", help="run as a user that exists only while the service runs")
    parser.add_argument("--data-dir", help="folder that holds everything the server keeps (default /var/lib/NAME)")
    parser.add_argument("--port", type=int, metavar="N", help="port to listen on (default: ASH_PORT of the environment file, else 4100)")
    parser.add_argument("--env-file", metavar="FILE", help="file with settings and the provider's key (default /etc/ash/NAME.env)")
    parser.add_argument("--no-start", action="store_true", help="neither start nor restart it")
    parser.add_argument("--print", dest="only_print", action="store_true", help="print the unit; change nothing")


def _install(args: argparse.Namespace, terminal: Terminal) -> int:
    before = _find_installed(args.name)
    plan = _make_plan(args, before)
    if args.only_print:
        terminal.line(unit.unit_text(plan, _program_path(plan.name)).rstrip("\n"))
        return 0
    _require_systemd()
    _require_root("installing")
    source = _own_file()
    _check_change(plan, before)
    _require_command_is_ours(plan.name)
    plan = plan._replace(made_user=_make_user(plan) or (before is not None and before.made_user and before.user == plan.user))
    _make_data_dir(plan)
    is_new_file = _install_program(source, plan)
    _make_env_file(plan)
    _replace_file(_unit_path(plan.name), unit.unit_text(plan, _program_path(plan.name)), 0o644)
    _systemctl("daemon-reload")
    _systemctl("--quiet", "enable", plan.unit)
    if not args.no_start:
        _restart(plan)
    _say_installed(plan, terminal, is_upgrade=before is not None, is_new_file=is_new_file, is_started=not args.no_start)
    return 0


def _make_plan(args: argparse.Namespace, before: Plan | None) -> Plan:
    """What was asked now, over what was asked before, over the defaults."""
    is_asked = args.root or args.user or args.dynamic_user
    kind = "user" if args.user else "dynamic" if args.dynamic_user else "root"
    user = args.user or ""
    if not is_asked and before is not None:
        kind, user = before.kind, before.user
    if user and not _USER.fullmatch(user):
        raise UsageError(f"--user {user!r} is no user name")
    if user == "root":
        raise UsageError("--user root: leave it out, a service runs as root unless told otherwise")
    port = args.port if args.port is not None else before.port if before is not None else 0
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port}: must be between 1 and 65535")
    if 0 < port < 1024 and kind != "root":
        raise UsageError(f"--port {port} is reserved for root; choose one from 1024 up, and put a proxy in front of it")
    plan = Plan(
        args.name, kind, user,
        os.path.abspath(args.data_dir or (before.data_dir if before else os.path.join(unit.STATE_ROOT, args.name))),
        port, os.path.abspath(args.env_file or (before.env_file if before else os.path.join(ENV_DIR, f"{args.name}.env"))),
        find_python(),
    )  # fmt: skip
    if kind == "dynamic" and not plan.has_state_folder:
        raise UsageError(f"--dynamic-user keeps its data in {unit.STATE_ROOT}/{plan.name}; leave out --data-dir, or give --user NAME")
    for path in (plan.data_dir, plan.env_file, plan.python):
        if any(not sign.isprintable() for sign in path):
            raise UsageError(f"{path!r} cannot stand in a unit file; choose a path without control characters")
    return plan


def find_python() -> str:
    """The interpreter of the service: the system's own, which its upgrades keep, else the one that runs this."""
    running = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    system = [path for path in ("/usr/bin/python3", "/usr/local/bin/python3") if os.access(path, os.X_OK)]
    same = [path for path in system if os.path.realpath(path) == running]
    if same or running.startswith("/usr/"):
        return same[0] if same else running
    return next((path for path in system if _is_new_enough(path)), running)


def _is_new_enough(python: str) -> bool:
    code = f"import sys; sys.exit(sys.version_info < {_MINIMUM})"
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run([python, "-I", "-S", "-c", code], capture_output=True, timeout=60, check=False).returncode == 0
    return False


def _own_file() -> str:
    from ash import cache

    file = cache.running_file()
    if file is None:
        raise ConfigError("a service is installed from the one file: run `python3 ash.pyz service install` (`make pyz` builds it)")
    return file


def _check_change(plan: Plan, before: Plan | None) -> None:
    """Files of one user are not readable for another: a service that has data keeps its kind."""
    has_data = os.path.exists(os.path.join(plan.data_dir, "ash.db"))
    if before is not None and (before.kind, before.user) != (plan.kind, plan.user) and has_data:
        raise Conflict(
            f"the service {plan.name!r} runs as {_who(before)} and has data in {plan.data_dir}, which {_who(plan)} could not use; "
            "leave out the option, or uninstall it first (`ash service uninstall`)"
        )


def _who(plan: Plan) -> str:
    return {"root": "root", "dynamic": "a dynamic user"}.get(plan.kind, f"the user {plan.user}")


def _require_command_is_ours(name: str) -> None:
    path = _command_path(name)
    if os.path.lexists(path) and not _is_our_wrapper(path):
        raise Conflict(f"{path} exists and is not Ash's; move it away, or choose another --name")


def _is_our_wrapper(path: str) -> bool:
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return _WRAPPER_MARK in file.read(1000)
    return False


def _make_user(plan: Plan) -> bool:
    """True when the service's user had to be made."""
    if plan.kind != "user":
        return False
    with suppress(KeyError):
        _ = pwd.getpwnam(plan.user)
        return False
    _run("useradd", "--system", "--user-group", "--no-create-home", "--home-dir", plan.data_dir, "--shell", "/usr/sbin/nologin", plan.user)
    return True


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError as error:
        raise ConfigError(f"the program {command[0]} is missing") from error
    if done.returncode:
        raise ConfigError(f"{' '.join(command)} failed: {done.stderr.strip()}")


def _make_data_dir(plan: Plan) -> None:
    """systemd makes the usual one; another is made here, for the service's user alone."""
    if plan.has_state_folder or os.path.isdir(plan.data_dir):
        return
    os.makedirs(plan.data_dir, 0o700)
    if plan.kind == "user":
        entry = pwd.getpwnam(plan.user)
        os.chown(plan.data_dir, entry.pw_uid, entry.pw_gid)


def _install_program(source: str, plan: Plan) -> bool:
    """Put this file to where only root can change it, and a command beside it. True when what was there was another one."""
    os.makedirs(PROGRAMS, 0o755, exist_ok=True)
    target = _program_path(plan.name)
    with open(source, "rb") as file:
        content = file.read()
    is_new = not _holds(target, content)
    if is_new:
        with suppress(FileNotFoundError):
            os.replace(target, target + ".previous")
        _replace_file(target, content, 0o755)
    wrapper = f'#!/bin/sh\n{_WRAPPER_MARK}\nexec {shlex.quote(plan.python)} -P {target} "$@"\n'
    _replace_file(_command_path(plan.name), wrapper, 0o755)
    return is_new


def _holds(path: str, content: bytes) -> bool:
    with suppress(OSError), open(path, "rb") as file:
        return file.read() == content
    return False


def _make_env_file(plan: Plan) -> None:
    """With the names that are wanted most; one that exists stays as it is, but no longer readable for others."""
    os.makedirs(os.path.dirname(plan.env_file), 0o755, exist_ok=True)
    if os.path.exists(plan.env_file):
        os.chmod(plan.env_file, 0o600)
    else:
        _replace_file(plan.env_file, _ENV_TEMPLATE.format(name=plan.name), 0o600)


def _replace_file(path: str, content: str | bytes, mode: int) -> None:
    """The new content or the old, never a part of it, whatever happens meanwhile."""
    handle, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=os.path.dirname(path))
    try:
        with open(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _restart(plan: Plan) -> None:
    """Returns once the server answers; the unit's Type=notify waits for its word."""
    try:
        _systemctl("restart", plan.unit)
    except SandboxFailed as error:
        words = [f"the service does not start:\n{_last_words(plan)}", f"(`journalctl -u {plan.name}` has the rest)"]
        target = _program_path(plan.name)
        if os.path.exists(target + ".previous"):
            words.append(f"Back to the version before: mv {target}.previous {target} && systemctl restart {plan.name}")
        raise SandboxFailed("\n".join(words)) from error


def _last_words(plan: Plan) -> str:
    if shutil.which("journalctl") is None:
        return "(no journal)"
    command = ["journalctl", "--no-pager", "--lines=15", "--output=cat", "--unit", plan.unit]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip()


def _say_installed(plan: Plan, terminal: Terminal, *, is_upgrade: bool, is_new_file: bool, is_started: bool) -> None:
    server = local.find(plan.data_dir) if is_started else None
    key_file = os.path.join(plan.data_dir, "initial-api-key")
    if terminal.is_json:
        terminal.data({**_described(plan), "started": is_started, "url": server.url if server else None})
        return
    done = ("Upgraded" if is_new_file else "Renewed") if is_upgrade else "Installed"
    terminal.line(f"{done} the service {plan.name}, which runs as {_who(plan)} with its data in {plan.data_dir}.")
    if server is not None:
        terminal.line(f"It listens on {server.url}; root needs no key there, others take the one in {key_file}.")
    else:
        terminal.line(f"Start it with: systemctl start {plan.name}")
    terminal.note(f"Settings and the provider's key: {plan.env_file}, then: systemctl restart {plan.name}", DIM)
    if not plan.python.startswith("/usr/"):
        terminal.note(f"Warning: it runs on {plan.python}, which is not the system's Python and may go away.", YELLOW)


def _described(plan: Plan) -> dict[str, object]:
    return {
        "name": plan.name,
        "unit": _unit_path(plan.name),
        "program": _program_path(plan.name),
        "command": _command_path(plan.name),
        "runsAs": plan.user if plan.kind == "user" else plan.kind,
        "dataDir": plan.data_dir,
        "envFile": plan.env_file,
        "python": plan.python,
    }


# status

_SHOWN = ("ActiveState", "SubState", "MainPID", "NRestarts", "Result", "UnitFileState", "StatusText", "ActiveEnterTimestamp")


def _status(args: argparse.Namespace, terminal: Terminal) -> int:
    plan = _get_installed(args.name)
    _require_systemd()
    lines = _systemctl("show", plan.unit, "--property", ",".join(_SHOWN)).splitlines()
    state = {name: value for name, _, value in (line.partition("=") for line in lines)}
    is_active = state["ActiveState"] in ("active", "reloading")
    if terminal.is_json:
        terminal.data({**_described(plan), "active": is_active, **_facts(plan, state)})
        return 0 if is_active else 1
    since = f" since {state['ActiveEnterTimestamp']}" if is_active else ""
    terminal.line(f"{plan.name}: {state['ActiveState']} ({state['SubState']}){since}, {state['UnitFileState']}")
    if is_active:
        terminal.line(f"Process {state['MainPID']}, {state['StatusText']}, restarted {state['NRestarts']} times")
    else:
        terminal.line(f"Result: {state['Result']}; see: journalctl -u {plan.name}")
    for name, value in _described(plan).items():
        terminal.line(f"  {name:<8} {value}")
    return 0 if is_active else 1


def _facts(plan: Plan, state: dict[str, str]) -> dict[str, object]:
    server = local.find(plan.data_dir)
    return {
        "state": state["SubState"],
        "result": state["Result"],
        "enabled": state["UnitFileState"] == "enabled",
        "pid": int(state["MainPID"]) or None,
        "restarts": int(state["NRestarts"]),
        "url": server.url if server is not None else None,
        "version": server.version if server is not None else None,
    }


def _configure_status(parser: argparse.ArgumentParser) -> None:
    _add_name(parser)


# uninstall


def _configure_uninstall(parser: argparse.ArgumentParser) -> None:
    _add_name(parser)
    parser.add_argument("--keep-data", action="store_true", help="keep the data folder, the settings and the service's user")
    parser.add_argument("--yes", "-y", action="store_true", help="remove the data without asking")


def _uninstall(args: argparse.Namespace, terminal: Terminal) -> int:
    plan = _get_installed(args.name)
    _require_systemd()
    _require_root("removing")
    if not args.keep_data and not args.yes:
        _ask(plan)
    _systemctl("--quiet", "disable", "--now", plan.unit)
    kept = [] if args.keep_data else _remove_data(plan)
    _systemctl("clean", "--what=cache", plan.unit, check=False)
    _remove_program(plan)
    shutil.rmtree(_unit_path(plan.name) + ".d", ignore_errors=True)
    os.unlink(_unit_path(plan.name))
    _systemctl("daemon-reload")
    _systemctl("reset-failed", plan.unit, check=False)
    kept += [plan.data_dir, plan.env_file] if args.keep_data else []
    if terminal.is_json:
        terminal.data({"removed": plan.name, "kept": kept})
        return 0
    terminal.line(f"Removed the service {plan.name}." + (f" Kept: {', '.join(kept)}" if kept else ""))
    return 0


def _ask(plan: Plan) -> None:
    """The data goes too, and cannot come back."""
    question = f"Remove {plan.data_dir}, with every agent and session in it?"
    if not sys.stdin.isatty():
        raise UsageError(f"{question} Say --yes, or --keep-data")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise AshError("nothing was removed; --keep-data removes the service alone")


def _remove_data(plan: Plan) -> list[str]:
    """Remove what the service kept, its settings and its user. Gives what is left, because it is not certainly ours."""
    from ash.isolation.folders import remove_tree

    kept = []
    folder = os.path.realpath(plan.data_dir)
    if os.path.exists(os.path.join(folder, "ash.db")) or plan.has_state_folder:
        remove_tree(folder)  # agents leave trees of any depth there
    elif os.path.exists(folder):
        kept.append(folder)
    if plan.has_state_folder:
        _systemctl("clean", "--what=state", plan.unit, check=False)
    with suppress(FileNotFoundError):
        os.unlink(plan.env_file)
    with suppress(OSError):
        os.rmdir(ENV_DIR)
    if plan.made_user:
        _run("userdel", plan.user)
    return kept


def _remove_program(plan: Plan) -> None:
    target = _program_path(plan.name)
    for path in (target, target + ".previous"):
        with suppress(FileNotFoundError):
            os.unlink(path)
    if _is_our_wrapper(_command_path(plan.name)):
        os.unlink(_command_path(plan.name))
    with suppress(OSError):
        os.rmdir(PROGRAMS)


_INSTALL = "Install this file as a service of this machine, or upgrade the one that is installed."
COMMANDS = {
    "install": Command(_INSTALL, _install, _configure_install, talks=False),
    "status": Command("Show the installed service.", _status, _configure_status, talks=False),
    "uninstall": Command("Stop the service and remove all that `install` made.", _uninstall, _configure_uninstall, talks=False),
}
