"""`ash chat`: talk to an agent or straight to an agent folder, with one message or interactively.

For a folder, where no server runs, it starts one for the duration in a child process and always ends it again.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from ash.cli import profile, turn
from ash.cli.command import Command, UsageError
from ash.cli.deploy import add_env, deploy
from ash.cli.terminal import BOLD, DIM, YELLOW, Terminal
from ash.errors import AgentNotFound, AgentUnusable, AshError, ConnectionFailed

if TYPE_CHECKING:
    from ash.client import AshClient, Session

_HISTORY_LENGTH = 1000


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="agent message", help="a deployed agent or an agent folder, then the message")
    parser.add_argument("--keep", action="store_true", help="do not end the session; its id goes to stderr")
    parser.add_argument("--session", "--session-id", "-s", metavar="ID", help="continue this session; it is not ended either")
    parser.add_argument("--data-dir", help="run on this data folder, with a server for the duration if none runs on it")
    add_env(parser, "a variable for the tools of this session")
    turn.add_options(parser)


def read_message(words: list[str]) -> str | None:
    """The message: the words, with standard input where a `-` stands. None when a person is to be asked for it."""
    if words and "-" not in words:
        return _not_empty(" ".join(words))
    if not words and sys.stdin.isatty():
        return None
    piped = sys.stdin.buffer.read().decode("utf-8", "replace").rstrip("\n")
    said = " ".join(word for word in words if word != "-")
    return _not_empty(f"{said}\n\n{piped}" if said else piped)


def _not_empty(text: str) -> str:
    if not text.strip():
        raise UsageError("the message is empty")
    return text


def _chat(args: argparse.Namespace, terminal: Terminal) -> int:
    with _tidy_end() as stack:
        if args.session:
            if args.env:
                raise UsageError("-e belongs to a new session; this one keeps the variables it was created with")
            client = _server_of_session(args, terminal, stack)
            session = client.get_session(args.session)
            message = read_message(_without_agent(args.words, session))
            return _talk(client, session, message, args, terminal)
        if not args.words:
            raise UsageError("say which agent: ash chat AGENT [MESSAGE]")
        agent, message = args.words[0], read_message(args.words[1:])
        client, name = _connect(agent, args, terminal, stack)
        session = _open_session(client, name, agent, args, terminal)
        try:
            return _talk(client, session, message, args, terminal)
        finally:
            _close_session(client, session, args, terminal)


def _without_agent(words: list[str], session: Session) -> list[str]:
    """The words of the message; the agent may be named before them, as without --session."""
    if words and words[0] == session.agent_name:
        return words[1:]
    if len(words) > 1:
        raise UsageError(
            f"session {session.id} belongs to agent {session.agent_name}, not {words[0]}; quote the message if {words[0]} is part of it"
        )
    return words


def _talk(client: AshClient, session: Session, message: str | None, args: argparse.Namespace, terminal: Terminal) -> int:
    if message is None:
        return _converse(client, session, args, terminal)
    return turn.play(client, session.id, message, terminal, turn.options_of(args), is_quiet=args.quiet)


# The session


def _open_session(client: AshClient, name: str, agent: str, args: argparse.Namespace, terminal: Terminal) -> Session:
    env = dict(args.env) or None
    try:
        return client.create_session(name, model=args.model, extra_env=env)
    except AgentNotFound as error:
        if _is_agent_folder(agent):
            return client.create_session(deploy(client, agent, terminal).name, model=args.model, extra_env=env)
        known = ", ".join(found.name for found in client.list_agents())
        error.hint = f"deployed: {known}" if known else "none is deployed yet; `ash deploy ./my-agent` uploads a folder"
        raise


def _close_session(client: AshClient, session: Session, args: argparse.Namespace, terminal: Terminal) -> None:
    if args.keep:
        terminal.note(f"Session: {session.id}")
        return
    try:
        client.end_session(session.id)
    except AshError as error:
        terminal.note(f"could not end session {session.id}: {error}", YELLOW)


# The server


def _is_path(agent: str) -> bool:
    return "/" in agent or agent in (".", "..", "~")


def _is_agent_folder(agent: str) -> bool:
    return os.path.isfile(os.path.join(os.path.expanduser(agent), "CLAUDE.md"))


def _connect(agent: str, args: argparse.Namespace, terminal: Terminal, stack: ExitStack) -> tuple[AshClient, str]:
    """A client for a server that answers, and the agent's name there. A path is deployed first."""
    path = os.path.expanduser(agent)
    if _is_path(agent) and not _is_agent_folder(agent):
        raise AgentUnusable(f"{agent} is not an agent folder: there is no {os.path.join(path, 'CLAUDE.md')}")
    client = _running_server(agent, args, terminal) or _embedded_server(args, terminal, stack)
    if _is_path(agent):
        return client, deploy(client, path, terminal).name
    return client, agent


