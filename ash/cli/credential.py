"""`ash credential`: store, list and delete secrets that agents use but cannot read. A secret is read from standard input or a file,
never from the arguments, which every user of the machine can see, and is never printed.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ash.cli import profile
from ash.cli.command import Command, UsageError
from ash.cli.terminal import DIM, Terminal

if TYPE_CHECKING:
    from ash.client import Credential, CredentialOptions

_TYPES = ("anthropic", "openai", "bedrock", "custom")
_MAX_BYTES = 1024 * 1024


def _configure_add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", help="the one host that gets it, over TLS: api.github.com, or git.example.com:8443")
    parser.add_argument("--variable", metavar="NAME", help="variable in which the tools find a placeholder to send in its place")
    parser.add_argument("--header", help="header that it goes into (default: Authorization)")
    parser.add_argument("--template", help="set the header always, to this: 'Bearer {value}', or 'Basic user:{value}'")
    parser.add_argument("--agent", metavar="NAME", help="agent whose sessions all get it; without it, those that ask: --credential ID")
    parser.add_argument("--type", choices=_TYPES, help="custom with --host, else anthropic: the key that the session's model calls use")
    parser.add_argument("--label", help="what you call it")
    parser.add_argument("--file", metavar="PATH", help="read the secret from this file instead of standard input")


def _add(args: argparse.Namespace, terminal: Terminal) -> int:
    kind = args.type or ("custom" if args.host else "anthropic")
    options: CredentialOptions = {
        "label": args.label,
        "agent": args.agent,
        "host": args.host,
        "header": args.header,
        "template": args.template,
        "variable": args.variable,
    }
    made = profile.client(args).store_credential(kind, _read_secret(args.file, terminal), **options)
    if terminal.is_json:
        terminal.data(made.raw)
    else:
        terminal.line(f"Stored credential {made.id}")
        terminal.note(_explain(made), DIM)
    return 0


def _read_secret(path: str | None, terminal: Terminal) -> str:
    if path is None and sys.stdin.isatty():
        from getpass import getpass

        terminal.note("The secret, which is not shown:")
        text = getpass("")
    elif path is None:
        text = sys.stdin.read(_MAX_BYTES)
    else:
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read(_MAX_BYTES)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not text'}") from error
    if not text.strip():
        raise UsageError("there is no secret: pipe it in, or name a file with --file")
    return text.strip()


def _explain(made: Credential) -> str:
    who = f"the tools of agent {made.agent}" if made.agent else "the tools of sessions created with --credential and this id"
    if made.host is None:
        owner = f"sessions of agent {made.agent}" if made.agent else "sessions created with --credential and this id"
        return f"Model calls of {owner} use it." if made.type == "anthropic" else "Nothing uses credentials of this type yet."
    if made.template is not None:
        return f"Requests of {who} to {made.host} carry it in {made.header}."
    return f"For {who}, ${made.variable} holds a placeholder that stands for it in {made.header} at {made.host}."


def _list(args: argparse.Namespace, terminal: Terminal) -> int:
    found = profile.client(args).list_credentials()
    if terminal.is_json or not terminal.out_is_tty:
        terminal.data([credential.raw for credential in found])
    elif found:
        header = ("ID", "TYPE", "HOST", "AGENT", "VARIABLE", "LABEL", "LAST USED")
        terminal.table(header, [_row(credential) for credential in found])
    else:
        terminal.note("No credential is stored; `ash credential add --help` says how.")
    return 0


def _row(credential: Credential) -> tuple[str, ...]:
    shown = (credential.host, credential.agent, credential.variable, credential.label, credential.last_used_at)
    return (credential.id, credential.type, *(text or "-" for text in shown))


def _configure_id(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="id of the credential")


def _delete(args: argparse.Namespace, terminal: Terminal) -> int:
    profile.client(args).delete_credential(args.id)
    if terminal.is_json:
        terminal.data({"deleted": args.id})
    else:
        terminal.line(f"Deleted credential {args.id}")
    return 0


COMMANDS = {
    "add": Command("Store a secret, read from standard input, that agents use but cannot read.", _add, _configure_add),
    "list": Command("List the stored credentials, without the secrets; JSON when piped.", _list),
    "delete": Command("Delete a credential; running sessions can no longer use it either.", _delete, _configure_id),
}
