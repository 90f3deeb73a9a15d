"""The records that `ash.sandbox` takes and gives. Pure data; knows no process and no file."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Limits(NamedTuple):
    """What one sandbox may use. 0 means no limit of that kind, where it can."""

    memory_mb: int
    cpu_percent: int
    max_processes: int
    max_file_mb: int
    disk_mb: int = 0
    """All files of the session, workspace and home, as the disk holds them."""
    max_files: int = 0
    cpu_weight: int = 100
    """Share of the CPU under contention, 1 to 10,000, as in cgroup v2."""
    io_mb_per_second: int = 0


class Mount(NamedTuple):
    """A folder or file of the host that the operator shows to every sandbox, read-only."""

    source: str
    target: str


class SandboxSpec(NamedTuple):
    """What a claim asks for. `fresh` tells a new session from one whose folder exists already."""

    session_id: str
    session_dir: str
    agent_dir: str
    fresh: bool
    limits: Limits | None = None
    """This session's own limits; None: the server's."""


class PoolStatus(NamedTuple):
    total: int
    warm: int
    starting: int
    running: int
    maximum: int
    isolation: str
    """`bwrap`, `none`, or `unavailable` when this host cannot isolate agents; `warnings` then says why."""
    limits: dict[str, str]
    warnings: list[str]
    warm_claims: int
    """Claims served by a warm sandbox since the start; `cold_starts` counts the others."""
    cold_starts: int
    waiting: int = 0
    """Starts that wait for others to be done."""
    counts: Mapping[str, int] = MappingProxyType({})
    """Since the start: `refused_<reason>`, `second_starts`, `evictions`."""
    start_seconds: float = 0.0
    """What a start takes of late, and below what 19 of 20 stay."""
    slow_start_seconds: float = 0.0


class ExecResult(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str
    timed_out: bool
    truncated: bool
