"""Server processes of this machine: find one by its data folder, start one, end it. It signals no process it cannot identify."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import NamedTuple

from ash.config import server_environ
from ash.errors import ConnectionFailed, Forbidden, SandboxFailed

START_TIMEOUT = 60.0
"""Generous, because the first start of a new ash.pyz unpacks."""
_CLOCK_SLACK = 60.0
_TEMPORARY = "ash-chat-"


class LocalServer(NamedTuple):
    """What server.json says of a server that runs."""

    pid: int
    url: str
    version: str
    started_at: str
    data_dir: str


def find(data_dir: str) -> LocalServer | None:
    """The server that runs on a data folder; None when none does, whatever an old server.json says."""
    try:
        with open(os.path.join(data_dir, "server.json"), encoding="utf-8") as file:
            card = json.load(file)
        server = LocalServer(int(card["pid"]), str(card["url"]), str(card.get("version", "")), str(card.get("startedAt", "")), data_dir)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return server if _is_that_process(server) else None


def _is_that_process(server: LocalServer) -> bool:
    """Whether the pid still is that server: a later process that got the same number started after server.json was written."""
    try:
        with open(f"/proc/{server.pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        started = _boot_time() + int(fields[19]) / os.sysconf("SC_CLK_TCK")
        written = datetime.fromisoformat(server.started_at).timestamp()
    except (OSError, ValueError, IndexError):
        return False
    return fields[0] != "Z" and started <= written + _CLOCK_SLACK


def _boot_time() -> float:
    with open("/proc/stat", encoding="utf-8") as file:
        return next(float(line.split()[1]) for line in file if line.startswith("btime "))


def stop(server: LocalServer, timeout: float, *, by_force: bool = False) -> bool:
    """End a server and wait for it. False when it still runs after `timeout` seconds."""
    try:
        handle = os.pidfd_open(server.pid)
    except ProcessLookupError:
        return True
    try:
        if not _is_that_process(server):  # asked again: from here on the handle cannot mean another process
            return True
        signal.pidfd_send_signal(handle, signal.SIGKILL if by_force else signal.SIGTERM)
        return bool(select.select([handle], [], [], timeout)[0])
    except PermissionError as error:
        raise Forbidden(f"the server (pid {server.pid}) belongs to another user; stop it as that user or as root") from error
    finally:
        os.close(handle)


def program() -> list[str]:
    """The command that runs this very Ash again. It takes no code from the current folder, which may be anybody's."""
    from ash import cache

    file = cache.running_file()
    if file is not None:
        return [sys.executable, "-P", file]
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    code = f"import sys; sys.path.insert(0, {root!r}); from ash.__main__ import main; sys.exit(main())"
    return [sys.executable, "-P", "-c", code]


class Child:
    """A server process that this one started, with its output in a log file."""

    def __init__(self, arguments: Sequence[str], data_dir: str, *, environ: Mapping[str, str] | None = None, is_tied: bool = False) -> None:
        """`is_tied`: the server ends when this process does, however that happens, and removes its data folder if that is temporary."""
        self._data_dir = data_dir
        os.makedirs(data_dir, mode=0o711 if os.geteuid() == 0 else 0o700, exist_ok=True)
        self.log = os.path.join(data_dir, "server.log")
        self._log_start = os.path.getsize(self.log) if os.path.exists(self.log) else 0
        ties = ["--stop-with-stdin", *(["--remove-data-dir"] if is_temporary(data_dir) else [])]
        command = [*program(), "start", *arguments, *(ties if is_tied else [])]
        with open(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as output:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE if is_tied else subprocess.DEVNULL, stdout=output, stderr=output,
                env=server_environ(environ or {}), start_new_session=True,
            )  # fmt: skip

    def wait_until_ready(self) -> LocalServer:
        """Returns once it answers. Raises SandboxFailed with the end of its log when it does not; then it no longer runs."""
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline and self.process.poll() is None:
            server = find(self._data_dir)
            if server is not None and self._is_mine(server) and _answers(server.url):
                return server
            time.sleep(0.02)
        said = self._log_tail()  # before its end, which may take a temporary folder with it
        self.end(grace=1.0)
        raise SandboxFailed(f"the server did not start:\n{said}\n(its log is {self.log})")

    def _is_mine(self, server: LocalServer) -> bool:
        return server.pid == self.process.pid

    def _log_tail(self) -> str:
        with open(self.log, "rb") as file:
            file.seek(max(self._log_start, os.path.getsize(self.log) - 4000))
            return file.read().decode("utf-8", "replace").strip() or "(it wrote nothing)"

    def end(self, grace: float = 20.0) -> None:
        """Stop it: ask, wait, insist. It is asked once, because a second signal would cut its own tidying short."""
        if self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()
        elif self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(5)

    def leave(self) -> None:
        """Let it run on without this process."""
        self.process.returncode = 0  # keeps Popen from warning that its child still runs


def _answers(url: str) -> bool:
    from ash.client import AshClient

    try:
        return AshClient(url, timeout=5).health().status == "ok"
    except ConnectionFailed:
        return False


# Temporary data folders


def temporary_folder() -> str:
    """A new data folder for one conversation, for `remove_temporary` when that is over."""
    folder = tempfile.mkdtemp(prefix=_TEMPORARY)
    if os.geteuid() == 0:
        os.chmod(folder, 0o711)  # sandboxes of root's server have users of their own, who must get through
    return folder


def is_temporary(folder: str) -> bool:
    """Whether `temporary_folder` made it: by its place, its name and its owner, and only if it is no link."""
    try:
        found = os.lstat(folder)
    except OSError:
        return False
    parent, name = os.path.split(os.path.abspath(folder))
    is_in_place = os.path.realpath(parent) == os.path.realpath(tempfile.gettempdir()) and name.startswith(_TEMPORARY)
    return is_in_place and stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def remove_temporary(folder: str) -> None:
    """Remove it with all that agents left there. Anything but a folder of `temporary_folder` is left alone."""
    if not is_temporary(folder):
        return
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.exists(folder):  # agents may leave folders that nobody can write to
        for parent, _, _ in os.walk(folder):
            with suppress(OSError):
                os.chmod(parent, 0o700)
        shutil.rmtree(folder, ignore_errors=True)
