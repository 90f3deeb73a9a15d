"""The server: wires the parts in layer order, puts the routes over them, and runs them until it is told to stop.

`create_app` gives the application; `run` is the whole life of a server process. It decides nothing about agents or sessions.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from ash import __version__, limits, models, notify
from ash.agents import Agents
from ash.auth import GUARD, Guard, authenticate
from ash.config import Config, drop_secrets
from ash.credentials import Credentials
from ash.egress import Egress, EgressAccess
from ash.egress.authority import upstream_context
from ash.egress.interception import Interceptor
from ash.errors import ConfigError
from ash.events import EventLog
from ash.gateway import Gateway
from ash.keys import Keys
from ash.models import NewEvent
from ash.policy import Policy, open_policies
from ash.routes import agents, answers, api_keys, credentials, files, health, messages, policy, sessions
from ash.routes.parts import PARTS, Parts
from ash.sandbox import Sandboxes
from ash.sessions import Sessions
from ash.store import Store
from ash.workspaces import Workspaces

log = logging.getLogger(__name__)

_ANSWER_TIMEOUT = 5.0
"""Seconds that requests other than turns get to finish when the server stops."""
_HANGUP_DELAY = 0.3
SWITCH_INTERVAL = 0.0005
"""Seconds the event loop may keep the interpreter while the database's threads wait for it; Python's own value is 5 ms."""
CONFIG: web.AppKey[Config] = web.AppKey("config", Config)
_RESOURCES = (agents, sessions, messages, health, api_keys, policy, credentials, files)
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


def create_app(config: Config) -> web.Application:
    """The application. Its parts open when it starts and close, in reverse order, when it is cleaned up."""
    origins = answers.Origins(config.allowed_origins)
    # Bodies are read by `requests.read_json`, each with the limit of its route: aiohttp's own limit is not used.
    app = web.Application(middlewares=[answers.answer_errors, origins.middleware(), authenticate])
    for resource in _RESOURCES:
        app.add_routes(resource.ROUTES)
    app[CONFIG] = config
    app.cleanup_ctx.append(_open_parts)
    app.on_shutdown.append(_end_turns)
    app.on_response_prepare.append(origins.add_headers)
    return app


async def _open_parts(app: web.Application) -> AsyncIterator[None]:
    config, started = app[CONFIG], time.monotonic()
    # Sandboxes of a server that is root have uids of their own, which must be able to reach their folders in here.
    await asyncio.to_thread(_make_data_dir, config.data_dir)
    with _locked(config.data_dir):
        policies = await asyncio.to_thread(open_policies, config)
        async with (
            Store(os.path.join(config.data_dir, "ash.db")) as store,
            EventLog(store) as event_log,
            Gateway(config, on_usage=_recorder(event_log), policy=lambda: policies.current) as gateway,
            Egress(policy_of=policies.egress_of, record=_event_recorder(event_log), interceptors=await _interceptors(config)) as egress,
            _sandboxes(config, policies.current, gateway, egress) as sandboxes,
        ):
            keys = Keys(store, config.api_key)
            await keys.bootstrap(config.data_dir)
            agents_dir = os.path.join(config.data_dir, "agents")
            await asyncio.to_thread(os.makedirs, agents_dir, 0o700, exist_ok=True)  # sandboxes get copies and links, never this folder
            found = Agents(store, agents_dir, max_bytes=config.max_agent_mb * 1024 * 1024, max_files=config.max_agent_files)
            await found.prune()
            vault = Credentials(store, config.data_dir, config.master_key_file)
            async with Sessions(
                store=store, log=event_log, agents=found, gateway=gateway, egress=egress, sandboxes=sandboxes,
                config=config, policies=policies, credentials=vault,
            ) as live_sessions:  # fmt: skip
                app[PARTS] = Parts(
                    config, store, event_log, keys, found, gateway, egress, sandboxes, live_sessions,
                    Workspaces(store, config, live_sessions.limits_of), policies, vault, started,
                )  # fmt: skip
                app[GUARD] = Guard(config, keys)
                yield


def _recorder(event_log: EventLog) -> Callable[[str, models.Json], Awaitable[None]]:
    """Puts what the gateway metered into the session's log; the store keeps the sums."""

    async def record(session_id: str, usage: models.Json) -> None:
        _ = await event_log.append(session_id, [NewEvent(models.USAGE_RECORDED, usage)])

    return record


