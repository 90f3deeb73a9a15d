"""Which addresses no sandbox may reach, whatever name led there, and how names become addresses. Connects to nothing.

Of IPv6 only what is handed out for the internet is open; of IPv4 everything but the special ranges. The operator's
`allow_private` opens networks among the rest; a metadata service only when it is named alone, as a /32 or /128.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ash.egress.rules import Address, Network

Resolve = Callable[[str], Awaitable[list[str]]]
"""The addresses of a name, at least one. Raises OSError."""

METADATA = frozenset(map(ipaddress.ip_address, (
    "169.254.169.254", "169.254.169.253", "169.254.169.123", "169.254.170.2", "169.254.170.23", "100.100.100.200",
    "168.63.129.16", "192.0.0.192", "fd00:ec2::254", "fd00:ec2::253", "fd00:ec2::23", "fd00:ec2::123", "fd20:ce::254",
)))  # fmt: skip
"""Where clouds answer their own machines, credentials included. One of them lies in the open internet's range."""

_SPECIAL = tuple((ipaddress.ip_network(network), kind) for network, kind in (
    ("0.0.0.0/8", "this network"), ("10.0.0.0/8", "private"), ("100.64.0.0/10", "shared (CGNAT)"), ("127.0.0.0/8", "loopback"),
    ("169.254.0.0/16", "link-local"), ("172.16.0.0/12", "private"), ("192.0.0.0/24", "reserved"), ("192.0.2.0/24", "documentation"),
    ("192.88.99.0/24", "reserved"), ("192.168.0.0/16", "private"), ("198.18.0.0/15", "benchmarking"),
    ("198.51.100.0/24", "documentation"), ("203.0.113.0/24", "documentation"), ("224.0.0.0/4", "multicast"),
    ("255.255.255.255/32", "broadcast"), ("240.0.0.0/4", "reserved"),
    ("::/128", "unspecified"), ("::1/128", "loopback"), ("::ffff:0:0/96", "IPv4-mapped"), ("::/96", "IPv4-compatible"),
    ("64:ff9b:1::/48", "local NAT64"), ("100::/64", "discard"), ("2001::/32", "Teredo"), ("2001:2::/48", "benchmarking"),
    ("2001:db8::/32", "documentation"), ("2001::/23", "reserved"), ("2002::/16", "6to4"), ("3fff::/20", "documentation"),
    ("fc00::/7", "unique-local"), ("fe80::/10", "link-local"), ("fec0::/10", "site-local"), ("ff00::/8", "multicast"),
))  # fmt: skip
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_INTERNET6 = ipaddress.IPv6Network("2000::/3")
OWN = "this machine's own"


def classify(address: Address) -> str | None:
    """The kind of an address that is not the open internet's; None for one that is."""
    if address in METADATA or _unwrapped(address) in METADATA:
        return "metadata service"
    kind = next((kind for network, kind in _SPECIAL if address.version == network.version and address in network), None)
    if kind is not None or address.version == 4:
        return kind
    if address in _NAT64:
        return classify(_unwrapped(address))
    return None if address in _INTERNET6 else "reserved"


def _unwrapped(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for: mapped, or behind the prefix where only IPv6 is spoken. Else the address itself."""
    is_wrapped = isinstance(address, ipaddress.IPv6Address) and (address in _NAT64 or address.ipv4_mapped is not None)
    return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if is_wrapped else address


def find_forms(address: Address) -> tuple[Address, ...]:
    """The address, and the one that it stands for: a rule against one is against both."""
    return tuple(dict.fromkeys((address, _unwrapped(address))))


def find_fault(address: Address, exceptions: Sequence[Network]) -> str | None:
    """Why an address is not to be reached: its kind. None when it may be."""
    kind = classify(address) or (OWN if is_own(_unwrapped(address)) else None)
    if kind is None or any(_opens(network, address, kind) for network in exceptions):
        return None
    return kind


def _opens(network: Network, address: Address, kind: str) -> bool:
    if kind == "metadata service":
        return network.num_addresses == 1 and address in network
    return address in network


def is_own(address: Address) -> bool:
    """Whether this machine itself has the address: the kernel would speak from it to it. Nothing is sent."""
    if address.is_unspecified:  # who connects there gets to loopback
        return True
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), 9))
            return ipaddress.ip_address(probe.getsockname()[0].partition("%")[0]) == address
    except OSError:  # no way there at all
        return False


def parse_answers(answers: Sequence[str]) -> list[Address]:
    """Addresses as the resolver gives them, each once; ones with a zone are link-local, and are kept without it."""
    return list(dict.fromkeys(ipaddress.ip_address(answer.partition("%")[0]) for answer in answers))


class SystemResolver:
    """Asks this machine's resolver, in a few threads of its own: names that nobody answers for must not hold up anything else."""

    def __init__(self, threads: int = 32) -> None:
        self._threads = ThreadPoolExecutor(threads, "egress-dns")

    async def __call__(self, name: str) -> list[str]:
        return await asyncio.get_running_loop().run_in_executor(self._threads, _look_up, name)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _look_up(name: str) -> list[str]:
    try:
        return [str(address[0]) for *_, address in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    except UnicodeError as error:  # the resolver's word for a name that it cannot encode
        raise OSError(f"{name} is not a name") from error
