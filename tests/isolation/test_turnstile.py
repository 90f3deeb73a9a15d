"""The queue before cold starts: who goes first, who is refused, and that no place is ever lost."""

from __future__ import annotations

import asyncio

import pytest

from ash.errors import Overloaded
from ash.isolation.turnstile import Turnstile


async def line_up(turnstile: Turnstile, *names: str) -> tuple[list[str], list[asyncio.Task[None]]]:
    """Who entered, in order; names that begin with `wake` are urgent. Each leaves only when told to."""
    entered: list[str] = []

    async def enter(name: str) -> None:
        await turnstile.enter(is_urgent=name.startswith("wake"))
        entered.append(name)

    tasks = [asyncio.create_task(enter(name)) for name in names]
    await settle()
    return entered, tasks


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_so_many_go_at_once_and_the_others_follow_one_by_one() -> None:
    turnstile = Turnstile(at_once=2, most_waiting=10, patience=5)
    entered, _ = await line_up(turnstile, "a", "b", "c", "d")
    assert (entered, turnstile.waiting) == (["a", "b"], 2)
    turnstile.leave()
    await settle()
    assert entered == ["a", "b", "c"]


async def test_who_wakes_passes_who_is_new() -> None:
    turnstile = Turnstile(at_once=1, most_waiting=10, patience=5)
    entered, _ = await line_up(turnstile, "first", "new", "wake 1", "wake 2")
    for _ in range(3):
        turnstile.leave()
        await settle()
    assert entered == ["first", "wake 1", "wake 2", "new"]


async def test_one_too_many_is_told_when_to_come_again() -> None:
    turnstile = Turnstile(at_once=1, most_waiting=2, patience=5)
    turnstile.took(4.0)
    await line_up(turnstile, "in", "waits", "waits too")
    with pytest.raises(Overloaded) as refused:
        await turnstile.enter(is_urgent=False)
    assert refused.value.retry_after == 12.0, "two wait, and each start takes four seconds"
    turnstile.check(is_urgent=True)


async def test_who_waited_too_long_is_refused_and_keeps_no_place() -> None:
    turnstile = Turnstile(at_once=1, most_waiting=2, patience=0.01)
    await turnstile.enter(is_urgent=False)
    with pytest.raises(Overloaded):
        await turnstile.enter(is_urgent=False)
    assert turnstile.waiting == 0
    turnstile.leave()
    assert turnstile.is_free


async def test_a_place_given_to_somebody_who_just_left_goes_on_to_the_next() -> None:
    turnstile = Turnstile(at_once=1, most_waiting=5, patience=5)
    entered, tasks = await line_up(turnstile, "in", "leaves", "next")
    tasks[1].cancel()
    turnstile.leave()  # before the one that leaves has noticed
    await settle()
    assert entered == ["in", "next"]
    entered, tasks = await line_up(turnstile, "later")
    turnstile.leave()
    tasks[0].cancel()  # it has the place, and goes without having used it
    await asyncio.gather(*tasks, return_exceptions=True)
    assert turnstile.is_free


def test_what_is_slow_is_measured() -> None:
    turnstile = Turnstile(at_once=1, most_waiting=1, patience=1)
    assert turnstile.slow() is None
    for hundredths in range(1, 21):
        turnstile.took(hundredths / 100)
    assert (turnstile.slow(), round(turnstile.typical(), 3)) == (0.19, 0.105)
