"""Addresses that no sandbox may reach, and the exceptions that an operator can make."""

from __future__ import annotations

import ipaddress
import socket

import pytest

from ash.egress.addresses import OWN, SystemResolver, classify, find_fault, is_own, parse_answers
from ash.egress.rules import parse_network

FORBIDDEN = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.127.255.255", "127.0.0.1", "127.255.0.1", "169.254.169.254", "169.254.1.1",
    "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.2.1", "192.168.1.1", "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1",
    "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "100.100.100.200", "168.63.129.16", "192.88.99.1", "192.0.0.192",
    "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::127.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b::169.254.169.254",
    "64:ff9b:1::8.8.8.8", "100::1", "2001::1", "2001:0:7f00:1::", "2001:2::1", "2001:10::1", "2001:db8::1", "2002:7f00:1::",
    "2002:808:808::1", "3fff::1", "5f00::1", "fc00::1", "fd00::1", "fd00:ec2::254", "fd20:ce::254", "fe80::1", "fec0::1", "ff02::1",
    "4000::1",
]  # fmt: skip
OPEN = ["1.1.1.1", "8.8.8.8", "100.63.255.255", "100.128.0.1", "172.15.0.1", "172.32.0.1", "192.169.0.1", "223.255.255.255",
        "2606:4700::1111", "2a00:1450::1", "64:ff9b::8.8.8.8", "2001:200::1", "2003::1"]  # fmt: skip


@pytest.mark.parametrize("address", FORBIDDEN)
def test_it_is_of_a_forbidden_kind(address: str) -> None:
    assert classify(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", OPEN)
def test_it_is_the_internets(address: str) -> None:
    assert classify(ipaddress.ip_address(address)) is None


def test_an_exception_opens_its_network_and_nothing_else() -> None:
    exceptions = (parse_network("10.1.0.0/16"),)
    assert find_fault(ipaddress.ip_address("10.1.2.3"), exceptions) is None
    assert find_fault(ipaddress.ip_address("10.2.0.1"), exceptions) == "private"
    assert find_fault(ipaddress.ip_address("::ffff:10.1.2.3"), exceptions) == "IPv4-mapped"


def test_a_metadata_service_is_opened_only_by_its_own_address() -> None:
    address = ipaddress.ip_address("169.254.169.254")
    assert find_fault(address, (parse_network("169.254.0.0/16"), parse_network("0.0.0.0/0"))) == "metadata service"
    assert find_fault(address, (parse_network("169.254.169.254"),)) is None


def test_an_address_of_this_machine_is_known_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ipaddress.ip_address("127.0.0.1")
    assert is_own(own)
    assert not is_own(ipaddress.ip_address("192.0.2.1"))
    monkeypatch.setattr("ash.egress.addresses._SPECIAL", ())  # as if it were a public address
    assert find_fault(own, ()) == OWN


def test_the_machines_own_public_addresses_are_known() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
        except OSError:
            pytest.skip("this machine has no route to other machines")
        assert is_own(ipaddress.ip_address(probe.getsockname()[0]))


def test_answers_lose_their_zone_and_their_doubles() -> None:
    assert [str(address) for address in parse_answers(["10.0.0.1", "10.0.0.1", "fe80::1%eth0"])] == ["10.0.0.1", "fe80::1"]


async def test_the_resolver_of_the_system_knows_localhost_and_says_when_it_knows_nothing() -> None:
    resolver = SystemResolver(threads=1)
    try:
        assert set(await resolver("localhost")) & {"127.0.0.1", "::1"}
        with pytest.raises(OSError, match=r".+"):
            await resolver("no-such-name.invalid")
        with pytest.raises(OSError, match=r".+"):
            await resolver("a" * 80)
    finally:
        resolver.close()


@pytest.mark.parametrize("text", ["::ffff:169.254.169.254", "64:ff9b::169.254.169.254"])
def test_a_metadata_service_in_other_clothes_is_not_opened_by_a_network(text: str) -> None:
    networks = tuple(map(parse_network, ("::/0", "0.0.0.0/0", "::ffff:0:0/96")))
    assert find_fault(ipaddress.ip_address(text), networks) == "metadata service"


def test_the_unspecified_address_is_this_machines_own() -> None:
    assert is_own(ipaddress.ip_address("0.0.0.0"))
    assert is_own(ipaddress.ip_address("::"))
