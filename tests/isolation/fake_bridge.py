"""A small bridge for the sandbox tests: speaks the protocol, runs commands, and misbehaves in a turn as it is told.

The content of a query is the name of a misdeed; anything else is echoed.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import Any

from ash import protocol


class Bridge:
    def __init__(self, connection: socket.socket, root: str) -> None:
        self._connection, self._root = connection, root
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def serve(self) -> None:
        self._write(protocol.event("ready", 0, pid=os.getpid(), version=protocol.VERSION))
        for line in self._connection.makefile("rb"):
            command = protocol.decode_command(line)
            if command["cmd"] == "shutdown":
                return
            handler = getattr(self, "_" + command["cmd"], None)
            if handler is not None:
                threading.Thread(target=handler, args=(command,), daemon=True).start()

    def send(self, name: str, **fields: Any) -> None:
        with self._lock:
            self._connection.sendall(protocol.encode(protocol.event(name, next(self._numbers), **fields)))

    def _write(self, message: dict[str, Any]) -> None:
        self._connection.sendall(protocol.encode(message))

    def _init(self, command: dict[str, Any]) -> None:
        if command["options"].get("refuse"):
            self.send("error", command_id=command["id"], error="no such thing")
        else:
            self.send("ok", command_id=command["id"])

    def _exec(self, command: dict[str, Any]) -> None:
        timed_out = False
        try:
            done = subprocess.run(["/bin/sh", "-c", command["command"]], cwd=self._root + "/workspace", capture_output=True, text=True,
                                  input=command.get("stdin") or "", timeout=command["timeout"], errors="replace", check=False)  # fmt: skip
            code, out, err = done.returncode, done.stdout, done.stderr
        except (subprocess.TimeoutExpired, OSError) as error:
            code, out, err, timed_out = 124, "", str(error), isinstance(error, subprocess.TimeoutExpired)
        fields = {"exit_code": code, "stdout": out, "stderr": err, "timed_out": timed_out, "truncated": False}
        self.send("exec_result", command_id=command["id"], **fields)

    def _query(self, command: dict[str, Any]) -> None:
        turn, deed = command["turn_id"], command["content"]
        if deed == "flood":
            for _ in range(1_000_000):
                self.send("delta", turn_id=turn, data={"text": "x" * 1000})
        elif deed == "log flood":
            for _ in range(1_000_000):
                self.send("log", level="stdout", text="x" * 1000)
        elif deed == "garbage":
            self._connection.sendall(b"this is not JSON\n")
        elif deed == "skip":
            next(self._numbers)
            self.send("message", turn_id=turn, data={})
        elif deed == "foreign":
            self.send("message", turn_id="another turn", data={})
        elif deed == "forged":
            self.send("exec_result", command_id=4711, exit_code=0, stdout="", stderr="", timed_out=False, truncated=False)
        elif deed == "long":
            while True:
                self._connection.sendall(b"x" * 1_000_000)
        elif deed == "hang up":
            self._connection.shutdown(socket.SHUT_RDWR)
        elif deed == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif deed == "exit":
            sys.stderr.write("Traceback: something broke\n")
            sys.stderr.flush()
            os._exit(3)
        elif deed != "silent":
            self.send("message", turn_id=turn, data={"echo": deed})
            self.send("done", turn_id=turn, status="completed")

    def _interrupt(self, command: dict[str, Any]) -> None:
        self.send("done", turn_id=command["turn_id"], status="interrupted")


def main() -> None:
    arguments = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    listener = socket.socket(fileno=int(arguments["--listen-fd"]))
    listener.settimeout(float(arguments["--orphan-timeout"]))
    if os.path.exists(os.path.join(root(arguments), "agent", "BROKEN")):
        sys.exit("the agent said: do not start")
    if os.path.exists(os.path.join(root(arguments), "agent", "MUTE")):
        signal.pause()
    connection, _ = listener.accept()
    connection.settimeout(None)
    Bridge(connection, root(arguments)).serve()


def root(arguments: dict[str, str]) -> str:
    return arguments.get("--root", "/")
