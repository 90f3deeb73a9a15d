"""A proxy whose sandbox belongs to a session, for an agent that asks for everything; the policy of the test allows loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.egress.network import Table, Way, open_way


@pytest.fixture
async def way(data_dir: str) -> AsyncIterator[Way]:
    table = Table(web_test=["127.0.0.1"], inner_test=["10.0.0.1"], mixed_test=["127.0.0.1", "10.0.0.1"])
    async with open_way(data_dir, table) as found:
        found.bind("*:*")
        yield found
