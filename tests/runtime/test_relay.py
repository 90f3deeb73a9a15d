"""The relay of a sandbox: what it passes on, and that the bridge has it again whatever became of it."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ash import protocol
from ash.runtime import relay
from ash.runtime.paths import Paths, tool_environ
from ash.runtime.relay import Port, Relay
from tests.egress.network import free_port


def until(claim: Callable[[], object], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < deadline, f"{claim} did not come true"
        time.sleep(0.005)


def read_all(caller: socket.socket) -> bytes:
    caller.settimeout(5)
    found = bytearray()
    while data := caller.recv(65536):
        found += data
    return bytes(found)


@pytest.fixture
def proxy(data_dir: str) -> Iterator[socket.socket]:
    """The listening end of the proxy's socket."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{data_dir}/egress.sock")
        listener.listen(64)
        listener.settimeout(5)
        yield listener


@pytest.fixture
def port(proxy: socket.socket) -> Iterator[int]:
    """A relay in a thread that passes on to `proxy`; it ends when it has had nothing to do for a moment."""
    listener = socket.create_server(("127.0.0.1", 0))
    running = threading.Thread(target=Relay(listener, proxy.getsockname(), idle_seconds=0.3).run)
    running.start()
    yield listener.getsockname()[1]
    running.join(5)
    assert not running.is_alive()
    listener.close()


def connect(port: int, proxy: socket.socket) -> tuple[socket.socket, socket.socket]:
    inside = socket.create_connection(("127.0.0.1", port), 5)
    outside, _ = proxy.accept()
    outside.settimeout(5)
    return inside, outside


def test_bytes_go_both_ways_and_each_end_closes_by_itself(port: int, proxy: socket.socket) -> None:
    inside, outside = connect(port, proxy)
    with inside, outside:
        inside.sendall(b"request")
        inside.shutdown(socket.SHUT_WR)
        assert read_all(outside) == b"request"
        outside.sendall(b"answer")
        outside.close()
        assert read_all(inside) == b"answer"


