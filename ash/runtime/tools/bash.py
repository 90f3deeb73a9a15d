"""The Bash tool: commands in the agent's shell, with a time limit and a bound on what of their output the model gets."""

from __future__ import annotations

from ash.runtime.interrupt import Interrupt
from ash.runtime.shell import MAX_COMMAND_BYTES, ShellResult
from ash.runtime.tools.call import TOOL_TIMEOUT, Json, Outcome, Tool, ToolError, Workbench, number, schema, text

MAX_CHARACTERS = 30_000
DEFAULT_TIMEOUT_MS = 120_000

_DESCRIPTION = """Runs a command in a bash shell and returns its output (stdout and stderr together).

The working directory and exported variables carry over from one call to the next; aliases and unexported variables do not. \
Standard input is empty, so commands must not ask questions. A command is ended after `timeout` milliseconds \
(default {default}, at most {most}). Output beyond {characters} characters loses its middle; \
write long output to a file and read what you need of it. To leave a server running, end the command with `&` \
and send its output to a file. Prefer Read, Edit, Write, Glob and Grep over cat, sed, echo, find and grep."""


def _run(bench: Workbench, given: Json, interrupt: Interrupt) -> Outcome:
    command = given["command"]
    if "\0" in command or len(command.encode("utf-8", "replace")) > MAX_COMMAND_BYTES:
        raise ToolError(f"The command holds a NUL or is longer than {MAX_COMMAND_BYTES} bytes. Write it to a file and run that.")
    most = bench.tool_timeout * 1000
    timeout_ms = min(given.get("timeout", DEFAULT_TIMEOUT_MS), most)
    try:
        result = bench.shell.run(command.encode("utf-8", "replace").decode(), timeout_ms / 1000, interrupt)
    except OSError as error:
        raise ToolError(f"The shell could not be started: {error}") from error
    shown = cut_middle(result.text, result.dropped).strip("\n")
    detail = {"stdout": shown, "stderr": "", "interrupted": interrupt.is_set or result.timed_out, "isImage": False, "exitCode": result.code}
    notes = [note for note in (result.note, _ending(result, timeout_ms, interrupt, is_limit=timeout_ms == most)) if note]
    content = "\n".join([*notes, shown] if shown else notes) or "(The command succeeded and printed nothing.)"
    return Outcome(content, detail, is_error=result.code != 0 or interrupt.is_set)


def _ending(result: ShellResult, timeout_ms: float, interrupt: Interrupt, *, is_limit: bool) -> str:
    if interrupt.is_set:
        return "[The command was interrupted by the user; its output so far follows]"
    if result.timed_out:
        limit = ", the session's limit for a tool" if is_limit else ""
        return f"[The command was ended because it took longer than {timeout_ms / 1000:g} s{limit}; its output so far follows]"
    return f"Exit code {result.code}" if result.code else ""


def cut_middle(output: str, dropped_bytes: int = 0) -> str:
    """At most MAX_CHARACTERS of the output: its beginning and its end."""
    if len(output) <= MAX_CHARACTERS and not dropped_bytes:
        return output
    half = MAX_CHARACTERS // 2
    left_out = len(output) - 2 * half + dropped_bytes
    notice = f"[… {left_out} characters left out here; write long output to a file and read the part you need …]"
    return f"{output[:half]}\n\n{notice}\n\n{output[-half:]}"


def bash_tool(tool_timeout: float) -> Tool:
    """The tool with the limit that its session has, in seconds."""
    most = round(tool_timeout * 1000)
    given = schema(
        ["command"],
        command=text("The command to run"),
        timeout=number(f"Time limit in milliseconds, at most {most}", minimum=1),
        description=text("What the command does, in five to ten words"),
    )
    return Tool("Bash", _DESCRIPTION.format(default=min(DEFAULT_TIMEOUT_MS, most), most=most, characters=MAX_CHARACTERS), given, _run)


BASH = bash_tool(TOOL_TIMEOUT)