def _running_server(agent: str, args: argparse.Namespace, terminal: Terminal) -> AshClient | None:
    """The server that commands talk to. None when a server of our own is in place: none is named, none runs, and a folder is meant."""
    if args.data_dir:
        return None
    where = profile.address(args)
    client = profile.client(args)
    try:
        _say_offline(client, terminal)
    except ConnectionFailed as error:
        if not where.is_explicit and _is_agent_folder(agent):
            return None
        if not where.is_explicit:
            error.hint = "or name an agent folder, which needs no server: ash chat ./my-agent"
        raise
    return client


def _server_of_session(args: argparse.Namespace, terminal: Terminal, stack: ExitStack) -> AshClient:
    """The server that holds the session to continue: with --data-dir the one on that folder, which must have been used before."""
    if not args.data_dir:
        return profile.client(args)
    if not os.path.isfile(os.path.join(os.path.expanduser(args.data_dir), "ash.db")):
        raise UsageError(f"{args.data_dir} is not the data folder of a server; give the folder that the session was kept in")
    return _embedded_server(args, terminal, stack)


def _say_offline(client: AshClient, terminal: Terminal) -> None:
    health = client.health()
    if health.is_offline and not terminal.is_json:
        terminal.note(str(health.model.get("notice") or "No model provider is configured: the built-in demo model answers."), YELLOW)


def _embedded_server(args: argparse.Namespace, terminal: Terminal, stack: ExitStack) -> AshClient:
    """A server for as long as `stack` is open, on the given data folder or a temporary one."""
    from ash.cli import local
    from ash.client import AshClient

    data_dir = _data_folder(args, stack)
    server = local.find(data_dir)
    if server is None:
        terminal.note("Starting a server for this conversation…", DIM)
        arguments = ["--host", "127.0.0.1", "--port", "0", "--data-dir", data_dir, "--warm-sandboxes", "1", "--shutdown-timeout", "1"]
        child = local.Child(arguments, data_dir, is_tied=True)
        stack.callback(child.end)
        server = child.wait_until_ready()
    client = AshClient(server.url, _initial_key(data_dir))
    _say_offline(client, terminal)
    return client


def _initial_key(data_dir: str) -> str | None:
    try:
        with open(os.path.join(data_dir, profile.INITIAL_KEY_FILE), encoding="utf-8") as file:
            return file.read().strip() or None
    except OSError:
        return None


def _data_folder(args: argparse.Namespace, stack: ExitStack) -> str:
    from ash.cli import local

    if args.data_dir:
        return os.path.abspath(os.path.expanduser(str(args.data_dir)))
    if args.keep:
        raise UsageError(
            "--keep needs a server or a data folder that lasts: none runs, and the temporary folder of this conversation would be removed "
            "with the session; add --data-dir FOLDER, or start a server with `ash start`"
        )
    folder = local.temporary_folder()
    stack.callback(local.remove_temporary, folder)
    return folder


@contextmanager
def _tidy_end() -> Iterator[ExitStack]:
    """A stack that is unwound whatever ends the command: SIGTERM and SIGHUP become an exit, and Ctrl-C cannot cut the unwinding short."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.getsignal(signal.SIGINT)
    try:
        with ExitStack() as stack:
            try:
                yield stack
            finally:
                stack.callback(signal.signal, signal.SIGINT, signal.SIG_IGN)  # runs first
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Interactively


def _converse(client: AshClient, session: Session, args: argparse.Namespace, terminal: Terminal) -> int:
    """Ask for messages until Ctrl-D or `exit`. A turn that fails does not end the conversation."""
    terminal.note(f"Talking to {session.agent_name}. Ctrl-C interrupts an answer, `exit` or Ctrl-D leaves.", DIM)
    options = turn.options_of(args)
    with _history():
        while True:
            try:
                text = _ask(terminal)
            except EOFError:
                terminal.note("")
                return 0
            except KeyboardInterrupt:
                terminal.note("\n(Ctrl-D leaves)", DIM)
                continue
            if text.strip() in ("exit", "quit"):
                return 0
            if not text.strip():
                continue
            try:
                turn.play(client, session.id, text, terminal, options, is_quiet=args.quiet)
            except AshError as error:
                terminal.error(str(error), error.hint)


def _ask(terminal: Terminal) -> str:
    if terminal.out_is_tty:
        marks = ("\001\x1b[" + BOLD + "m\002", "\001\x1b[0m\002") if terminal.has_colors else ("", "")
        text = input(f"{marks[0]}> {marks[1]}")
    else:  # the answers go to a file: the prompt must not
        terminal.err.write("> ")
        terminal.err.flush()
        text = sys.stdin.readline()
        if not text:
            raise EOFError
    return text.rstrip("\n").encode("utf-8", "replace").decode()


@contextmanager
def _history() -> Iterator[None]:
    """Line editing, with what was typed in earlier conversations; kept private. A Python without readline does without."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = os.path.join(profile.home(), "history")
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_HISTORY_LENGTH)
    try:
        yield
    finally:
        with suppress(OSError):
            os.makedirs(profile.home(), mode=0o700, exist_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
            readline.write_history_file(path)


COMMANDS = {
    "chat": Command("Talk to a deployed agent, or straight to an agent folder. Without a message: interactively.", _chat, _configure)
}
