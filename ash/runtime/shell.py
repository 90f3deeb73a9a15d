"""Runs shell commands: the agent's shell, whose folder and exported variables outlive a call, and one-off commands.

Each call is a shell process of its own, so that a command that kills or blocks its shell harms only itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from ash.runtime.interrupt import Interrupt
from ash.runtime.paths import Paths, find_shell
from ash.runtime.process import Output, Process, Room, run

EXEC_OUTPUT_BYTES = 10 * 1024 * 1024
"""Most output of a one-off command that is kept, both streams together: escaped as JSON it still fits one line."""
MAX_COMMAND_BYTES = 120_000
_KEPT = 128 * 1024
_MAX_STATE = 256 * 1024
_FORGOTTEN = ("_", "SHLVL", "OLDPWD")
# The state is written when the shell exits, however it exits; `command -p` finds env even when PATH was broken. Where nothing may be
# written, as beyond the session's disk, SIGXFSZ would end the shell and hide how the command ended.
_WITH_STATE = """trap '{ trap "" XFSZ; pwd -P || echo "$PWD"; printf "\\0"; command -p env -0; } 2>/dev/null >&%d' EXIT; \
cd -- "$2" || exit; eval "$1\""""
_STATE_FD, _LOW_STATE_FD = 250, 9
"""Where the state is written: a number no script is likely to use for itself; shells other than bash only know those of one digit."""
_IN_FOLDER = """cd -- "$2" || exit; eval "$1\""""


class ShellResult(NamedTuple):
    """What one call of the agent's shell gave. Output and errors are one stream, in the order they were written."""

    code: int
    text: str
    dropped: int
    timed_out: bool
    note: str


class Shell:
    """The agent's shell. One call at a time."""

    def __init__(self, paths: Paths, env: Mapping[str, str]) -> None:
        self._paths = paths
        self.env = dict(env)
        self.cwd = paths.workspace

    def run(self, command: str, timeout: float, interrupt: Interrupt) -> ShellResult:
        """Raises OSError when the shell cannot be started."""
        note = ""
        if not os.path.isdir(self.cwd):
            note = f"[{self.cwd} no longer exists; the command ran in {self._paths.workspace}]"
            self.cwd = self._paths.workspace
        output = Output(Room(_KEPT), tail=_KEPT)
        shell = find_shell()
        state_fd = _STATE_FD if shell.endswith("bash") else _LOW_STATE_FD
        argv = [shell, "-c", _WITH_STATE % state_fd, "bash", command, self.cwd]
        ended = run(Process(argv, self.env, output, state_fd=state_fd), timeout, interrupt)
        self._keep(ended.state)
        return ShellResult(ended.code, decode(bytes(output.head + output.tail)), output.dropped, ended.timed_out, note)

    def _keep(self, state: bytes) -> None:
        cwd, found, variables = state.partition(b"\n\0")
        if found and len(state) < _MAX_STATE:
            self.cwd = os.fsdecode(cwd)
            pairs = [os.fsdecode(entry).partition("=") for entry in variables.split(b"\0") if entry]
            kept = {name: value for name, _, value in pairs if name and name not in _FORGOTTEN}
            self.env = kept or self.env


class ExecResult(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str
    timed_out: bool
    truncated: bool


def execute(
    command: str, paths: Paths, env: Mapping[str, str], interrupt: Interrupt,
    *, timeout: float, cwd: str | None = None, stdin: str | None = None,
) -> ExecResult:  # fmt: skip
    """Run one command for the server, apart from the agent's shell. Raises OSError with what was wrong."""
    folder = paths.resolve(cwd) if cwd else paths.workspace
    if not os.path.isdir(folder):
        raise NotADirectoryError(f"cwd: no such folder: {folder}")
    room = Room(EXEC_OUTPUT_BYTES)
    output, errors = Output(room), Output(room)
    argv = [find_shell(), "-c", _IN_FOLDER, "bash", command, folder]
    process = Process(argv, env, output, errors, stdin=(stdin or "").encode("utf-8", "replace"))
    ended = run(process, timeout, interrupt)
    is_cut = bool(output.dropped or errors.dropped)
    return ExecResult(ended.code, decode(bytes(output.head)), decode(bytes(errors.head)), ended.timed_out, is_cut)


def decode(data: bytes) -> str:
    return data.decode("utf-8", "replace")
