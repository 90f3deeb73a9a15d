"""When a call that was refused is tried again, and after how long: the official client's rules, within a time budget. Pure."""

from __future__ import annotations

import email.utils
import random
import time

from ash.errors import ModelRefused
from ash.providers import Timing

_RETRIED = (408, 409, 429)
_FIRST_DELAY, _MAX_DELAY = 0.5, 8.0


def find_delay(refusal: ModelRefused, attempt: int, elapsed: float, timing: Timing) -> float | None:
    """Seconds to wait before the next try, `attempt` tries (from 0) having failed; None when there should be none."""
    if attempt >= timing.retries or not should_retry(refusal):
        return None
    asked = parse_retry_after(refusal.headers)
    delay = asked if asked is not None and asked > 0 else backoff(attempt)
    return delay if elapsed + delay <= timing.retry_budget else None


def should_retry(refusal: ModelRefused) -> bool:
    told = refusal.headers.get("x-should-retry")
    if told in ("true", "false"):
        return told == "true"
    return refusal.status in _RETRIED or refusal.status >= 500


def backoff(attempt: int) -> float:
    return float(min(_FIRST_DELAY * 2**attempt, _MAX_DELAY) * (1 - 0.25 * random.random()))


def parse_retry_after(headers: dict[str, str]) -> float | None:
    """Seconds from `retry-after-ms` or `retry-after` (a number or a date); None when there is neither, or nonsense."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            return float(headers[name]) / unit
        except (KeyError, ValueError):
            continue
    date = email.utils.parsedate_tz(headers.get("retry-after", ""))
    return None if date is None else email.utils.mktime_tz(date) - time.time()
