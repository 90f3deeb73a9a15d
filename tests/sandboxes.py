"""A pool of real sandboxes for tests, an agent folder for them, and waits with a bound. No fixtures, no fakes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ash.isolation.headroom import Headroom, Reading
from ash.models import new_id
from ash.sandbox import Limits, Sandbox, Sandboxes, SandboxSpec

FAKE_BRIDGE = str(Path(__file__).parent / "isolation" / "fake_bridge.py")
LIMITS = Limits(memory_mb=256, cpu_percent=100, max_processes=40, max_file_mb=10)


PLENTY = Reading(memory_mb=1 << 20, disk_mb=1 << 20, descriptors=1 << 20, processes=1 << 20, cpu_pressure=0.0)


class SaidHeadroom(Headroom):
    """A host that has left what the test says; the one that runs the tests may be busy."""

    def __init__(self, reading: Reading = PLENTY, **floors: int) -> None:
        super().__init__("/", **floors)
        self.said = reading

    def say(self, **changes: Any) -> None:
        self.said = PLENTY._replace(**changes)
        self.look_again()

    def measure(self) -> Reading:
        return self.said


class Pool(Sandboxes):
    """Sandboxes that remember which gateway sockets were opened and closed."""

    def __init__(self, data_dir: str, **settings: Any) -> None:
        self.data_dir = data_dir
        self.opened: dict[str, str] = {}
        self.closed: list[str] = []
        given = {"isolation": "bwrap", "limits": LIMITS, "warm": 0, "maximum": 8, "start_timeout": 20.0, "orphan_timeout": 20.0}
        self.headroom = settings.setdefault("headroom", SaidHeadroom())
        super().__init__(data_dir=data_dir, **{**given, "on_open": self._open, "on_close": self._close, **settings})

    async def _open(self, id: str, path: str) -> None:
        self.opened[id] = path

    async def _close(self, id: str) -> None:
        self.closed.append(id)

    def session_dir(self, session_id: str) -> Path:
        return Path(self.data_dir, "sessions", session_id)

    async def __aenter__(self) -> Pool:
        await super().__aenter__()
        return self

    async def take(self, session_id: str = "", *, agent: str = "", fresh: bool = True) -> Sandbox:
        """Claim a sandbox for a session of the simple agent."""
        session_id = session_id or new_id()
        return await self.claim(SandboxSpec(session_id, str(self.session_dir(session_id)), agent or make_agent(self.data_dir), fresh))


def make_agent(data_dir: str, name: str = "digest-1", **files: str) -> str:
    folder = Path(data_dir, "agents", name)
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in {"CLAUDE.md": "be kind", **files}.items():
        (folder / file).write_text(text)
    return str(folder)


async def until(claim: Callable[[], Any], timeout: float = 5.0) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + timeout
    while not claim():
        assert time.monotonic() < deadline, "waited too long"
        await asyncio.sleep(0.01)


async def limits_met(sandbox: Sandbox, timeout: float = 5.0) -> list[str]:
    """The limits that a sandbox met; the news may come a moment after the error that it explains."""
    met: list[str] = []

    def has_met() -> bool:
        met.extend(found["limit"] for found in sandbox.limits_met())
        return bool(met)

    await until(has_met, timeout)
    return met


async def one_by_one(batches: AsyncIterator[list[dict[str, Any]]]) -> AsyncIterator[dict[str, Any]]:
    """The events of `batches`; asks for the next list only when the last is used up."""
    async for events in batches:
        for event in events:
            yield event


async def end_of(sandbox: Sandbox) -> list[dict[str, Any]]:
    """Every event up to the sandbox's end."""
    async with asyncio.timeout(10):
        return [event async for event in one_by_one(sandbox.batches())]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def leftovers(data_dir: str) -> list[str]:
    """Run folders and slots that are still there."""
    found = [entry.name for entry in os.scandir(Path(data_dir, "run")) if entry.is_dir() and not entry.name.startswith("etc-")]
    return found + os.listdir(Path(data_dir, "sessions", ".slots"))


@asynccontextmanager
async def open_pool(data_dir: str, **settings: Any) -> AsyncIterator[Pool]:
    pool = Pool(data_dir, **settings)
    async with pool:
        yield pool
