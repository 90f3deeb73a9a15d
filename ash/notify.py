"""Tells the service manager that started this process how it is doing, as sd_notify(3) says. Silent where there is none; never fails.

One datagram a message to the socket that `NOTIFY_SOCKET` names. Children are given environments of their own, without it.
"""

from __future__ import annotations

import contextlib
import socket
import time

from ash.config import client_environ


def is_supervised() -> bool:
    """Whether a service manager waits to hear from this process."""
    return client_environ("NOTIFY_SOCKET") is not None


def ready(status: str) -> None:
    """The start, or a reload, is done."""
    _send(f"READY=1\nSTATUS={status}")


def reloading() -> None:
    _send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping(status: str) -> None:
    _send(f"STOPPING=1\nSTATUS={status}")


def _send(message: str) -> None:
    address = client_environ("NOTIFY_SOCKET")
    if address is None:
        return
    # A manager that does not listen is no reason for a server to end.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.connect("\0" + address[1:] if address.startswith("@") else address)
        sender.send(message.encode())
