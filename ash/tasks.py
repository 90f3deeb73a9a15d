"""The owner of background tasks: named, their errors logged, all cancelled and awaited at the end. Nothing else starts tasks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)


class Tasks:
    """An async context manager that owns the tasks started with `start`; leaving it cancels what still runs."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Tasks:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.cancel()

    def start(
        self, work: Coroutine[Any, Any, Any], name: str, on_error: Callable[[BaseException], None] | None = None
    ) -> asyncio.Task[Any]:
        """Run `work`. An error that nobody awaits is logged and handed to `on_error`."""
        task = asyncio.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(lambda done: self._finished(done, on_error))
        return task

    def _finished(self, task: asyncio.Task[Any], on_error: Callable[[BaseException], None] | None) -> None:
        self._running.discard(task)
        if task.cancelled() or task.exception() is None:
            return
        error = task.exception()
        log.error("task %s failed", task.get_name(), exc_info=error)
        if on_error is not None and error is not None:
            on_error(error)

    async def wait(self, timeout: float | None = None) -> None:
        """Until every task has ended by itself, or `timeout` seconds have passed."""
        if self._running:
            await asyncio.wait(set(self._running), timeout=timeout)

    async def cancel(self) -> None:
        pending = set(self._running)
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.gather(*pending, return_exceptions=True)
