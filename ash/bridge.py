"""The program inside the sandbox: takes the server's commands over a socket, runs turns and commands, sends numbered events.

Standard library only, and little of it: it is started once per session. It never reaches the network, and it holds no key.
The main thread reads and never waits for anything else; one thread sends; each turn and each command has a thread.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from ash import protocol
from ash.errors import ProtocolError
from ash.runtime.outbox import Connection, Outbox
from ash.runtime.relay import Port

if TYPE_CHECKING:
    from ash.runtime.conversation import Conversation
    from ash.runtime.interrupt import Interrupt
    from ash.runtime.loop import Turn
    from ash.runtime.paths import Paths

Json = dict[str, Any]
STOP_GRACE = 3.0
"""Seconds that a turn gets to end after `shutdown`."""
_CHUNK = 262144
PR_SET_DUMPABLE = 4
SWITCH_INTERVAL = 0.0005
"""Seconds a busy thread may keep the interpreter while the one that sends waits for it; Python's own 5 ms would be seen in every turn."""


def main() -> None:
    """`--listen-fd N --orphan-timeout S`, and without a sandbox `--root DIR --gateway-socket PATH`."""
    arguments = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    listener = socket.socket(fileno=int(arguments["--listen-fd"]))
    listener.set_inheritable(False)
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.setswitchinterval(SWITCH_INTERVAL)
    bridge = Bridge(listener, float(arguments["--orphan-timeout"]), arguments.get("--root"), arguments.get("--gateway-socket"))
    try:
        bridge.run()
    except SystemExit:
        pass
    finally:
        bridge.end()
    os._exit(0)  # threads that wait for a model or a full queue must not keep a sandbox alive


def _shut_out_tools() -> None:
    """Keep tools, which run as the same user, out of this process: its memory, and by pidfd_getfd its sockets.

    No tool runs yet. `ctypes` takes 2 ms and 0.7 MB, and is not in every Python; a bridge that could not do this is as good to
    the server, which trusts none.
    """
    try:
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    except (ImportError, OSError, AttributeError):
        return


def _leave(number: int, frame: object) -> None:
    raise SystemExit


