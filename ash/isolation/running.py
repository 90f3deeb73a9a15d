"""One running sandbox: what its owner may ask of it, how it ends, and why it ended. Starts none; treats all that it says as hostile."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from ash.errors import ProtocolError, SandboxFailed, SandboxUnresponsive, Timeout
from ash.isolation import cgroup as cgroups
from ash.isolation import launch
from ash.isolation.disk import Watcher
from ash.isolation.launch import Process
from ash.isolation.link import Link
from ash.isolation.logbook import Logbook
from ash.isolation.prepare import Place
from ash.isolation.records import ExecResult, Limits
from ash.isolation.tree import Tree
from ash.isolation.usage import Source
from ash.isolation.usage import read as read_usage
from ash.models import SandboxHandle

log = logging.getLogger(__name__)

STOPPED = "the sandbox was stopped"
EXIT_GRACE = 1.0
"""Seconds between a bridge's hanging up and its exit, to learn how it ended."""
DRAIN_TIMEOUT = 5.0
"""Seconds to hand on what a dead bridge had still sent."""
TERMINATE_GRACE = 0.5
GONE_TIMEOUT = 10.0
EXEC_GRACE = 15.0
INIT_TIMEOUT = 30.0

OnGone = Callable[["Sandbox"], Awaitable[None]]