def _event_recorder(event_log: EventLog) -> Callable[[str, str, models.Json], Awaitable[None]]:
    """Puts what the egress proxy has to report into the session's log."""

    async def record(session_id: str, kind: str, data: models.Json) -> None:
        _ = await event_log.append(session_id, [NewEvent(kind, data)])

    return record


async def _interceptors(config: Config) -> Callable[[EgressAccess, str], Interceptor]:
    """Raises ConfigError for a file of authorities that cannot be used: now, and not at the first request."""
    if config.egress_ca_file:
        _ = await asyncio.to_thread(upstream_context, config.egress_ca_file)
    return lambda access, folder: Interceptor(access.session_id, access.credentials, folder, config.egress_ca_file)


def _sandboxes(config: Config, policy: Policy, gateway: Gateway, egress: Egress) -> Sandboxes:
    granted = limits.resolve({}, limits.of_server(config), policy.maximum)  # what a session gets that asks for nothing

    async def open_ways(id: str, gateway_socket: str) -> None:
        await gateway.open(id, gateway_socket)
        await egress.open(id, os.path.dirname(gateway_socket))

    async def close_ways(id: str) -> None:
        try:
            await egress.close(id)
        finally:
            await gateway.close(id)

    return Sandboxes(
        data_dir=config.data_dir,
        isolation=config.sandbox,
        limits=granted.sandbox,
        warm=config.warm_sandboxes,
        maximum=config.max_sandboxes,
        start_timeout=config.start_timeout,
        orphan_timeout=config.orphan_timeout,
        python=config.sandbox_python,
        cgroup_root=config.cgroup_root,
        rootfs=config.rootfs,
        mounts=policy.mounts,
        ptrace=config.sandbox_ptrace,
        min_free_memory_mb=config.min_free_memory_mb,
        min_free_disk_mb=config.min_free_disk_mb,
        most_waiting=config.max_waiting_starts,
        on_open=open_ways,
        on_close=close_ways,
    )


def _make_data_dir(path: str) -> None:
    """Raises ConfigError for a folder that cannot be made or is not ours to write."""
    try:
        os.makedirs(path, 0o711 if os.geteuid() == 0 else 0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the data folder {path} cannot be used: {error.strerror}; choose another with --data-dir") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"the data folder {path} cannot be written by this user; choose another with --data-dir")


async def _end_turns(app: web.Application) -> None:
    """End the turns first, so that every stream gets its `done`, and only then let the streams go."""
    if PARTS in app:
        await app[PARTS].sessions.drain()
        app[PARTS].log.close_followers()


@contextmanager
def _locked(data_dir: str) -> Iterator[None]:
    """Keep a second server off this data folder: it would take the first one's sandboxes for remains and end them."""
    with open(os.path.join(data_dir, "server.lock"), "a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another Ash server{_running_server(data_dir)} uses the data folder {data_dir}; stop it, or choose another --data-dir"
            ) from error
        yield


def _running_server(data_dir: str) -> str:
    try:
        with open(_card_path(data_dir), encoding="utf-8") as card:
            found = json.load(card)
            return f" (pid {found['pid']}, {found['url']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


# The life of a server process


def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP has the policy read again. Raises ConfigError when the server cannot start as configured."""
    logging.basicConfig(
        level=config.log_level.upper(), stream=sys.stderr, format="%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
    )  # fmt: skip
    logging.getLogger("aiosqlite").setLevel(logging.INFO)  # below that it logs every value it stores, secrets included
    logging.getLogger("aiohttp.server").addFilter(_is_worth_a_line)
    drop_secrets()
    sys.setswitchinterval(SWITCH_INTERVAL)
    sockets = bind(config.host, config.port)
    try:
        asyncio.run(_serve(config, sockets))
    finally:
        for listener in sockets:
            listener.close()


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """False for what a caller got wrong in HTTP itself: it was told, and would fill the log with tracebacks."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets on every address of `host`, all on one port; not yet listening. Raises ConfigError that says why not."""
    bound: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found):
            try:
                bound.append(_bind_one(family, address, bound[0].getsockname()[1] if bound else port))
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL or address == host:  # a name may stand for IPv6, which is not everywhere
                    raise
    except ValueError as error:  # the resolver's word for a name with an empty or overlong part, or with a NUL
        raise ConfigError(f"cannot listen on {host}: that is neither an address nor the name of a machine; give another --host") from error
    except OSError as error:
        for listener in bound:
            listener.close()
        raise ConfigError(_explain(error, host, port)) from error
    if not bound:
        raise ConfigError(f"cannot listen on {host}: this machine has none of its addresses")
    return bound