def test_much_goes_through_in_order_while_both_ends_send(port: int, proxy: socket.socket) -> None:
    inside, outside = connect(port, proxy)
    sent = os.urandom(1 << 20) * 8
    with inside, outside:
        got: dict[str, bytes] = {}
        threads = [threading.Thread(target=_send, args=(end, sent)) for end in (inside, outside)]
        threads += [threading.Thread(target=_keep, args=(end, got, name)) for end, name in ((inside, "inside"), (outside, "outside"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert {name: data == sent for name, data in got.items()} == {"inside": True, "outside": True}


def _send(end: socket.socket, data: bytes) -> None:
    end.settimeout(20)
    end.sendall(data)
    end.shutdown(socket.SHUT_WR)


def _keep(end: socket.socket, got: dict[str, bytes], name: str) -> None:
    got[name] = read_all(end)


def test_one_that_does_not_read_holds_up_nobody_else(port: int, proxy: socket.socket) -> None:
    slow, slow_outside = connect(port, proxy)
    with slow, slow_outside:
        slow_outside.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                slow_outside.send(b"x" * 65536)
        inside, outside = connect(port, proxy)
        with inside, outside:
            outside.sendall(b"quick")
            inside.settimeout(5)
            assert inside.recv(5) == b"quick"


def is_broken(end: socket.socket) -> bool:
    try:
        end.send(b"x")
    except OSError:
        return True
    return False


def test_a_program_that_died_is_noticed_by_the_proxy(port: int, proxy: socket.socket) -> None:
    inside, outside = connect(port, proxy)
    inside.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # a reset, as from a killed program with unread data
    inside.close()
    with outside:
        assert read_all(outside) == b""
        until(lambda: is_broken(outside))


def test_more_connections_than_it_holds_wait_their_turn(port: int, proxy: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "MAX_PAIRS", 2)
    first, second = connect(port, proxy), connect(port, proxy)
    third = socket.create_connection(("127.0.0.1", port), 5)
    proxy.settimeout(0.1)
    with pytest.raises(TimeoutError):
        proxy.accept()
    for end in first:
        end.close()
    proxy.settimeout(5)
    outside, _ = proxy.accept()
    for end in (*second, third, outside):
        end.close()


def test_without_the_proxy_the_program_is_told(data_dir: str) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    running = threading.Thread(target=Relay(listener, f"{data_dir}/missing.sock", idle_seconds=0.2).run)
    running.start()
    with socket.create_connection(listener.getsockname(), 5) as inside:
        assert read_all(inside).startswith(b"HTTP/1.1 502 ")
    running.join(5)
    listener.close()


# The bridge's part


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Port]:
    """The bridge's port; the relays that it starts are real processes, and find no proxy."""
    monkeypatch.setattr(protocol, "PROXY_PORT", free_port())
    found = Port.open()
    assert found is not None
    yield found
    found._listener.close()
    if found._pid:
        os.kill(found._pid, signal.SIGKILL)
        until(lambda: has_ended(found))


def has_ended(port: Port) -> bool:
    port.act()
    return not port._pid


def ask() -> bytes:
    with socket.create_connection(("127.0.0.1", protocol.PROXY_PORT), 5) as inside:
        return read_all(inside)


def asking(port: Port) -> bytes:
    """What a caller is answered while the bridge looks after its port."""
    answers: list[bytes] = []
    caller = threading.Thread(target=lambda: answers.append(ask()))
    caller.start()
    while caller.is_alive():
        port.act()
        time.sleep(0.005)
    caller.join(5)
    return answers[0]


def test_nothing_runs_before_somebody_connects(held: Port) -> None:
    held.act()
    assert held._pid == 0
    assert held.watched() == held._listener.fileno()
    assert held.wait_seconds() is None


def test_the_first_connection_starts_the_relay_and_the_next_one_uses_it(held: Port) -> None:
    assert asking(held).startswith(b"HTTP/1.1 502 ")
    pid = held._pid
    assert pid
    assert ask().startswith(b"HTTP/1.1 502 ")
    assert held._pid == pid
    assert Path(f"/proc/{pid}/environ").read_bytes() == b""


def test_a_killed_relay_is_started_again_by_the_next_connection(held: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_RESTART_SECONDS", 0.0)
    asking(held)
    first = held._pid
    os.kill(first, signal.SIGKILL)
    until(lambda: has_ended(held))
    assert held.watched() == held._listener.fileno()
    assert asking(held).startswith(b"HTTP/1.1 502 ")
    assert held._pid not in (0, first)


def test_a_relay_that_dies_at_once_is_not_started_in_a_circle(held: Port) -> None:
    asking(held)
    os.kill(held._pid, signal.SIGKILL)
    until(lambda: has_ended(held))
    assert held.watched() == -1
    assert held.wait_seconds() is not None
    with socket.create_connection(("127.0.0.1", protocol.PROXY_PORT), 5):
        held.act()
        assert held._pid == 0


def test_when_no_process_is_to_be_had_the_caller_is_turned_away(held: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **named: object) -> int:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr("os.posix_spawn", fail)
    with socket.create_connection(("127.0.0.1", protocol.PROXY_PORT), 5) as inside:
        held.act()
        assert held.watched() == -1
        assert read_all(inside) == b""
    assert held._pid == 0


def test_without_pidfds_its_end_is_asked_for(held: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(pid: int) -> int:
        raise OSError("not here")

    monkeypatch.setattr("os.pidfd_open", fail)
    asking(held)
    assert held.watched() == -1
    assert held.wait_seconds() is not None
    os.kill(held._pid, signal.SIGKILL)
    until(lambda: has_ended(held))


def test_a_port_that_is_taken_is_done_without(held: Port) -> None:
    assert Port.open() is None


def test_tools_are_told_of_the_proxy_in_every_spelling_and_an_agent_may_change_its_mind() -> None:
    env = tool_environ(Paths(proxy="http://127.0.0.1:3128"), {"HTTPS_PROXY": "http://other"}, {"no_proxy": "x.test"})
    assert env["HTTP_PROXY"] == env["http_proxy"] == env["https_proxy"] == env["ALL_PROXY"] == env["all_proxy"] == "http://127.0.0.1:3128"
    assert (env["HTTPS_PROXY"], env["no_proxy"], env["NODE_USE_ENV_PROXY"]) == ("http://other", "x.test", "1")
    assert env["NO_PROXY"] == "localhost,127.0.0.1,::1"
    assert not [name for name in tool_environ(Paths(), {}, {}) if "PROXY" in name.upper()]
