"""Who is at the other end of a loopback TCP connection, as the kernel knows it. It asks; it never decides who may do what.

The uid is that of the process which made the socket. Of a socket that its process has closed already, many kernels say
uid 0, whoever owned it; such a socket has no inode, and an answer without one is no answer.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from functools import cache

Address = tuple[str, int]

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_LISTEN = 10
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_REQUEST = struct.Struct("=BBBxI")  # struct inet_diag_req_v2, up to its id
_ENDS = struct.Struct("!HH16s16s")  # struct inet_diag_sockid, up to its interface
_ANY_COOKIE = struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)  # interface, then the cookie that matches every socket
_STATE = struct.Struct("=BBxx")
_OWNER = struct.Struct("=IIIII")  # expires, rqueue, wqueue, uid, inode
_ENDS_AT = _HEADER.size + _STATE.size
_OWNER_AT = _ENDS_AT + _ENDS.size + len(_ANY_COOKIE)


def find_uid(own: Address, peer: Address) -> int | None:
    """The uid that owns the socket at `peer`, connected to ours at `own` on this machine; None when the kernel cannot tell."""
    own, peer = _plain(own), _plain(peer)
    uid = _ask_sock_diag(own, peer)
    if uid is None:
        uid = _search_proc(own, peer)
    return uid if uid != _ambiguous_uid() else None


def is_loopback(address: str) -> bool:
    """Whether a numeric address belongs to the loopback interface. A name does not: it may mean another address tomorrow."""
    address = _plain((address, 0))[0]
    return address == "::1" or (address.startswith("127.") and _family(address) == socket.AF_INET)


def _plain(address: Address) -> Address:
    """Without a scope, and an IPv4 address that is mapped into IPv6 as IPv4."""
    host = address[0].partition("%")[0].lower()
    return (host.removeprefix("::ffff:") if host.startswith("::ffff:") and "." in host else host), address[1]


def _family(host: str) -> socket.AddressFamily | None:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return family
    return None


def _ends(own: Address, peer: Address, family: socket.AddressFamily) -> bytes:
    source, target = socket.inet_pton(family, peer[0]), socket.inet_pton(family, own[0])
    return _ENDS.pack(peer[1], own[1], source, target)


def _ask_sock_diag(own: Address, peer: Address) -> int | None:
    family = _family(peer[0])
    if family is None or _family(own[0]) != family:
        return None
    ends = _ends(own, peer, family)
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0xFFFFFFFF) + ends + _ANY_COOKIE
    message = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + body
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as netlink:
            netlink.settimeout(1.0)
            netlink.send(message)
            return _read_answer(netlink.recv(4096), ends)
    except OSError:  # no such protocol here, or not allowed: /proc may still tell
        return None


def _read_answer(answer: bytes, ends: bytes) -> int | None:
    """The uid in an answer about exactly the connection asked for. The kernel may answer with a listener on that port instead."""
    if len(answer) < _OWNER_AT + _OWNER.size or _HEADER.unpack_from(answer)[1] != _SOCK_DIAG_BY_FAMILY:
        return None
    state = _STATE.unpack_from(answer, _HEADER.size)[1]
    found = answer[_ENDS_AT : _ENDS_AT + _ENDS.size]
    uid, inode = _OWNER.unpack_from(answer, _OWNER_AT)[3:]
    return int(uid) if found in (ends, _mapped(ends)) and state != _LISTEN and inode else None


def _mapped(ends: bytes) -> bytes:
    """The same two IPv4 ends as a socket made for IPv6 has them."""
    prefix = bytes(10) + b"\xff\xff"
    return ends[:4] + prefix + ends[4:8] + prefix + ends[20:24]


def _search_proc(own: Address, peer: Address) -> int | None:
    wanted = set(_spellings(own, peer))
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(path, encoding="ascii") as table:
                for line in table:
                    fields = line.split()
                    if (fields[1], fields[2]) in wanted:
                        return int(fields[7]) if fields[9] != "0" else None
        except OSError:  # not mounted, or no IPv6 here
            continue
    return None


def _spellings(own: Address, peer: Address) -> Iterator[tuple[str, str]]:
    """The two ends as /proc writes them; an IPv4 connection may have been made by an IPv6 socket."""
    yield _spell(peer), _spell(own)
    if _family(peer[0]) == socket.AF_INET:
        yield _spell(("::ffff:" + peer[0], peer[1])), _spell(("::ffff:" + own[0], own[1]))


def _spell(address: Address) -> str:
    raw = socket.inet_pton(_family(address[0]) or socket.AF_INET, address[0])
    words = struct.unpack(f"={len(raw) // 4}I", raw)
    return "".join(f"{word:08X}" for word in words) + f":{address[1]:04X}"


@cache
def _ambiguous_uid() -> int | None:
    """The uid shown for everybody whom this user namespace has no number for. It names nobody; None where all have a number."""
    with open("/proc/self/uid_map", encoding="ascii") as uid_map, open("/proc/sys/kernel/overflowuid", encoding="ascii") as overflow:
        return None if uid_map.read().split() == ["0", "0", "4294967295"] else int(overflow.read())