def _bind_one(family: int, address: str, port: int) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((address, port))
    except OSError:
        listener.close()
        raise
    return listener


def _explain(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is taken; stop the program that has it, or choose another with --port"
    if error.errno == errno.EACCES:
        return f"port {port} on {host} is reserved for root; choose one from 1024 up with --port"
    return f"cannot listen on {host}, port {port}: {error.strerror}"


async def _serve(config: Config, sockets: list[socket.socket]) -> None:
    app = create_app(config)
    stopped = _stop_on_signals()
    _reload_on_hangup(app, stopped)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=_ANSWER_TIMEOUT)
    try:
        await runner.setup()
        for listener in sockets:
            app[PARTS].egress.protect(listener.getsockname()[1])
            await web.SockSite(runner, listener, backlog=1024).start()
        with _announced(config, sockets[0].getsockname()[1]) as url:
            _greet(config, runner.app, url)
            notify.ready(f"listens on {url}")
            why = await _first_of(stopped, runner.app[PARTS].log.broken)
            log.info("stopping: %s", why)
            notify.stopping(why)
            await runner.cleanup()
    finally:
        await runner.cleanup()  # for a start that failed; otherwise there is nothing left to do


async def _first_of(stopped: asyncio.Future[str], broken: asyncio.Event) -> str:
    """Why the server has to stop."""
    watch: asyncio.Future[Any] = asyncio.ensure_future(broken.wait())
    _ = await asyncio.wait([cast("asyncio.Future[Any]", stopped), watch], return_when=asyncio.FIRST_COMPLETED)
    watch.cancel()
    return stopped.result() if stopped.done() else "the event log can no longer be written"


def _stop_on_signals() -> asyncio.Future[str]:
    """Done at the first signal to stop. The second one is no longer caught, and ends the process at once."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[str] = loop.create_future()
    caught = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]

    def stop(name: str) -> None:
        for number in caught:
            loop.remove_signal_handler(number)
        if not stopped.done():  # two signals can be on their way at once
            stopped.set_result(name)

    for number in caught:
        loop.add_signal_handler(number, stop, number.name)
    return stopped


def _reload_on_hangup(app: web.Application, stopped: asyncio.Future[str]) -> None:
    """SIGHUP has the policy read again, as it does with daemons. It is also what a closed terminal sends: then the server stops."""
    loop = asyncio.get_running_loop()
    had_terminal = _has_terminal()

    def decide() -> None:
        if had_terminal and not _has_terminal():
            if not stopped.done():
                stopped.set_result("SIGHUP, the terminal was closed")
        elif PARTS in app:
            notify.reloading()
            is_new = app[PARTS].policies.reload()
            notify.ready("the policy was read again" if is_new else "the policy was refused and stays as it was, see the log")

    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        # A shell may pass the signal on a moment before the kernel has taken the terminal away.
        loop.add_signal_handler(signal.SIGHUP, lambda: loop.call_later(_HANGUP_DELAY if had_terminal else 0, decide))


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal now."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _card_path(data_dir: str) -> str:
    return os.path.join(data_dir, "server.json")


@contextmanager
def _announced(config: Config, port: int) -> Iterator[str]:
    """server.json while the server listens: how commands on this machine find it. Gives the server's URL."""
    host = _WILDCARDS.get(config.host, config.host)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    card = {"pid": os.getpid(), "host": config.host, "port": port, "url": url, "version": __version__, "startedAt": models.now()}
    path = _card_path(config.data_dir)
    fresh = f"{path}.{os.getpid()}"
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(card, file)
    os.replace(fresh, path)
    try:
        yield url
    finally:
        os.unlink(path)


def _greet(config: Config, app: web.Application, url: str) -> None:
    """What the person at the terminal wants to know. The key itself is never shown."""
    lines = [f"Ash {__version__} listens on {url}"]
    key_file = os.path.join(config.data_dir, "initial-api-key")
    if os.path.exists(key_file):
        lines.append(f"The API key is in {key_file}")
    if app[GUARD].trusts_local:
        lines.append("Your own programs on this machine need no key (--auth local)")
    lines += [f"WARNING: {warning}" for warning in health.warnings(app[PARTS], app[GUARD].trusts_local)]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
