"""A start that takes too long gets a second one beside it; whichever is ready first is taken, and nothing of the other stays."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ash.errors import SandboxFailed
from ash.isolation.running import Sandbox
from ash.tasks import Tasks

Start = Callable[[], Awaitable[Sandbox]]
_Attempt = asyncio.Task[Sandbox | Exception]


async def first_ready(start: Start, second: Start, patience: float, may_hedge: Callable[[], bool], tasks: Tasks) -> Sandbox:
    """What `start` gives, or after `patience` seconds whichever of the two comes first. Raises the first one's error when both fail.

    When nothing comes of it, or the caller is cancelled, both have ended on return; of a race that was won, the loser is ended in the
    background.
    """
    attempts: list[_Attempt] = [tasks.start(_try(start), "start sandbox")]
    winner: _Attempt | None = None
    try:
        await asyncio.wait(attempts, timeout=patience)
        if not attempts[0].done() and may_hedge():
            attempts.append(tasks.start(_try(second), "start sandbox, second attempt"))
        winner = await _find_winner(attempts)
    finally:
        losers = [attempt for attempt in attempts if attempt is not winner]
        if losers:
            ending = tasks.start(_discard(losers), "discard slow start")
            if winner is None:
                await asyncio.shield(ending)
    return _result(winner or attempts[0])


async def _try(start: Start) -> Sandbox | Exception:
    """An error is for who asked, not for the owner of the task."""
    try:
        return await start()
    except Exception as error:  # noqa: BLE001 - the edge of an attempt: raised again in `_result`
        return error


async def _find_winner(attempts: list[_Attempt]) -> _Attempt | None:
    pending = set(attempts)
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for attempt in done:
            if not attempt.cancelled() and isinstance(attempt.result(), Sandbox):
                return attempt
    return None


async def _discard(attempts: list[_Attempt]) -> None:
    for attempt in attempts:
        attempt.cancel()
    for ended in await asyncio.gather(*attempts, return_exceptions=True):
        if isinstance(ended, Sandbox):
            await ended.stop(grace=0)


def _result(attempt: _Attempt) -> Sandbox:
    if attempt.cancelled():  # by the owner of the tasks, which is closing
        raise SandboxFailed("the server is shutting down")
    ended = attempt.result()
    if isinstance(ended, Exception):
        raise ended
    return ended
