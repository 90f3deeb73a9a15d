"""Things worth stealing, really put on this host for as long as an attack lasts: a file, sockets, a port, a process. Holds no secret."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

CANARY = "canary"
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 6\r\nConnection: close\r\n\r\ncanary"
_WAIT = "import sys; sys.stdin.read()"


@contextmanager
def planted(data_dir: str) -> Iterator[dict[str, Any]]:
    """The facts about them, for `Probe.fill`. Everything may be read and reached by every user: only the sandbox keeps it away."""
    name = f"attack-{secrets.token_hex(4)}"
    with ExitStack() as stack:
        folder = tempfile.mkdtemp(prefix="ash-attack-")
        stack.callback(shutil.rmtree, folder)
        os.chmod(folder, 0o755)
        host_socket, abstract = os.path.join(folder, "host.sock"), f"ash-{name}"
        for address in (host_socket, "\0" + abstract):
            _listen(stack, address)
        os.chmod(host_socket, 0o777)
        marker = f"ash-{CANARY}-{name}"
        _start_process(stack, marker)
        yield {
            "data_dir": data_dir, "canary_file": _plant_file(stack, os.path.join(data_dir, name)), "marker": marker,
            "port": _serve_http(stack), "host_socket": host_socket, "abstract": abstract,
        }  # fmt: skip


def start_time(pid: int) -> int:
    """Field 22 of /proc/<pid>/stat. With the pid it names one process, in whatever namespace."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return int(file.read().rpartition(")")[2].split()[19])


def _plant_file(stack: ExitStack, path: str) -> str:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w", encoding="ascii") as file:
        stack.callback(os.unlink, path)
        file.write(CANARY)
    os.chmod(path, 0o644)
    return path


def _listen(stack: ExitStack, address: str) -> None:
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(address)
    listener.listen()


def _start_process(stack: ExitStack, marker: str) -> None:
    """A process that anybody on the host can see by its arguments, and its own user by its environment."""
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", _WAIT, marker], stdin=subprocess.PIPE, env={"ASH_CANARY": marker})
    assert process.stdin is not None
    stack.callback(process.wait)
    stack.callback(process.stdin.close)


def _serve_http(stack: ExitStack) -> int:
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    thread = threading.Thread(target=_answer_all, args=(listener,), daemon=True)
    thread.start()
    # A listener that is only closed leaves its `accept` waiting.
    stack.callback(thread.join, 5)
    stack.callback(listener.shutdown, socket.SHUT_RDWR)
    port: int = listener.getsockname()[1]
    return port


def _answer_all(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, suppress(OSError):
            connection.settimeout(2)
            connection.recv(65536)
            connection.sendall(_ANSWER)
