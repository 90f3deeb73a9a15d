"""Runs the tool calls of one assistant message: those that only read at the same time, the others one after another."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from ash.runtime.interrupt import Interrupt, Interrupted
from ash.runtime.permissions import Permissions
from ash.runtime.tools import TOOLS, Outcome, ToolError, Workbench, check

Json = dict[str, Any]
PROGRESS_INTERVAL = 30.0
"""Seconds between signs of life of a tool that takes long."""
MAX_RESULT_BYTES = 24 * 1024 * 1024
"""Most that the results of one message may hold together; more would fit neither the API nor a line to the server."""
_PARALLEL = 8
_INTERRUPTED = Outcome("The call was interrupted by the user before it was done.", {"interrupted": True}, is_error=True)


class Calls:
    """The calls of one message. `outcomes` has one entry a call once `run` returned, whatever happened."""

    def __init__(self, bench: Workbench, permissions: Permissions, interrupt: Interrupt, uses: list[Json], cut: set[str]) -> None:
        self._bench, self._permissions, self._interrupt = bench, permissions, interrupt
        self.uses = uses
        self._cut = cut
        self.outcomes: dict[str, Outcome] = {}
        self.denials: list[Json] = []
        self.faults: list[str] = []
        """Tracebacks of tools that failed in a way nobody foresaw."""

    def run(self, progress: Callable[[Json, float], None]) -> None:
        """Run all of them; `progress` is called now and then with a call that still runs and its seconds so far."""
        for batch in _batches(self.uses):
            threads = {use["id"]: threading.Thread(target=self._work, args=(use,), name="tool", daemon=True) for use in batch}
            started = time.monotonic()
            for thread in threads.values():
                thread.start()
            for use in batch:
                while threads[use["id"]].is_alive():
                    threads[use["id"]].join(PROGRESS_INTERVAL)
                    if threads[use["id"]].is_alive():
                        progress(use, time.monotonic() - started)
        self._bound()

    def results(self) -> list[Json]:
        """The tool_result blocks in the order of the calls."""
        return [_result(use["id"], self.outcomes[use["id"]]) for use in self.uses]

    def detail(self) -> Json:
        """The outcomes for programs: the one call's own, or those of several under their ids."""
        details = [{"tool_use_id": use["id"], **self.outcomes[use["id"]].detail} for use in self.uses]
        return details[0] if len(details) == 1 else {"results": details}

    def _work(self, use: Json) -> None:
        try:
            self.outcomes[use["id"]] = _printable(self._call(use))
        except ToolError as error:
            self.outcomes[use["id"]] = _failed(str(error))
        except Interrupted:
            self.outcomes[use["id"]] = _INTERRUPTED
        except Exception as error:  # noqa: BLE001 - the edge of a call: the model hears of it, the turn goes on
            self.faults.append(traceback.format_exc())
            self.outcomes[use["id"]] = _failed(f"{use.get('name')} failed unexpectedly: {type(error).__name__}: {error}")

    def _call(self, use: Json) -> Outcome:
        self._interrupt.check()
        tool = TOOLS.get(str(use.get("name")))
        if tool is None:
            raise ToolError(f"There is no tool {use.get('name')!r}. The tools are {', '.join(TOOLS)}.")
        if use["id"] in self._cut:
            raise ToolError("The call's input did not arrive whole, so it was not run. Send it again, in smaller parts if it is long.")
        given = check(tool, use["input"])
        denial = self._permissions.denial(tool.name, given, is_read_only=tool.is_read_only, folder=self._bench.shell.cwd)
        if denial is not None:
            self.denials.append({"tool_name": tool.name, "tool_use_id": use["id"], "tool_input": use["input"]})
            raise ToolError(denial)
        return tool.run(self._bench, given, self._interrupt)

    def _bound(self) -> None:
        total = 0
        for use in self.uses:
            size = _size(self.outcomes[use["id"]].content)
            if total + size > MAX_RESULT_BYTES:
                self.outcomes[use["id"]] = _failed("The results of these calls are too large together. Make fewer of them at once.")
            else:
                total += size


def _result(call_id: str, outcome: Outcome) -> Json:
    block = {"type": "tool_result", "tool_use_id": call_id, "content": outcome.content}
    return {**block, "is_error": True} if outcome.is_error else block


def _printable(outcome: Outcome) -> Outcome:
    """A file name that is no UTF-8 comes as half characters, which the API refuses."""
    if isinstance(outcome.content, str) and not outcome.content.isascii():
        return outcome._replace(content=outcome.content.encode("utf-8", "replace").decode("utf-8"))
    return outcome


def _failed(text: str) -> Outcome:
    return Outcome(text, {"error": text}, is_error=True)


def _batches(uses: list[Json]) -> Iterator[list[Json]]:
    """Neighbouring calls that only read go together; the order of the others is the model's."""
    batch: list[Json] = []
    for use in uses:
        tool = TOOLS.get(str(use.get("name")))
        is_read_only = tool is not None and tool.is_read_only
        if batch and (not is_read_only or len(batch) == _PARALLEL):
            yield batch
            batch = []
        batch.append(use)
        if not is_read_only:
            yield batch
            batch = []
    if batch:
        yield batch


def _size(content: str | list[Json]) -> int:
    if isinstance(content, str):
        return len(content)
    return sum(len(str(block.get("text", ""))) + len(block.get("source", {}).get("data", "")) for block in content)
