"""One way to interrupt whatever a thread is waiting for: a socket, a process or a pause. Knows none of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interrupted(Exception):
    """The turn or command was interrupted; raised in the thread that worked for it."""


class Interrupt:
    """Set once, from any thread. What blocks registers how to be woken with `calling`."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._actions: list[Callable[[], None]] = []

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        with self._lock:
            self._event.set()
            actions = list(self._actions)
        for action in actions:
            action()

    def check(self) -> None:
        """Raise Interrupted when set."""
        if self._event.is_set():
            raise Interrupted

    def pause(self, seconds: float) -> None:
        """Sleep, or raise Interrupted as soon as set."""
        if self._event.wait(seconds):
            raise Interrupted

    @contextmanager
    def calling(self, action: Callable[[], None]) -> Iterator[None]:
        """While the block runs, `set` also calls `action`; at once when it was set before. `action` must not raise."""
        with self._lock:
            self._actions.append(action)
            already = self._event.is_set()
        if already:
            action()
        try:
            yield
        finally:
            with self._lock:
                self._actions.remove(action)
