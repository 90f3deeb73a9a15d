"""The TodoWrite tool: the model's own list of what is to be done. Kept in memory only; the conversation holds it too."""

from __future__ import annotations

from ash.runtime.interrupt import Interrupt
from ash.runtime.tools.call import Json, Outcome, Tool, Workbench, schema, text

_STATUSES = ["pending", "in_progress", "completed"]
_DESCRIPTION = """Writes your list of tasks; each call replaces the whole list.

Use it for work of three or more steps. Keep exactly one task in_progress while you work, and mark each one completed as soon as it is."""


def _run(bench: Workbench, given: Json, interrupt: Interrupt) -> Outcome:
    old, new = bench.todos, given["todos"]
    bench.todos = [] if all(todo["status"] == "completed" for todo in new) else new
    return Outcome("The list of tasks was updated. Go on with the current task.", {"oldTodos": old, "newTodos": new})


_TODO = schema(
    ["content", "status", "activeForm"],
    content=text("The task, as an instruction: Run the tests"),
    status=text("Where the task stands", enum=_STATUSES),
    activeForm=text("The task while it is worked on: Running the tests"),
)
TODO_WRITE = Tool(
    "TodoWrite",
    _DESCRIPTION,
    schema(["todos"], todos={"type": "array", "description": "The whole list", "items": _TODO}),
    _run,
    is_read_only=True,
)
