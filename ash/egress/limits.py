"""How much goes out of a sandbox: bytes per second, what was counted per host, and which refusals are worth an event.

Keeps numbers only, of bounded size whatever a sandbox does; it neither waits nor writes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from ash.egress.rules import Refusal
from ash.models import Json

MIB = 1024 * 1024
MAX_HOSTS = 100
"""Hosts that are counted by name; the others are counted together."""
OTHERS = "(others)"
BURST_SECONDS = 0.25
"""What was not used may be used later, up to so much."""
REPEAT_SECONDS = 60.0
"""The same refusal is reported again after this time, with the number of those in between."""
EVENT_BURST, EVENTS_PER_SECOND = 50, 0.2
"""Refusals of different hosts that are reported at once, and then."""

Clock = Callable[[], float]


class Bucket:
    """A rate that is kept over time; what is taken too early is paid by waiting."""

    def __init__(self, burst_seconds: float = BURST_SECONDS, clock: Clock = time.monotonic) -> None:
        self._burst, self._clock = burst_seconds, clock
        self._due = 0.0

    def take(self, amount: float, rate: float) -> float:
        """Seconds to wait after taking `amount` at `rate` a second. A rate of 0 is no limit."""
        if rate <= 0:
            return 0.0
        now = self._clock()
        self._due = max(self._due, now - self._burst) + amount / rate
        return max(0.0, self._due - now)


class HostCount:
    __slots__ = ("connections", "down", "up")

    def __init__(self) -> None:
        self.connections = self.up = self.down = 0


class Account:
    """What one sandbox used since it began."""

    def __init__(self) -> None:
        self.hosts: dict[str, HostCount] = {}
        self.refused = 0
        self.bytes = 0
        self.bucket = Bucket()

    def count_for(self, host: str) -> HostCount:
        if host not in self.hosts and len(self.hosts) >= MAX_HOSTS:
            host = OTHERS
        return self.hosts.setdefault(host, HostCount())

    def shown(self) -> Json:
        hosts = {
            name: {"connections": count.connections, "bytesUp": count.up, "bytesDown": count.down} for name, count in self.hosts.items()
        }  # fmt: skip
        return {"hosts": hosts, "refused": self.refused}

    @property
    def is_empty(self) -> bool:
        return not self.hosts and not self.refused


class Totals:
    """What all sandboxes used since the server's start."""

    def __init__(self) -> None:
        self.connections = self.up = self.down = self.failed = 0
        self.refused: Counter[str] = Counter()


class _Seen(NamedTuple):
    at: float
    more: int


class Reports:
    """Which refusals of one sandbox become events: an agent that tries the same again and again must not fill its session's log."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[tuple[str, int, str], _Seen] = {}
        self._bucket = Bucket(EVENT_BURST / EVENTS_PER_SECOND, clock)
        self._silent = 0

    def take(self, host: str, port: int, refusal: Refusal) -> Json | None:
        """The event's data, or None for a refusal that is only counted."""
        key, now = (host, port, refusal.reason), self._clock()
        seen = self._seen.pop(key, None)
        if seen is not None and now - seen.at < REPEAT_SECONDS:
            self._seen[key] = seen._replace(more=seen.more + 1)
            return None
        if self._bucket.take(0, EVENTS_PER_SECOND) > 0:
            self._silent += 1
            return None
        _ = self._bucket.take(1, EVENTS_PER_SECOND)
        self._remember(key, now)
        data: Json = {"host": host, "port": port, **refusal._asdict()}
        repeated, unnamed, self._silent = seen.more if seen is not None else 0, self._silent, 0
        return {**data, **({"repeated": repeated} if repeated else {}), **({"unnamed": unnamed} if unnamed else {})}

    def _remember(self, key: tuple[str, int, str], now: float) -> None:
        if len(self._seen) >= 4 * MAX_HOSTS:
            self._seen.pop(next(iter(self._seen)))
        self._seen[key] = _Seen(now, 0)
