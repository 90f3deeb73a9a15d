"""Plays an answer in time: frames of the event stream with the delays, breaks and silences that the answer asks for.

No HTTP here: the gateway and the stand-alone server both send what this yields.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable

from ash import sse
from ash.errors import StreamBroken
from ash.models import Json
from ash.offline import stream
from ash.offline.stream import Answer

_BATCH_BYTES = 16 * 1024
_CUT = "the script cuts the stream here"


async def wait(answer: Answer) -> None:
    """What comes before the first byte: the delay; for ever when it hangs from the start; or the error or the break, raised."""
    await asyncio.sleep(answer.delay)
    if answer.hang == 0:
        await asyncio.Event().wait()
    if answer.refusal is not None and answer.after is None:
        raise answer.refusal
    if answer.cut == 0:
        raise StreamBroken(_CUT)


async def play(events: Iterable[Json], answer: Answer) -> AsyncGenerator[bytes, None]:
    """The answer's events after `wait`. Frames that need no delay between them come together."""
    batch = bytearray()
    for number, event in enumerate(events):
        is_delta = event["type"] == "content_block_delta"
        if number in (answer.cut, answer.hang, answer.after if answer.refusal else None) or (is_delta and answer.delta_delay):
            if batch:
                yield bytes(batch)
                batch.clear()
            if number == answer.cut:
                raise StreamBroken(_CUT)
            if number == answer.hang:
                await asyncio.Event().wait()
            if answer.refusal is not None and number == answer.after:
                yield sse.encode("error", stream.error_body(answer.refusal))
                return
            await asyncio.sleep(answer.delta_delay)
        batch += sse.encode(event["type"], event)
        if len(batch) >= _BATCH_BYTES:
            yield bytes(batch)
            batch.clear()
    if batch:
        yield bytes(batch)
