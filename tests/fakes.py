"""Stand-ins that run in-process: sandboxes without a process, whose turns are written down as scripts.

A script is an async generator of bridge events for one turn. `FakeSandboxes` keeps every sandbox it gave away in `claimed`,
so that a test can look at what it was told, or let it die.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from ash import models, protocol
from ash.errors import CapacityReached, SandboxFailed, SandboxUnresponsive
from ash.models import SandboxHandle
from ash.sandbox import ExecResult, Limits, Mount, PoolStatus, SandboxSpec, Ticket

Json = dict[str, Any]
USAGE = {"source": "proc", "memoryBytes": 5000000, "processes": 3, "cpuSeconds": 0.25}
Script = Callable[["FakeSandbox", str, Any, Json], AsyncIterator[Json]]


# What a bridge says in a turn


def text_of(content: Any) -> str:
    return content if isinstance(content, str) else " ".join(block.get("text", f"[{block['type']}]") for block in content)


def assistant(text: str, **blocks: Any) -> Json:
    content = [{"type": "text", "text": text}, *blocks.get("more", [])]
    usage = {"input_tokens": 3, "output_tokens": 5}
    head = {"id": "msg_1", "type": "message", "role": "assistant", "model": "fake"}
    message = {**head, "content": content, "stop_reason": "end_turn", "usage": usage}
    return {"type": "assistant", "message": message, "parent_tool_use_id": None, "session_id": "", "uuid": models.new_id()}


def delta(text: str) -> Json:
    event = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}
    return {"type": "stream_event", "event": event, "parent_tool_use_id": None, "session_id": "", "uuid": models.new_id()}


def result(text: str) -> Json:
    return {"type": "result", "subtype": "success", "is_error": False, "num_turns": 1, "result": text, "total_cost_usd": 0.0}


async def echo(sandbox: FakeSandbox, turn_id: str, content: Any, options: Json) -> AsyncIterator[Json]:
    """Answers with what it was told; piece by piece when partial messages are wanted."""
    answer = f"You said: {text_of(content)}"
    if options.get("includePartialMessages"):
        for word in answer.split(" "):
            yield {"ev": "delta", "turn_id": turn_id, "data": delta(word)}
    yield {"ev": "message", "turn_id": turn_id, "data": assistant(answer)}
    yield {"ev": "message", "turn_id": turn_id, "data": result(answer)}
    yield {"ev": "done", "turn_id": turn_id, "status": "completed"}


async def fail(sandbox: FakeSandbox, turn_id: str, content: Any, options: Json) -> AsyncIterator[Json]:
    """Ends its turn with an error."""
    yield {"ev": "error", "turn_id": turn_id, "error": "the model refused"}
    yield {"ev": "done", "turn_id": turn_id, "status": "failed", "error": "the model refused"}


async def die(sandbox: FakeSandbox, turn_id: str, content: Any, options: Json) -> AsyncIterator[Json]:
    """Says something, and then its sandbox is gone."""
    yield {"ev": "message", "turn_id": turn_id, "data": assistant("I was about to say")}
    sandbox.vanish("the bridge ended with signal 9 in the middle of a turn")


async def exhaust(sandbox: FakeSandbox, turn_id: str, content: Any, options: Json) -> AsyncIterator[Json]:
    """Says something, and then the sandbox is gone because it ran out of memory."""
    yield {"ev": "message", "turn_id": turn_id, "data": assistant("I was about to say")}
    sandbox.limit_reached = "memory"
    sandbox.vanish("the sandbox ran out of memory")


async def wait(sandbox: FakeSandbox, turn_id: str, content: Any, options: Json) -> AsyncIterator[Json]:
    """Says something and then waits: to be interrupted, or for `proceed`."""
    yield {"ev": "message", "turn_id": turn_id, "data": assistant("Let me think")}
    done = {asyncio.create_task(sandbox.proceed.wait()), asyncio.create_task(sandbox.interrupted.wait())}
    _, pending = await asyncio.wait(done, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    yield {"ev": "done", "turn_id": turn_id, "status": "interrupted" if sandbox.interrupted.is_set() else "completed"}


class FakeSandbox:
    """One sandbox that is only memory. `inits` and `queries` hold what it was told."""

    def __init__(self, owner: FakeSandboxes, spec: SandboxSpec) -> None:
        self.id = models.new_id()
        self.spec = spec
        self.handle = SandboxHandle(self.id, 0, 0, None, os.path.join(owner.data_dir, "run", self.id), spec.session_dir, None)
        self.failure: str | None = None
        self.is_deaf = False
        self.limit_reached: str | None = None
        self.met: list[Json] = []
        self.inits: list[tuple[Json, Json, list[Json]]] = []
        self.queries: list[tuple[str, Any, Json]] = []
        self.commands: list[tuple[str, Json]] = []
        self.interrupted, self.proceed = asyncio.Event(), asyncio.Event()
        self.lines: list[Json] = []
        self._owner = owner
        self._events: asyncio.Queue[Json | None] = asyncio.Queue()
        self._turn: asyncio.Task[None] | None = None
        self._count = 0

    @property
    def is_gone(self) -> bool:
        return self.failure is not None

    async def init(self, agent: Json, options: Json, transcript: list[Json], timeout: float = 30.0) -> None:
        if self.is_deaf:
            raise SandboxUnresponsive("the agent's process did not take its agent")
        self._require_alive()
        protocol.command("init", 1, agent=agent, options=options, transcript=transcript)
        self.inits.append((agent, options, transcript))

    async def query(self, turn_id: str, content: Any, options: Json) -> None:
        self._require_alive()
        protocol.command("query", 1, turn_id=turn_id, content=content, options=options)
        self.queries.append((turn_id, content, options))
        self.interrupted.clear()
        self._turn = asyncio.create_task(self._play(turn_id, content, options))

    async def _play(self, turn_id: str, content: Any, options: Json) -> None:
        async for event in self._owner.script(self, turn_id, content, options):
            self._count += 1
            self._events.put_nowait(protocol.decode_event(protocol.encode({**event, "n": self._count})))

    async def batches(self) -> AsyncIterator[list[Json]]:
        while (event := await self._events.get()) is not None:
            yield [event]

    async def interrupt(self, turn_id: str) -> None:
        self._require_alive()
        self.interrupted.set()

    async def exec(
        self, command: str, *, timeout: float = 30, cwd: str | None = None, env: dict[str, str] | None = None, stdin: str | None = None
    ) -> ExecResult:
        self._require_alive()
        self.commands.append((command, {"timeout": timeout, "cwd": cwd, "env": env, "stdin": stdin}))
        return ExecResult(0, f"ran {command}", stdin or "", False, False)

    async def usage(self) -> Json:
        return {**USAGE}

    def limits_met(self) -> list[Json]:
        met, self.met = self.met, []
        return met

    def logs(self, after: int = -1) -> list[Json]:
        return [line for line in self.lines if line["index"] > after]

    def log(self, text: str) -> None:
        self.lines.append({"index": len(self.lines), "level": "system", "text": text, "ts": models.now()})

    def vanish(self, reason: str) -> None:
        """The sandbox is gone all of a sudden, as if it had been killed."""
        if self.failure is None:
            self.failure = reason
            self._events.put_nowait(None)

    async def stop(self, grace: float = 5.0) -> None:
        await self._owner.gate.wait()
        if self._turn is not None:
            self._turn.cancel()
            await asyncio.gather(self._turn, return_exceptions=True)
        self.vanish("the sandbox was stopped")
        await self._owner.forget(self)

    def _require_alive(self) -> None:
        if self.failure is not None:
            raise SandboxFailed(self.failure)


class FakeSandboxes:
    """Takes the arguments of the real one. `script` says what a turn does; `broken` is the error every claim fails with."""

    def __init__(
        self, *, data_dir: str, isolation: str, limits: Limits, warm: int, maximum: int, start_timeout: float, orphan_timeout: float,
        python: str = "", cgroup_root: str = "", rootfs: str = "", mounts: tuple[Mount, ...] = (), ptrace: bool = False,
        on_open: Callable[[str, str], Awaitable[None]], on_close: Callable[[str], Awaitable[None]],
        min_free_memory_mb: int = 0, min_free_disk_mb: int = 0, most_waiting: int = 100,
    ) -> None:  # fmt: skip
        self.data_dir, self.maximum, self.limits = data_dir, maximum, limits
        self.script: Script = echo
        self.broken: Exception | None = None
        self.refusal: Exception | None = None  # what is said at the door
        self.deaf = 0  # that many sandboxes more answer no init
        self.on_pressure: Callable[[bool], Awaitable[bool]] | None = None
        self.gate = asyncio.Event()  # claims and stops wait for it
        self.gate.set()
        self.claimed: list[FakeSandbox] = []
        self.reaped: list[SandboxHandle] = []
        self._alive: dict[str, FakeSandbox] = {}
        self._on_open, self._on_close = on_open, on_close

    async def __aenter__(self) -> FakeSandboxes:
        return self

    async def __aexit__(self, *_: object) -> None:
        for sandbox in list(self._alive.values()):
            await sandbox.stop(grace=0)

    @asynccontextmanager
    async def admitted(self, spec: SandboxSpec) -> AsyncIterator[Ticket]:
        await self.check(is_new=True)
        yield Ticket()

    async def check_wake(self) -> None:
        await self.check(is_new=False)

    async def check(self, *, is_new: bool) -> None:
        if self.refusal is not None:
            raise self.refusal
        while len(self._alive) >= self.maximum:
            if self.on_pressure is None or not await self.on_pressure(is_new):
                raise CapacityReached("Sandbox capacity reached")

    async def claim(self, spec: SandboxSpec, ticket: Ticket | None = None) -> FakeSandbox:
        await self.gate.wait()
        if self.broken is not None:
            raise self.broken
        await self.check(is_new=spec.fresh)
        sandbox = FakeSandbox(self, spec)
        sandbox.is_deaf, self.deaf = self.deaf > 0, max(0, self.deaf - 1)
        for name in ("workspace", "home", "agent"):
            os.makedirs(os.path.join(spec.session_dir, name), exist_ok=True)
        os.makedirs(os.path.join(sandbox.handle.run_dir, "gw"))
        await self._on_open(sandbox.id, os.path.join(sandbox.handle.run_dir, "gw", "gateway.sock"))
        self._alive[sandbox.id] = sandbox
        self.claimed.append(sandbox)
        return sandbox

    async def forget(self, sandbox: FakeSandbox) -> None:
        if self._alive.pop(sandbox.id, None) is not None:
            await self._on_close(sandbox.id)
            shutil.rmtree(sandbox.handle.run_dir, ignore_errors=True)

    async def copy_folder(self, source: str, target: str) -> None:
        await asyncio.to_thread(shutil.copytree, source, target, symlinks=True)

    def status(self) -> PoolStatus:
        alive = len(self._alive)
        return PoolStatus(alive, 0, 0, alive, self.maximum, "none", {"memory": "not limited (fake)"}, [], 0, len(self.claimed))

    async def usages(self) -> dict[str, Json]:
        return {id: {**USAGE} for id in self._alive}

    def pressure(self) -> dict[str, Json]:
        waits = {"some10": 1.5, "full10": 0.5}
        return {"host": {"cpu": waits, "memory": waits, "io": None}}

    async def reap(self, handles: Iterable[SandboxHandle]) -> int:
        self.reaped += handles
        return len(self.reaped)
