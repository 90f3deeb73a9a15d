"""Usage: what each model call cost in tokens, kept in the store for sums and in the session's log for whoever follows it."""

from __future__ import annotations

from ash.events import EventLog
from ash.models import USAGE_RECORDED, Json, NewEvent
from ash.store import Store


class Usage:
    """Records the calls that the gateway metered."""

    def __init__(self, store: Store, log: EventLog) -> None:
        self._store, self._log = store, log

    async def record(self, session_id: str, usage: Json) -> None:
        """`usage` is the provider's own count: model, input_tokens, output_tokens and the two of the prompt cache."""
        await self._store.add_usage(session_id, usage)
        await self._log.append(session_id, [NewEvent(USAGE_RECORDED, usage)])
