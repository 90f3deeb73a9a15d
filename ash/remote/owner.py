"""Whose server listens on a port of this machine, as the kernel tells it: what decides whether a stored key may go there."""

from __future__ import annotations

import os
from collections.abc import Iterator

_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
_LISTEN = "0A"


def is_this_machine(host: str) -> bool:
    """Whether an address means this machine by its very name."""
    import ipaddress

    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return found.is_loopback or found.is_unspecified


def is_trusted(port: int) -> bool:
    """Whether all that listens on the port of this machine belongs to this user or to root. False when nothing can be found out."""
    owners = {uid for table in _TABLES for uid in _listeners(table, port)}
    return bool(owners) and owners <= {0, os.geteuid()}


def _listeners(table: str, port: int) -> Iterator[int]:
    """The user ids of the sockets that listen on `port`, on whichever address."""
    try:
        with open(table, encoding="ascii") as file:
            rows = file.readlines()[1:]
    except OSError:
        return
    for row in rows:
        _, local, _, state, _, _, _, uid, *_ = row.split()
        if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
            yield int(uid)
