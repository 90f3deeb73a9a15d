"""Rates, counts and reports, on a clock that the test moves."""

from __future__ import annotations

from ash.egress.limits import EVENT_BURST, MAX_HOSTS, OTHERS, REPEAT_SECONDS, Account, Bucket, Reports
from ash.egress.rules import Refusal

REFUSAL = Refusal("not_allowed", "no", "ask")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_what_is_taken_too_early_has_to_be_waited_for() -> None:
    clock = Clock()
    bucket = Bucket(burst_seconds=0.5, clock=clock)
    assert bucket.take(50, 100) == 0  # the burst
    assert bucket.take(100, 100) == 1.0
    clock.now += 1.0
    assert bucket.take(0, 100) == 0
    clock.now += 60.0
    assert bucket.take(100, 100) == 0.5  # unused time is not saved up beyond the burst
    assert bucket.take(10**9, 0) == 0  # no limit


def test_hosts_beyond_the_most_are_counted_together() -> None:
    account = Account()
    for number in range(MAX_HOSTS + 50):
        account.count_for(f"h{number}.test").connections += 1
    hosts = account.shown()["hosts"]
    assert len(hosts) == MAX_HOSTS + 1
    assert hosts[OTHERS]["connections"] == 50


def test_the_same_refusal_is_reported_once_a_minute_with_the_number_of_the_others() -> None:
    clock = Clock()
    reports = Reports(clock)
    assert reports.take("a.test", 443, REFUSAL) == {"host": "a.test", "port": 443, "reason": "not_allowed", "message": "no", "hint": "ask"}
    assert [reports.take("a.test", 443, REFUSAL) for _ in range(20)] == [None] * 20
    assert reports.take("a.test", 80, REFUSAL) is not None
    clock.now += REPEAT_SECONDS
    again = reports.take("a.test", 443, REFUSAL)
    assert again is not None
    assert again["repeated"] == 20


def test_refusals_of_ever_new_hosts_do_not_flood_the_log() -> None:
    clock = Clock()
    reports = Reports(clock)
    given = sum(reports.take(f"h{number}.test", 443, REFUSAL) is not None for number in range(1000))
    assert EVENT_BURST <= given <= EVENT_BURST + 1
    clock.now += 10.0
    later = reports.take("later.test", 443, REFUSAL)
    assert later is not None
    assert later["unnamed"] == 1000 - given
