"""What a sandbox may make the gateway hold and read: bytes in flight, the time a body takes, how its JSON is parsed.

Everything here comes from the sandbox and is hostile. No limit of one sandbox is used up by another, except the sum of all.
"""

from __future__ import annotations

import asyncio
import json
import json.scanner
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from aiohttp import web

from ash.errors import ModelRefused

BODY_SECONDS = 60.0
MAX_SANDBOX_BYTES = 128 * 1024 * 1024
MAX_TOTAL_BYTES = 512 * 1024 * 1024
MAX_PARTS = 1_000_000
"""Brackets, braces and commas in a body, counted also inside texts: what parsing costs goes by them."""
LARGE_BYTES = 256 * 1024
"""From here on a body is no longer read in the loop: up to here the worst takes some ten milliseconds."""
_PART_BYTES = 32
"""What a part takes in memory at least, on top of its own text."""

T = TypeVar("T")


class Lease:
    """What one call holds. `take` before holding more; all of it is given back when the call ends."""

    def __init__(self, intake: Intake, sandbox_id: str) -> None:
        self._intake, self._sandbox_id, self.size = intake, sandbox_id, 0

    def take(self, size: int) -> None:
        self._intake.check(self._sandbox_id, size)
        self._intake.held[self._sandbox_id] += size
        self.size += size


class Intake:
    """Counts what every sandbox's calls hold, and reads their bodies."""

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self._locks: dict[str, asyncio.Lock] = {}
        self.held: dict[str, int] = defaultdict(int)

    def check(self, sandbox_id: str, size: int) -> None:
        if self.held.get(sandbox_id, 0) + size > MAX_SANDBOX_BYTES:
            text = f"The model calls of this sandbox hold more than {MAX_SANDBOX_BYTES} bytes at once: make fewer at a time."
            raise ModelRefused(text, status=429, kind="rate_limit_error")
        if sum(self.held.values()) + size > MAX_TOTAL_BYTES:
            raise ModelRefused("The gateway is busy with other large model calls: try again.", status=429, kind="rate_limit_error")

    @contextmanager
    def lease(self, sandbox_id: str) -> Iterator[Lease]:
        lease = Lease(self, sandbox_id)
        try:
            yield lease
        finally:
            self.held[sandbox_id] -= lease.size
            if not self.held[sandbox_id]:
                del self.held[sandbox_id]

    async def read(self, request: web.Request, lease: Lease, limit: int) -> bytes:
        """The body, in chunks so that what is held is counted while it comes."""
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.content.iter_any():
                    lease.take(len(chunk))
                    if lease.size > limit:
                        raise ModelRefused(f"The request is larger than {limit} bytes.", status=413, kind="request_too_large")
                    chunks.append(chunk)
        except TimeoutError as error:
            text = f"The request did not arrive whole within {BODY_SECONDS:g} seconds."
            raise ModelRefused(text, status=408, kind="timeout_error") from error
        return b"".join(chunks)

    async def parse(self, sandbox_id: str, body: bytes, lease: Lease) -> Any:
        """The body's JSON. Raises ValueError or RecursionError for what is none, ModelRefused for what has too many parts."""
        if len(body) <= LARGE_BYTES:
            return json.loads(body, object_pairs_hook=_unique)
        async with self._one_at_a_time(sandbox_id):
            loop = asyncio.get_running_loop()
            parts = await loop.run_in_executor(self._threads, count_parts, body)
            if parts > MAX_PARTS:
                text = f"The request has more than {MAX_PARTS} brackets, braces and commas."
                raise ModelRefused(text, status=400, kind="invalid_request_error")
            lease.take(parts * _PART_BYTES)
            return await loop.run_in_executor(self._threads, parse_fairly, body)

    async def examine(self, size: int, function: Callable[[Any], T], value: Any) -> T:
        """`function` of what was parsed from a body of `size` bytes; of a large one apart from the loop."""
        if size <= LARGE_BYTES:
            return function(value)
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, value)

    @asynccontextmanager
    async def _one_at_a_time(self, sandbox_id: str) -> AsyncIterator[None]:
        """The few threads take one body of each sandbox, so that none waits for all of another's."""
        lock = self._locks.setdefault(sandbox_id, asyncio.Lock())
        async with lock:
            yield

    def forget(self, sandbox_id: str) -> None:
        """The sandbox is gone."""
        self._locks.pop(sandbox_id, None)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that is there twice the provider may take the one that was not looked at here."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def count_parts(body: bytes) -> int:
    return sum(body.count(mark) for mark in (b"[", b"{", b","))


def parse_fairly(body: bytes) -> Any:
    """Like json.loads, but other threads get their turn in between: the parser in C keeps them all waiting to its end."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    decoder.scan_once = json.scanner.py_make_scanner(decoder)  # type: ignore[attr-defined]  # only the stubs lack it
    return decoder.decode(body.decode(json.detect_encoding(body), "surrogatepass"))
