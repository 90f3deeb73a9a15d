"""What the command line remembers on this machine: the linked server and its key, in `config.json` (0600) under `~/.ash`."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from ash.config import client_environ
from ash.errors import ConfigError

if TYPE_CHECKING:
    from ash.client import AshClient

DEFAULT_URL = "http://localhost:4100"
INITIAL_KEY_FILE = "initial-api-key"
"""Where a server writes the first key, in its data folder."""


class Address(NamedTuple):
    """Which server, and why that one: `source` is flag, ASH_SERVER_URL, config or default."""

    url: str
    source: str
    key: str | None = None
    key_source: str = ""

    @property
    def is_explicit(self) -> bool:
        return self.source != "default"


def home() -> str:
    return os.path.abspath(os.path.expanduser(client_environ("ASH_HOME") or "~/.ash"))


def path() -> str:
    return os.path.join(home(), "config.json")


def load() -> dict[str, str]:
    """The stored values; none when there is no file. Raises ConfigError for a file that cannot be used."""
    try:
        with open(path(), encoding="utf-8") as file:
            stored = json.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path()} cannot be read ({error}); repair or remove it") from error
    if not isinstance(stored, dict):
        raise ConfigError(f"{path()} must hold a JSON object; repair or remove it")
    return stored


def save(stored: dict[str, str]) -> None:
    """Replace the file in one step, readable by its owner alone."""
    try:
        os.makedirs(home(), mode=0o700, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".config.", dir=home())  # mkstemp makes it 0600
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump(stored, file, indent=2)
            os.replace(temporary, path())
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise ConfigError(f"{path()} cannot be written: {error.strerror}; set ASH_HOME to a folder that can") from error


def address(args: argparse.Namespace) -> Address:
    """The server a command talks to. A stored key goes to the server it was stored for and to no other."""
    stored = load()
    linked = stored.get("server_url") or DEFAULT_URL
    url, source = _first(
        (args.server, "flag"),
        (client_environ("ASH_SERVER_URL"), "ASH_SERVER_URL"),
        (stored.get("server_url"), "config"),
        (linked, "default"),
    )
    own = stored.get("api_key") if same(url, linked) else None
    key, key_source = _first((args.api_key, "flag"), (client_environ("ASH_API_KEY"), "ASH_API_KEY"), (own, "config"), ("", ""))
    return Address(url, source, key or None, key_source)


def default_url() -> str:
    """The server that commands talk to when no option names one."""
    return address(argparse.Namespace(server=None, api_key=None)).url


def _first(*candidates: tuple[str | None, str]) -> tuple[str, str]:
    return next(((value, source) for value, source in candidates if value), ("", ""))


def same(one: str, other: str) -> bool:
    """Whether two addresses mean the same server, however this machine is spelled."""
    return _canonical(one) == _canonical(other)


def _canonical(url: str) -> str:
    plain = url.rstrip("/").lower()
    for name in ("127.0.0.1", "[::1]"):
        plain = plain.replace(f"//{name}", "//localhost", 1)
    return plain


def client(args: argparse.Namespace) -> AshClient:
    """A client for the server that the arguments, the environment or the stored link name."""
    from ash.client import AshClient

    where = address(args)
    if where.key_source == "config":  # nobody said just now that this key is for whoever listens there
        return AshClient(where.url, stored_key=where.key)
    return AshClient(where.url, where.key)


def link(url: str, key: str | None) -> None:
    """Remember another server; the key of the local one is kept aside."""
    stored = load()
    if not stored.get("server_url") and stored.get("api_key"):
        stored["local_api_key"] = stored["api_key"]
    stored["server_url"] = url
    stored.pop("api_key", None)
    if key:
        stored["api_key"] = key
    save(stored)


def unlink() -> str | None:
    """Forget the linked server and its key; returns its address, None when there was none."""
    stored = load()
    url = stored.pop("server_url", None)
    if url is not None:
        stored.pop("api_key", None)
        local = stored.pop("local_api_key", None)
        if local:
            stored["api_key"] = local
        save(stored)
    return url


def adopt_key(data_dir: str, url: str) -> bool:
    """Take the API key that a server which was just started here wrote, when it is the one the command line talks to.

    In the folder of config.json the key's own file is then removed, so that the key exists once. Elsewhere it stays: a server looks
    for its owner's key in its own data folder alone, and would make another at each start. False when no key was taken.
    """
    file = os.path.join(data_dir, INITIAL_KEY_FILE)
    stored = load()
    linked = stored.get("server_url")
    is_linked = bool(linked) and same(linked or "", url)
    if not (is_linked or same(DEFAULT_URL, url)) or not os.path.exists(file):
        return False
    with open(file, encoding="utf-8") as source:
        key = source.read().strip()
    slot = "api_key" if is_linked or not linked else "local_api_key"
    is_new = bool(key) and stored.get(slot) != key and not _is_accepted(stored.get(slot), url)
    if is_new:
        stored[slot] = key
        save(stored)
    if stored.get(slot) == key and os.path.samefile(home(), data_dir):
        with suppress(FileNotFoundError):
            os.unlink(file)
    return is_new


def _is_accepted(key: str | None, url: str) -> bool:
    """Whether the server takes this key: one that somebody chose is not replaced by the one in the file."""
    from ash.client import AshClient
    from ash.errors import Unauthorized

    try:
        _ = AshClient(url, key, timeout=10).list_agents() if key else None
    except Unauthorized:
        return False
    return bool(key)