class Lines:
    """Cuts what arrives into lines; a line beyond the protocol's limit is skipped and reported as None."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self._is_skipping = False

    def feed(self, data: bytes) -> list[bytes | None]:
        self._buffer += data
        lines: list[bytes | None] = []
        while (end := self._buffer.find(b"\n", self._scanned)) >= 0:
            lines.append(None if self._is_skipping else bytes(self._buffer[:end]))
            self._is_skipping = False
            del self._buffer[: end + 1]
            self._scanned = 0
        if len(self._buffer) > protocol.MAX_LINE_BYTES:
            self._buffer.clear()
            self._is_skipping = True
        self._scanned = len(self._buffer)
        return lines


class Bridge:
    """One session's bridge. Everything here runs in the main thread."""

    def __init__(self, listener: socket.socket, orphan_timeout: float, root: str | None, gateway: str | None) -> None:
        self._listener = listener
        self._orphan_timeout = orphan_timeout
        self._root, self._gateway = root, gateway
        self._port = Port.open() if root is None else None  # without a sandbox, loopback is the host's
        self._outbox = Outbox()
        self._connection: Connection | None = None
        self._lines = Lines()
        self._lost_at = time.monotonic()
        self._stop_at: float | None = None
        self._conversation: Conversation | None = None
        self._turn: Turn | None = None
        self._threads: list[threading.Thread] = []
        self._execs: dict[int, Interrupt] = {}

    def run(self) -> None:
        """Serve until `shutdown`, or until no server came for the orphan timeout."""
        while not self._is_over():
            self._wait()

    def end(self) -> None:
        """Leave no process behind."""
        from ash.runtime.process import end_all

        end_all()
        self._outbox.close()

    def _is_over(self) -> bool:
        now = time.monotonic()
        if self._stop_at is not None:
            return now >= self._stop_at or (not self._is_busy() and self._outbox.is_sent())
        return self._connection is None and now >= self._lost_at + self._orphan_timeout

    def _is_busy(self) -> bool:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        return bool(self._threads)

    def _wait(self) -> None:
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        timeout = None if self._connection else max(0.0, self._lost_at + self._orphan_timeout - time.monotonic())
        if self._connection:
            poller.register(self._connection.socket, select.POLLIN)
        if self._stop_at is not None:
            timeout = 0.02
        timeout = self._watch_port(poller, timeout)
        ready = [descriptor for descriptor, _ in poller.poll(None if timeout is None else timeout * 1000)]
        if self._port and (self._port.watched() < 0 or self._port.watched() in ready):
            self._port.act()
        if self._connection and self._connection.socket.fileno() in ready:
            self._receive(self._connection)
        if self._listener.fileno() in ready:
            self._accept()

    def _watch_port(self, poller: select.poll, timeout: float | None) -> float | None:
        """Have the loop wake when the egress relay has to be started or has ended. Returns how long to wait at most."""
        if self._port is None:
            return timeout
        if (descriptor := self._port.watched()) >= 0:
            poller.register(descriptor, select.POLLIN)
            return timeout
        seconds = self._port.wait_seconds()
        return seconds if timeout is None else timeout if seconds is None else min(timeout, seconds)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        if self._connection:
            self._connection.close()
        self._lines = Lines()
        greeting = protocol.encode(protocol.event("ready", 0, pid=os.getpid(), version=protocol.VERSION))
        self._connection = Connection(connection, self._outbox, greeting)
        self._load()

    @staticmethod
    def _load() -> None:
        """Import the rest now that the server knows the bridge is ready: a warm sandbox has the time, the first turn has not."""
        import ash.runtime.loop  # noqa: F401

        _shut_out_tools()

    def _receive(self, connection: Connection) -> None:
        try:
            data = connection.socket.recv(_CHUNK, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            connection.close()
            self._connection, self._lost_at = None, time.monotonic()
            return
        for line in self._lines.feed(data):
            self._handle(line)

    def _handle(self, line: bytes | None) -> None:
        try:
            if line is None:
                raise ProtocolError(f"a line is longer than {protocol.MAX_LINE_BYTES} bytes")
            command = protocol.decode_command(line)
        except ProtocolError as error:
            self._outbox.answer("error", error=f"a command could not be read: {error.message}")
            return
        try:
            getattr(self, f"_on_{command['cmd']}")(command)
        except Exception as error:  # noqa: BLE001 - the edge of a command: a bad one must not end the session
            self._outbox.answer("error", command_id=command["id"], error=f"{command['cmd']} failed: {type(error).__name__}: {error}")

    # Commands

    def _on_init(self, command: Json) -> None:
        from ash.runtime.conversation import Conversation

        if self._turn_runs():
            self._outbox.answer("error", command_id=command["id"], error="init: a turn is running")
            return
        self._conversation = Conversation(self._paths(), command["agent"], command["options"], command["transcript"])
        self._outbox.answer("ok", command_id=command["id"])

    def _paths(self) -> Paths:
        from ash.runtime.paths import Paths

        if self._root is None:
            return Paths(proxy=f"http://127.0.0.1:{protocol.PROXY_PORT}" if self._port else "")
        root = os.path.abspath(self._root)
        return Paths(f"{root}/agent", f"{root}/workspace", f"{root}/home", self._gateway or protocol.GATEWAY_SOCKET)

    def _turn_runs(self) -> bool:
        return self._turn is not None and not self._turn.is_over

    def _on_query(self, command: Json) -> None:
        from ash.runtime.loop import Turn

        turn_id = command["turn_id"]
        if self._turn_runs() or self._conversation is None:
            reason = "a turn is running already" if self._conversation else "the session has not been initialized"
            self._outbox.answer("error", turn_id=turn_id, error=reason)
            self._outbox.answer("done", turn_id=turn_id, status="failed", error=reason)
            return
        self._turn = Turn(self._conversation, turn_id, command["content"], command["options"], self._outbox.emit)
        self._start(f"turn {turn_id}", self._turn.run)

    def _start(self, name: str, target: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _on_interrupt(self, command: Json) -> None:
        if self._turn and self._turn.id == command["turn_id"]:
            self._turn.interrupt.set()

    def _on_permission(self, command: Json) -> None:
        self._outbox.answer("error", command_id=command["id"], error="permission: nothing was asked")

    def _on_exec(self, command: Json) -> None:
        from ash.runtime.interrupt import Interrupt

        self._execs[command["id"]] = Interrupt()
        self._is_busy()  # forgets threads that are over
        self._start("exec", self._exec, command, self._execs[command["id"]])

    def _exec(self, command: Json, interrupt: Interrupt) -> None:
        """In a thread of its own."""
        from ash.runtime.paths import tool_environ
        from ash.runtime.shell import execute

        paths = self._paths()
        most = self._conversation.bench.tool_timeout if self._conversation else command["timeout"]
        given: Json = {"timeout": min(command["timeout"], most), "cwd": command.get("cwd"), "stdin": command.get("stdin")}
        env = self._conversation.bench.base_env if self._conversation else tool_environ(paths, {}, {})
        try:
            added = {str(name): str(value) for name, value in (command.get("env") or {}).items()}
            result = execute(command["command"], paths, {**env, **added}, interrupt, **given)
        except Exception as error:  # noqa: BLE001 - the edge of a command: its caller waits for an answer
            self._outbox.emit("error", command_id=command["id"], error=f"exec: {error}")
        else:
            self._outbox.emit("exec_result", command_id=command["id"], **result._asdict())
        finally:
            self._execs.pop(command["id"], None)

    def _on_cancel(self, command: Json) -> None:
        running = self._execs.get(command["command_id"])
        if running:
            running.set()

    def _on_ack(self, command: Json) -> None:
        self._outbox.acknowledge(command["n"])

    def _on_shutdown(self, command: Json) -> None:
        self._stop_at = time.monotonic() + STOP_GRACE
        if self._turn:
            self._turn.interrupt.set()
        for interrupt in list(self._execs.values()):
            interrupt.set()
