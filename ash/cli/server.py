"""`ash start`, `stop`, `status` and `logs`: the server process of this machine. `start` is the one command that loads the server."""

from __future__ import annotations

import argparse
import os
import threading
import time
from contextlib import suppress

from ash import notify
from ash.cli import local, profile
from ash.cli.command import Command, UsageError
from ash.cli.terminal import DIM, YELLOW, Terminal
from ash.config import SETTINGS, Config, Secret, Setting, load_config
from ash.errors import AshError, ConfigError, NotFound, Timeout

_STOP_SLACK = 15.0


def _add_data_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", help="data folder of the server (ASH_DATA_DIR, else ~/.ash)")


# start


def _configure_start(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--detach", "-d", action="store_true", help="run in the background and return once it answers")
    parser.add_argument(
        "--stop-with-stdin", action="store_true", help="stop when standard input is closed, for programs that start a server"
    )
    # Given by `ash chat` alone, for the temporary folder it made: a chat that is killed cannot remove it.
    parser.add_argument("--remove-data-dir", action="store_true", help=argparse.SUPPRESS)
    settings = parser.add_argument_group("settings", "each can be given by its variable too; `ash config` shows what a start would use")
    for setting in SETTINGS:
        words = _metavar(setting)
        default = "" if setting.default in (None, "", False) else f" (default {setting.default})"
        text = f"{setting.help}{default} [{setting.env}]".replace("%", "%%")
        if setting.kind is bool:
            settings.add_argument(setting.flag, dest=setting.name, metavar="1|0", nargs="?", const="1", help=text)
        else:
            settings.add_argument(setting.flag, dest=setting.name, metavar=words, help=text)


def _metavar(setting: Setting) -> str:
    """What stands for the value in the help."""
    if isinstance(setting.kind, tuple):
        return "|".join(setting.kind)
    by_unit = {"mb": "MIB", "timeout": "SECONDS", "interval": "SECONDS"}
    last = setting.name.rpartition("_")[2]
    return by_unit.get(last) or ("N" if setting.kind in (int, float) else last.upper())


def _start(args: argparse.Namespace, terminal: Terminal) -> int:
    config = load_config({setting.name: getattr(args, setting.name) for setting in SETTINGS})
    if args.remove_data_dir and not local.is_temporary(config.data_dir):
        raise UsageError(f"{config.data_dir} is no temporary folder of `ash chat`; start without --remove-data-dir, and remove it yourself")
    running = local.find(config.data_dir)
    if running is not None:
        _say_ignored(args, running, terminal)
        return _say_started(running, terminal, "Ash runs already")
    if args.detach:
        return _detach(args, config, terminal)
    if not notify.is_supervised():  # the key of a service stays in its data folder, for whoever may read that
        threading.Thread(target=_take_key, args=(config.data_dir, os.getpid(), terminal), daemon=True).start()
    if args.stop_with_stdin:
        threading.Thread(target=_stop_with_stdin, daemon=True).start()
    from ash import web

    web.run(config)
    if args.remove_data_dir:
        local.remove_temporary(config.data_dir)
    return 0


def _take_key(data_dir: str, pid: int, terminal: Terminal) -> None:
    """Wait until the server of this process listens, then take its first key to where the command line looks for it."""
    deadline = time.monotonic() + local.START_TIMEOUT
    while time.monotonic() < deadline:
        server = local.find(data_dir)
        if server is not None and server.pid == pid:
            _adopt_key(server, terminal)
            return
        time.sleep(0.05)


def _adopt_key(server: local.LocalServer, terminal: Terminal) -> None:
    try:
        if profile.adopt_key(server.data_dir, server.url):
            terminal.note(f"The API key is now in {profile.path()}, where the command line finds it", DIM)
    except (AshError, OSError) as error:
        terminal.note(f"The API key stays in {os.path.join(server.data_dir, profile.INITIAL_KEY_FILE)}: {error}")


def _stop_with_stdin() -> None:
    """End this process by its usual signal once whoever started it is gone."""
    import signal

    with suppress(OSError):
        while os.read(0, 4096):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


def _detach(args: argparse.Namespace, config: Config, terminal: Terminal) -> int:
    arguments, environ = _same_settings(args)
    child = local.Child([*arguments, "--data-dir", config.data_dir], config.data_dir, environ=environ)
    try:
        server = child.wait_until_ready()
    except KeyboardInterrupt:
        child.end()
        raise
    child.leave()
    _adopt_key(server, terminal)  # the child does this too; whoever is first
    return _say_started(server, terminal, "Ash started")


def _same_settings(args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """The settings that were given, for the child: secrets by variable, because everybody can read its arguments."""
    arguments: list[str] = []
    environ: dict[str, str] = {}
    for setting in SETTINGS:
        value = getattr(args, setting.name)
        if value is None or setting.name == "data_dir":
            continue
        if setting.kind is Secret:
            environ[setting.env] = value
        else:
            arguments.append(f"{setting.flag}={value}")
    return arguments, environ


def _say_started(server: local.LocalServer, terminal: Terminal, what: str) -> int:
    if terminal.is_json:
        terminal.data({"pid": server.pid, "url": server.url, "version": server.version, "dataDir": server.data_dir})
    else:
        terminal.line(f"{what}: {server.url} (pid {server.pid}, data in {server.data_dir})")
        if not profile.same(server.url, profile.default_url()):
            terminal.line(f"To use it: export ASH_SERVER_URL={server.url} (or: ash link {server.url})")
    _say_warnings(server, terminal)
    return 0


def _say_warnings(server: local.LocalServer, terminal: Terminal) -> None:
    """What its log says at the start, and nobody sees who started it in the background."""
    from ash.client import AshClient

    with suppress(AshError):  # the server runs all the same
        health = AshClient(server.url, timeout=10).health()
        notice = str(health.model.get("notice") or "") if health.is_offline else ""
        for warning in dict.fromkeys([*health.warnings, *([notice] if notice else [])]):
            terminal.note(f"Warning: {warning}", YELLOW)


def _say_ignored(args: argparse.Namespace, server: local.LocalServer, terminal: Terminal) -> None:
    """The options that the server which runs already does not have, as far as its address tells."""
    address = server.url.partition("://")[2]
    in_force = {"host": [address.rpartition(":")[0]], "port": [address.rpartition(":")[2], "0"], "data_dir": [args.data_dir]}
    given = [setting for setting in SETTINGS if getattr(args, setting.name) is not None]
    ignored = [setting.flag for setting in given if getattr(args, setting.name) not in in_force.get(setting.name, [])]
    if ignored:
        terminal.note(f"Ignored, because a server runs on that data folder: {', '.join(ignored)}. `ash stop` comes first.", YELLOW)


# stop


def _configure_stop(parser: argparse.ArgumentParser) -> None:
    _add_data_dir(parser)
    parser.add_argument("--force", action="store_true", help="kill it when it does not stop by itself")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="how long to wait for it")


def _data_config(args: argparse.Namespace) -> Config:
    return load_config({"data_dir": args.data_dir})


def _stop(args: argparse.Namespace, terminal: Terminal) -> int:
    config = _data_config(args)
    server = local.find(config.data_dir)
    if server is None:
        terminal.note(f"No server runs on {config.data_dir}.")
        return 0
    patience = args.timeout if args.timeout is not None else config.shutdown_timeout + _STOP_SLACK
    if not local.stop(server, patience) and not (args.force and local.stop(server, 5.0, by_force=True)):
        raise Timeout(f"the server (pid {server.pid}) still runs after {patience:g} s; wait, or kill it with `ash stop --force`")
    if terminal.is_json:
        terminal.data({"stopped": server.pid})
    else:
        terminal.line(f"Stopped the server at {server.url} (pid {server.pid}).")
    return 0


# status


def _status(args: argparse.Namespace, terminal: Terminal) -> int:
    """The server of this machine; without one, unless a data folder is named, whether the server that commands talk to answers."""
    config = _data_config(args)
    server = None if args.server else local.find(config.data_dir)
    if server is None and args.data_dir and not args.server:
        return _say_none_runs(config.data_dir, terminal)
    url = server.url if server is not None else profile.address(args).url
    from ash.cli.health import describe
    from ash.client import AshClient

    try:
        health = AshClient(url, timeout=10).health()
    except AshError as error:
        if terminal.is_json:
            terminal.data({"running": server is not None, "url": url, "pid": server.pid if server else None, "error": str(error)})
        elif server is None:
            terminal.line(f"No server runs on {config.data_dir}, and none answers at {url}. Start one with `ash start`.")
        else:
            terminal.line(f"The server (pid {server.pid}) runs but does not answer: {error}")
        return 1
    if terminal.is_json:
        process = {"pid": server.pid, "dataDir": server.data_dir} if server else {}
        terminal.data({"running": True, "url": url, **process, **health.raw})
        return 0
    where = f" (pid {server.pid}, data in {server.data_dir})" if server else ""
    terminal.line(f"Running: {url}{where}")
    for line in describe(health):
        terminal.line(line)
    return 0


def _say_none_runs(data_dir: str, terminal: Terminal) -> int:
    if terminal.is_json:
        terminal.data({"running": False, "dataDir": data_dir})
    else:
        terminal.line(f"No server runs on {data_dir}. Start one with `ash start --data-dir {data_dir}`.")
    return 1


# logs


def _configure_logs(parser: argparse.ArgumentParser) -> None:
    _add_data_dir(parser)
    parser.add_argument("--follow", "-f", action="store_true", help="go on with what is written from now on")
    parser.add_argument("--lines", "-n", type=int, default=200, metavar="N", help="how many lines of the past (default 200)")


def _logs(args: argparse.Namespace, terminal: Terminal) -> int:
    path = os.path.join(_data_config(args).data_dir, "server.log")
    try:
        file = open(path, encoding="utf-8", errors="replace")  # noqa: SIM115
    except FileNotFoundError as error:
        raise NotFound(f"{path} does not exist: a server logs there only when started with --detach, otherwise to its terminal") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    with file:
        for line in file.readlines()[-args.lines :] if args.lines > 0 else file.readlines()[:0]:
            terminal.line(line.rstrip("\n"))
        while args.follow:
            _follow_log(file, terminal)
            time.sleep(0.2)
    return 0


def _follow_log(file: object, terminal: Terminal) -> None:
    import io

    assert isinstance(file, io.TextIOWrapper)
    if os.fstat(file.fileno()).st_size < file.tell():  # it was emptied
        file.seek(0)
    for line in file.readlines():
        terminal.line(line.rstrip("\n"))


def _configure_status(parser: argparse.ArgumentParser) -> None:
    _add_data_dir(parser)


COMMANDS = {
    "start": Command("Start the server, in the foreground unless --detach is given.", _start, _configure_start, talks=False),
    "stop": Command("Stop the server that runs on a data folder of this machine.", _stop, _configure_stop, talks=False),
    "status": Command("Say whether the server runs, and what it does.", _status, _configure_status),
    "logs": Command("Show the log of a server that was started with --detach.", _logs, _configure_logs, talks=False),
}
