"""The records that `ash.sandbox` takes and gives. Pure data; knows no process and no file."""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """What one sandbox may use."""

    memory_mb: int
    cpu_percent: int
    max_processes: int
    max_file_mb: int


class SandboxSpec(NamedTuple):
    """What a claim asks for. `fresh` tells a new session from one whose folder exists already."""

    session_id: str
    session_dir: str
    agent_dir: str
    fresh: bool


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


class ExecResult(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str
    timed_out: bool
    truncated: bool