class Sandbox:
    """One running sandbox. `failure` says why it is gone, once it is gone; `limit_reached` names the limit if one was the reason."""

    def __init__(self, id: str, place: Place, process: Process, link: Link, logbook: Logbook, on_gone: OnGone) -> None:
        self.id, self.place = id, place
        self.failure: str | None = None
        self.limit_reached: str | None = None
        self._counted = (0, 0)
        self._process, self._link, self._logbook = process, link, logbook
        self._on_gone = on_gone
        self._gone = asyncio.Event()
        self._is_stopping = False
        self._is_used = asyncio.Event()
        self._met: list[dict[str, Any]] = []
        tree = Tree(process.pid, process.has_namespace, process.start_time)
        self._disk = Watcher(
            lambda: self.place.folder, tree, place.limits, min_free_mb=place.min_free_mb, on_limit=self._meet_limit,
            end=self._end_over_limit, read_quota=place.read_disk_use if place.quota is not None else None,
        )  # fmt: skip

    @property
    def handle(self) -> SandboxHandle:
        """What finds this sandbox again after the server was killed."""
        process, place = self._process, self.place
        return SandboxHandle(self.id, process.pid, process.start_time, place.cgroup, place.run_dir, place.folder, place.uid)

    @property
    def limits(self) -> Limits:
        """Those that it was started with."""
        return self.place.limits

    @property
    def usage_source(self) -> Source:
        return Source(self.id, self._process.pid, self.place.cgroup, self.place.limits, self.place.device)

    async def usage(self) -> dict[str, Any]:
        """What it uses just now, as the wire shows it."""
        found, use = await asyncio.to_thread(lambda: (read_usage(self.usage_source), self._disk.latest()))
        return {**found, "diskBytes": use.bytes, "files": use.files}

    def limits_met(self) -> list[dict[str, Any]]:
        """Limits that it met and outlived since this was last asked, as data of `limit.reached`. Reads two small files."""
        met, self._met = self._met, []
        if self.place.cgroup is None:
            return met
        counted = cgroups.count_met_limits(self.place.cgroup)
        memory, processes = (now > before for now, before in zip(counted, self._counted, strict=True))
        self._counted = counted
        limits, found = self.limits, met
        if memory:  # only on kernels without memory.oom.group: elsewhere the whole sandbox ends
            message = f"a process was ended because the sandbox ran out of memory: it may use {limits.memory_mb} MiB (memory_mb)"
            found.append({"limit": "memory", "message": message})
        if processes:
            message = f"the sandbox may have {limits.max_processes} processes and threads (max_processes); more were refused"
            found.append({"limit": "processes", "message": message})
        return found

    def _meet_limit(self, limit: str, message: str) -> None:
        if all(data["limit"] != limit for data in self._met):  # one that comes and goes is told once
            self._met.append({"limit": limit, "message": message})
        self._logbook.system(message)

    def _end_over_limit(self, reason: str) -> None:
        self.failure, self.limit_reached = self.failure or reason, "disk"
        self._process.kill()

    @property
    def is_alive(self) -> bool:
        """Asks the kernel, which knows before we have been told."""
        return self.failure is None and self._process.is_alive()

    async def ready(self) -> None:
        await self._link.ready()

    async def init(self, agent: dict[str, Any], options: dict[str, Any], transcript: list[Any], timeout: float = INIT_TIMEOUT) -> None:
        """Give the bridge its agent and the conversation so far. Raises SandboxFailed with the bridge's reason when it refuses, and
        SandboxUnresponsive when it has died or does not answer: another one may do better.
        """
        self._is_used.set()
        try:
            self._require_alive()
            async with asyncio.timeout(timeout):
                answer = await self._link.ask("init", agent=agent, options=options, transcript=transcript)
        except TimeoutError as error:
            raise SandboxUnresponsive(f"the agent's process did not take its agent within {timeout:g} s") from error
        except SandboxFailed as error:
            raise SandboxUnresponsive(error.message) from error
        if answer["ev"] == "error":
            raise SandboxFailed(f"the agent could not be initialized: {answer['error']}")

    async def query(self, turn_id: str, content: str | list[Any], options: dict[str, Any]) -> None:
        """Start a turn; what comes of it arrives in `batches`."""
        self._require_alive()
        await self._link.query(turn_id, content=content, options=options)

    def batches(self) -> AsyncIterator[list[dict[str, Any]]]:
        """The events of turns, and logs, in order, those that came together in one list; ends when the sandbox is gone.

        For one consumer: asking for more acknowledges.
        """
        return self._link.batches()

    async def interrupt(self, turn_id: str) -> None:
        self._require_alive()
        await self._link.tell("interrupt", turn_id=turn_id)

    async def exec(
        self, command: str, *, timeout: float = 30, cwd: str | None = None, env: dict[str, str] | None = None, stdin: str | None = None
    ) -> ExecResult:
        """Run a shell command beside a turn that may be running. Raises SandboxFailed, Timeout."""
        self._require_alive()
        given = {"cwd": cwd, "env": env, "stdin": stdin}
        fields = {name: value for name, value in given.items() if value is not None}
        try:
            async with asyncio.timeout(timeout + EXEC_GRACE):
                answer = await self._link.ask("exec", command=command, timeout=timeout, **fields)
        except TimeoutError as error:
            raise Timeout(f"the sandbox did not answer within {timeout + EXEC_GRACE:g} s") from error
        if answer["ev"] == "error":
            raise SandboxFailed(answer["error"])
        return ExecResult(*(answer[name] for name in ExecResult._fields))

    def logs(self, after: int = -1) -> list[dict[str, Any]]:
        return self._logbook.read(after)

    def _require_alive(self) -> None:
        if self.failure is not None:
            raise SandboxFailed(self.failure)

    # The end

    async def live(self) -> None:
        """Run the connection until the sandbox is gone, and clean up behind it. Awaited by one task of the owner."""
        reading, exiting = asyncio.ensure_future(self._link.run()), asyncio.ensure_future(self._process.exited())
        watching = asyncio.ensure_future(self._watch_disk())
        try:
            await asyncio.wait((reading, exiting), return_when=asyncio.FIRST_COMPLETED)
            if not exiting.done() and reading.exception() is None:
                await asyncio.wait((exiting,), timeout=EXIT_GRACE)
            why = self._explain(reading, exiting)
            self._process.kill()
            await asyncio.wait((reading, exiting), timeout=0.0 if self._is_stopping else DRAIN_TIMEOUT)
            self.failure = self.failure or why
            await self._clean_up()
        finally:
            for task in (reading, exiting, watching):
                task.cancel()
            await asyncio.gather(reading, exiting, watching, return_exceptions=True)
            self._link.close(self.failure or STOPPED)
            self._gone.set()

    async def _watch_disk(self) -> None:
        """From its first use on: until then nothing runs in it that writes."""
        await self._is_used.wait()
        await self._disk.run()

    def _explain(self, reading: asyncio.Future[None], exiting: asyncio.Future[int]) -> str:
        broken = reading.exception() if reading.done() else None
        if isinstance(broken, ProtocolError):
            return f"the agent's process broke the bridge protocol: {broken}"
        if broken is not None:
            log.error("sandbox %s: its connection failed", self.id, exc_info=broken)
            return "the connection to the agent's process failed"
        if out_of_memory := self._explain_memory():
            return out_of_memory
        if exiting.done() and exiting.exception() is None:
            said = self._logbook.tail().splitlines()[-1:] if exiting.result() else []
            return f"the agent's process {launch.describe_exit(exiting.result())}" + (f": {said[0][:200]}" if said else "")
        return "the agent's process closed its connection"

    def _explain_memory(self) -> str | None:
        """By what the kernel has counted; a process that was killed says nothing about why."""
        whose = cgroups.find_oom(self.place.cgroup) if self.place.cgroup is not None else None
        if whose == "sandbox":
            self.limit_reached = self.limit_reached or ("memory" if self.failure is None else None)
            return (
                f"the sandbox ran out of memory: all that runs in it may use {self.limits.memory_mb} MiB together (memory_mb). "
                "Its processes were ended; the conversation and the files are kept"
            )
        if whose == "host":
            return "the host ran out of memory and ended the sandbox; the conversation and the files are kept"
        return None

    async def _clean_up(self) -> None:
        """After the kill: wait for the last process, then take back what was given."""
        try:
            async with asyncio.timeout(GONE_TIMEOUT):
                await self._process.gone()
        except TimeoutError:
            log.error("sandbox %s: process %d does not end", self.id, self._process.pid)
        self._link.close(self.failure or STOPPED)
        self._process.close()
        self._logbook.system(f"sandbox ended: {self.failure}")
        self._logbook.close()
        await self._on_gone(self)

    async def stop(self, grace: float = 5.0) -> None:
        """End every process of the sandbox: by asking, for `grace` seconds, then by force. Idempotent; the session's folder stays."""
        self._is_stopping = True
        self.failure = self.failure or STOPPED
        try:
            if grace > 0 and not self._gone.is_set():
                await self._ask_to_end(grace)
        finally:
            if not self._gone.is_set():
                self._process.kill()
                await asyncio.shield(self._gone.wait())

    async def _ask_to_end(self, grace: float) -> None:
        try:
            async with asyncio.timeout(grace):
                await self._link.tell("shutdown")
                await self._gone.wait()
        except (TimeoutError, SandboxFailed):
            self._process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TERMINATE_GRACE):
                    await self._gone.wait()
