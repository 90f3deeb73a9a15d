"""`ash session`: create, message, inspect and change sessions. What a session is goes to stdout as JSON, the words around it to stderr."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING

from ash.cli import profile, turn, workspace
from ash.cli.command import Command, UsageError, names
from ash.cli.deploy import add_env, add_limits
from ash.cli.terminal import CYAN, DIM, Terminal, shorten

if TYPE_CHECKING:
    from ash.client import Event, Session, SessionOptions

_HIDDEN_IN_TAIL = ("text_delta", "thinking_delta", "input_json_delta", "signature_delta", "citations_delta")


def _configure_id(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="id of the session")


# create


def _configure_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("agent", help="name of a deployed agent")
    parser.add_argument("--model", help="model for this session")
    parser.add_argument("--system-prompt", metavar="TEXT", help="instead of the agent's CLAUDE.md")
    parser.add_argument("--permission-mode", metavar="MODE", help="how tools are permitted")
    parser.add_argument("--allowed-tools", type=names, metavar="NAMES", help="tools that may be used, separated by commas")
    parser.add_argument("--disallowed-tools", type=names, metavar="NAMES", help="tools that may not")
    parser.add_argument("--credential", metavar="ID", help="a stored credential for this session: its model key, or one for a host")
    add_env(parser, "a variable for the session's tools")
    add_limits(parser, "a limit of the session, such as memory_mb=512 or turn_timeout=60")


def _create(args: argparse.Namespace, terminal: Terminal) -> int:
    options: SessionOptions = {
        "model": args.model,
        "system_prompt": args.system_prompt,
        "permission_mode": args.permission_mode,
        "allowed_tools": args.allowed_tools,
        "disallowed_tools": args.disallowed_tools,
        "credential_id": args.credential,
        "extra_env": dict(args.env) or None,
        "limits": dict(args.limit) or None,
    }
    session = profile.client(args).create_session(args.agent, **options)
    return _show(session, terminal, "created")


def _show(session: Session, terminal: Terminal, what: str) -> int:
    if what and not terminal.is_json:
        terminal.note(f"Session {what}:", DIM)
    terminal.data(session.raw)
    return 0


# send


def _configure_send(parser: argparse.ArgumentParser) -> None:
    _configure_id(parser)
    parser.add_argument("message", nargs="*", help="the message; without one, or where it is -, standard input")
    turn.add_options(parser)


def _send(args: argparse.Namespace, terminal: Terminal) -> int:
    from ash.cli.chat import read_message

    content = read_message(args.message)
    if content is None:
        raise UsageError("there is no message: give one, or pipe one in; `ash chat --session ID` talks interactively")
    return turn.play(profile.client(args), args.id, content, terminal, turn.options_of(args), is_quiet=args.quiet)


# list, get and the changes


def _configure_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--agent", help="only sessions of this agent")
    parser.add_argument("--status", help="only sessions with this status")
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many")
    parser.add_argument("--offset", type=int, metavar="N", help="leave out so many of the newest")


def _list(args: argparse.Namespace, terminal: Terminal) -> int:
    sessions = profile.client(args).list_sessions(args.agent, status=args.status, limit=args.limit, offset=args.offset)
    if terminal.is_json or not terminal.out_is_tty:
        terminal.data([session.raw for session in sessions])
        return 0
    terminal.table(("ID", "AGENT", "STATUS", "CREATED"), [(one.id, one.agent_name, one.status, one.created_at) for one in sessions])
    if sessions.total > len(sessions):
        terminal.note(f"{len(sessions)} of {sessions.total} sessions", DIM)
    return 0


def _change(method: str, what: str) -> Callable[[argparse.Namespace, Terminal], int]:
    def run(args: argparse.Namespace, terminal: Terminal) -> int:
        client = profile.client(args)
        session: Session = getattr(client, method)(args.id)
        return _show(session, terminal, what)

    return run


def _interrupt(args: argparse.Namespace, terminal: Terminal) -> int:
    was_running = profile.client(args).interrupt(args.id)
    if terminal.is_json:
        terminal.data({"interrupted": was_running})
    else:
        terminal.line("Interrupted." if was_running else "No turn was running.")
    return 0


# exec


def _configure_exec(parser: argparse.ArgumentParser) -> None:
    _configure_id(parser)
    parser.add_argument("words", nargs=argparse.PARSER, metavar="command", help="a shell command, or a program and its arguments")
    parser.add_argument("--timeout", type=int, default=30_000, metavar="MS", help="how long it may take, in milliseconds (default 30000)")
    parser.add_argument("--cwd", help="folder to run it in")
    parser.epilog = "Options of this command stand before the command that is to run; all from there on belongs to that."


def _exec(args: argparse.Namespace, terminal: Terminal) -> int:
    import sys

    command = args.words[0] if len(args.words) == 1 else shlex.join(args.words)
    done = profile.client(args).exec(args.id, command, timeout=args.timeout / 1000, cwd=args.cwd)
    if terminal.is_json:
        terminal.data(done.raw)
    else:
        terminal.answer(done.stdout)
        sys.stderr.write(done.stderr)
        if done.truncated:
            terminal.note("(the output was cut)", DIM)
        if done.timed_out:
            terminal.error(f"the command did not end within {args.timeout} ms")
    return done.exit_code & 0xFF


# tail, messages, logs


def _configure_tail(parser: argparse.ArgumentParser) -> None:
    _configure_id(parser)
    parser.add_argument("--after", type=int, default=0, metavar="N", help="begin behind event N")
    parser.add_argument("--type", "-t", action="append", metavar="TYPE", help="only events of this type (may be repeated)")


def _tail(args: argparse.Namespace, terminal: Terminal) -> int:
    client = profile.client(args)
    with client.follow(args.id, args.after) as stream:
        for event in stream:
            if args.type and event.type not in args.type:
                continue
            if terminal.is_json:
                terminal.json_line({"type": event.type, "id": event.id, "data": event.data})
            elif event.type not in _HIDDEN_IN_TAIL and (summary := summarize(event, 200)) is not None:
                terminal.line(f"#{event.id} {event.type}{f': {summary}' if summary else ''}")
    return 0


def summarize(event: Event, width: int) -> str | None:
    """An event on one line; None for one that only repeats another."""
    if event.type == "tool_use":
        return turn.tool_call(event.data, width)
    if event.type == "tool_result":
        return turn.tool_result(event.data, width)
    if event.type == "message":
        kind = event.data.get("type")
        return None if kind in ("stream_event", "user", "result") else shorten(event.text or str(kind), width)
    if event.type == "error":
        return str(event.data)
    return str(event.data.get("status") or event.data.get("action") or "")


def _configure_messages(parser: argparse.ArgumentParser) -> None:
    _configure_id(parser)
    parser.add_argument("--after", type=int, metavar="N", help="only messages behind number N")
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many")


def _messages(args: argparse.Namespace, terminal: Terminal) -> int:
    client = profile.client(args)
    messages = client.list_messages(args.id, after=args.after, limit=args.limit)
    if terminal.is_json or not terminal.out_is_tty:
        terminal.data([message.raw for message in messages])
        return 0
    for message in messages:
        if message.text:
            terminal.note(f"{message.role}:", CYAN)
            terminal.line(message.text)
    return 0


def _configure_logs(parser: argparse.ArgumentParser) -> None:
    _configure_id(parser)
    parser.add_argument("--after", type=int, metavar="N", help="only lines behind number N")


def _logs(args: argparse.Namespace, terminal: Terminal) -> int:
    lines = profile.client(args).session_logs(args.id, after=args.after)
    if terminal.is_json:
        terminal.data([line.raw for line in lines])
        return 0
    for line in lines:
        terminal.line(f"{line.ts} {line.level}: {line.text}".strip())
    return 0


COMMANDS = {
    "create": Command("Create a session on an agent; prints it as JSON.", _create, _configure_create),
    "send": Command("Send a message and print the answer as it arrives.", _send, _configure_send),
    "list": Command("List sessions, newest first; JSON when piped.", _list, _configure_list),
    "get": Command("Show a session, as JSON.", _change("get_session", ""), _configure_id),
    "pause": Command("Pause a session.", _change("pause_session", "paused"), _configure_id),
    "resume": Command("Resume a paused or stopped session.", _change("resume_session", "resumed"), _configure_id),
    "stop": Command("Stop a session's processes; it can be resumed.", _change("stop_session", "stopped"), _configure_id),
    "end": Command("End a session for good.", _change("end_session", "ended"), _configure_id),
    "fork": Command("Make a new session that continues from here.", _change("fork_session", "forked"), _configure_id),
    "interrupt": Command("End the turn that is running.", _interrupt, _configure_id),
    "exec": Command("Run a command in the session's sandbox; its exit code is passed on.", _exec, _configure_exec, ends_literally=True),
    "tail": Command("Follow a session's events, past ones first.", _tail, _configure_tail),
    "messages": Command("Show the conversation; JSON when piped.", _messages, _configure_messages),
    "logs": Command("Show what the session's sandbox logged.", _logs, _configure_logs),
    "files": Command("List the session's files, JSON when piped, or print one.", workspace.files, workspace.configure_files),
    "download": Command("Write all of the session's files into an archive.", workspace.download, workspace.configure_download),
    "upload": Command("Put the files of an archive or a folder into the session.", workspace.upload, workspace.configure_upload),
}
