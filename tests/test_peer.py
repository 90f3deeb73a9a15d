"""Whose socket is at the other end: asked of the real kernel, over real connections."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from ash import peer
from tests.harness import NOBODY, as_nobody, needs_root

WAYS: tuple[Callable[[peer.Address, peer.Address], int | None], ...] = (peer.find_uid, peer._ask_sock_diag, peer._search_proc)


@contextmanager
def listening(family: socket.AddressFamily, host: str, *, both: bool = False) -> Iterator[socket.socket]:
    if family == socket.AF_INET6 and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with socket.socket(family) as listener:
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)
        listener.bind((host, 0))
        listener.listen()
        listener.settimeout(5)
        yield listener


def ends(accepted: socket.socket) -> tuple[peer.Address, peer.Address]:
    return accepted.getsockname()[:2], accepted.getpeername()[:2]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_the_own_user_is_found_at_the_other_end(
    family: socket.AddressFamily, host: str, way: Callable[[peer.Address, peer.Address], int | None]
) -> None:
    with listening(family, host) as listener, socket.create_connection(listener.getsockname()[:2]):
        accepted, _ = listener.accept()
        with accepted:
            assert way(*ends(accepted)) == os.geteuid()


@pytest.mark.parametrize("way", WAYS[1:])
def test_a_client_that_reaches_ipv4_through_an_ipv6_socket_is_found(way: Callable[[peer.Address, peer.Address], int | None]) -> None:
    with listening(socket.AF_INET, "127.0.0.1") as listener, socket.socket(socket.AF_INET6) as client:
        client.connect(("::ffff:127.0.0.1", listener.getsockname()[1]))
        accepted, _ = listener.accept()
        with accepted:
            assert way(*ends(accepted)) == os.geteuid()


def test_a_client_of_a_listener_for_both_families_is_found() -> None:
    with (
        listening(socket.AF_INET6, "::", both=True) as listener,
        socket.create_connection(("127.0.0.1", listener.getsockname()[1])),
    ):
        accepted, _ = listener.accept()
        with accepted:
            assert ends(accepted)[1][0] == "::ffff:127.0.0.1"
            assert peer.find_uid(*ends(accepted)) == os.geteuid()


@pytest.mark.parametrize("way", WAYS)
def test_a_socket_that_is_closed_belongs_to_nobody(way: Callable[[peer.Address, peer.Address], int | None]) -> None:
    with listening(socket.AF_INET, "127.0.0.1") as listener:
        socket.create_connection(listener.getsockname()).close()
        accepted, _ = listener.accept()
        with accepted:
            assert way(*ends(accepted)) is None


@pytest.mark.parametrize("way", WAYS)
def test_a_listener_on_the_clients_port_is_not_taken_for_the_client(way: Callable[[peer.Address, peer.Address], int | None]) -> None:
    with listening(socket.AF_INET, "127.0.0.1") as listener:
        assert way(("127.0.0.1", 9), listener.getsockname()) is None


@needs_root
def test_another_user_is_told_from_us() -> None:
    with (
        listening(socket.AF_INET, "127.0.0.1") as listener,
        as_nobody(f"s = socket.socket(); s.connect({listener.getsockname()}); s.recv(1)") as child,
    ):
        accepted, _ = listener.accept()
        with accepted:
            found = {way(*ends(accepted)) for way in WAYS}
        assert child.wait(10) == 0
    assert found == {NOBODY}


@needs_root
def test_another_user_who_hangs_up_at_once_does_not_pass_for_root() -> None:
    """Many kernels say uid 0 of a socket that its process has closed."""
    with listening(socket.AF_INET, "127.0.0.1") as listener:
        with as_nobody(f"s = socket.socket(); s.connect({listener.getsockname()}); s.sendall(b'GET / HTTP/1.1'); s.close()") as child:
            assert child.wait(10) == 0
        accepted, _ = listener.accept()
        with accepted:
            assert [way(*ends(accepted)) for way in WAYS] == [None, None, None]


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"])
def test_loopback_addresses_are_known(address: str) -> None:
    assert peer.is_loopback(address)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "10.0.0.1", "127.0.0.1.example.com", "localhost", "", "::ffff:10.0.0.1", "127.1"])
def test_everything_else_is_not_loopback(address: str) -> None:
    assert not peer.is_loopback(address)
