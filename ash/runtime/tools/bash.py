"""The Bash tool: commands in the agent's shell, with a time limit and a bound on what of their output the model gets."""

from __future__ import annotations

from ash.runtime.interrupt import Interrupt
from ash.runtime.shell import MAX_COMMAND_BYTES, ShellResult
from ash.runtime.tools.call import Json, Outcome, Tool, ToolError, Workbench, number, schema, text

MAX_CHARACTERS = 30_000
DEFAULT_TIMEOUT_MS = 120_000
MAX_TIMEOUT_MS = 600_000

_DESCRIPTION = f"""Runs a command in a bash shell and returns its output (stdout and stderr together).

The working directory and exported variables carry over from one call to the next; aliases and unexported variables do not. \
Standard input is empty, so commands must not ask questions. A command is ended after `timeout` milliseconds \
(default {DEFAULT_TIMEOUT_MS}, at most {MAX_TIMEOUT_MS}). Output beyond {MAX_CHARACTERS} characters loses its middle; \
write long output to a file and read what you need of it. To leave a server running, end the command with `&` \
and send its output to a file. Prefer Read, Edit, Write, Glob and Grep over cat, sed, echo, find and grep."""


def _run(bench: Workbench, given: Json, interrupt: Interrupt) -> Outcome:
    command = given["command"]
    if "\0" in command or len(command.encode("utf-8", "replace")) > MAX_COMMAND_BYTES:
        raise ToolError(f"The command holds a NUL or is longer than {MAX_COMMAND_BYTES} bytes. Write it to a file and run that.")
    timeout_ms = min(given.get("timeout", DEFAULT_TIMEOUT_MS), MAX_TIMEOUT_MS)
    try:
        result = bench.shell.run(command.encode("utf-8", "replace").decode(), timeout_ms / 1000, interrupt)
    except OSError as error:
        raise ToolError(f"The shell could not be started: {error}") from error
    shown = cut_middle(result.text, result.dropped).strip("\n")
    detail = {"stdout": shown, "stderr": "", "interrupted": interrupt.is_set or result.timed_out, "isImage": False, "exitCode": result.code}
    notes = [note for note in (result.note, _ending(result, timeout_ms, interrupt)) if note]
    content = "\n".join([*notes, shown] if shown else notes) or "(The command succeeded and printed nothing.)"
    return Outcome(content, detail, is_error=result.code != 0 or interrupt.is_set)


def _ending(result: ShellResult, timeout_ms: float, interrupt: Interrupt) -> str:
    if interrupt.is_set:
        return "[The command was interrupted by the user; its output so far follows]"
    if result.timed_out:
        return f"[The command was ended because it took longer than {timeout_ms / 1000:g} s; its output so far follows]"
    return f"Exit code {result.code}" if result.code else ""


def cut_middle(output: str, dropped_bytes: int = 0) -> str:
    """At most MAX_CHARACTERS of the output: its beginning and its end."""
    if len(output) <= MAX_CHARACTERS and not dropped_bytes:
        return output
    half = MAX_CHARACTERS // 2
    left_out = len(output) - 2 * half + dropped_bytes
    notice = f"[… {left_out} characters left out here; write long output to a file and read the part you need …]"
    return f"{output[:half]}\n\n{notice}\n\n{output[-half:]}"


BASH = Tool(
    "Bash",
    _DESCRIPTION,
    schema(
        ["command"],
        command=text("The command to run"),
        timeout=number(f"Time limit in milliseconds, at most {MAX_TIMEOUT_MS}", minimum=1),
        description=text("What the command does, in five to ten words"),
    ),
    _run,
)
