"""The bridge as a process: connections, acknowledgements, commands of the server, its own end."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ash import protocol
from ash.bridge import Lines
from ash.runtime.outbox import LIMIT_BYTES, Connection, Outbox
from tests.runtime.fakes import HOLD, WAIT, Driver, calls, driver, messages, text, tool, until


@pytest.fixture
def bridge(data_dir: str) -> Iterator[Driver]:
    with driver(Path(data_dir)) as started:
        started.init()
        yield started


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"


# Connections and acknowledgements


def test_the_greeting_says_pid_and_version_and_is_not_numbered(bridge: Driver) -> None:
    assert bridge.events[0] == {"ev": "ready", "n": 0, "pid": bridge.process.pid, "version": protocol.VERSION}


def test_events_are_numbered_without_gaps(bridge: Driver) -> None:
    bridge.gateway.script = [calls(tool("Bash", command="true")), text("x")]
    bridge.turn(includePartialMessages=True)
    numbers = [event["n"] for event in bridge.events]
    assert numbers == list(range(len(numbers)))


def test_a_new_connection_replaces_the_old_one(bridge: Driver) -> None:
    old = bridge.connection
    bridge.connection = None
    assert bridge.connect()["ev"] == "ready"
    assert old is not None
    with old:
        old.settimeout(WAIT)
        assert old.recv(1) == b""
    assert bridge.init()["ev"] == "ok"


def test_what_was_not_acknowledged_is_sent_again_in_order(bridge: Driver) -> None:
    bridge.acknowledges = False
    first = bridge.turn()
    bridge.send("ack", n=first[1]["n"])
    bridge.exec("true")
    bridge.connect()
    again = [bridge.read() for _ in first[2:]]
    assert again == first[2:]


def test_a_turn_goes_on_while_no_server_is_connected(bridge: Driver) -> None:
    bridge.gateway.script = [[*text("hello")[:3], HOLD, *text("hello")[3:]]]
    bridge.query("hi")
    assert bridge.gateway.holding.wait(WAIT)
    assert bridge.connection is not None
    bridge.connection.close()
    bridge.gateway.released.set()
    bridge.connect()
    turn = bridge.finish()
    assert messages(turn, "result")[0]["result"] == "hello"


def test_a_server_that_reads_nothing_blocks_the_turn_but_not_the_commands(bridge: Driver) -> None:
    bridge.acknowledges = False
    big = "x" * 3_000_000
    bridge.gateway.script = [text(big) for _ in range(4)]
    for number in range(4):
        bridge.query("go", turn_id=f"t{number}", includePartialMessages=True)
        bridge.read_until(lambda event: event["ev"] in ("message", "done"))
    assert bridge.exec("echo still here")["stdout"] == "still here\n"
    bridge.acknowledges = True
    bridge.send("ack", n=bridge.events[-1]["n"])
    bridge.connect()


def test_the_outbox_keeps_no_more_than_its_limit() -> None:
    import threading

    outbox = Outbox(limit=1000)
    done = threading.Event()

    def produce() -> None:
        for _ in range(50):
            outbox.emit("log", level="system", text="x" * 100)
        done.set()

    threading.Thread(target=produce, daemon=True).start()
    until(lambda: outbox._size >= 1000, "the outbox is full")
    assert outbox._size < 1300
    assert not done.is_set()
    for number in range(1, 51):
        until(lambda number=number: outbox._acknowledged + len(outbox._lines) >= number, "the next event")  # type: ignore[misc]
        outbox.acknowledge(number)
    assert done.wait(WAIT)


def test_an_event_that_fits_no_line_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Outbox().answer("log", level="system", text="x" * protocol.MAX_LINE_BYTES)


def test_acknowledging_twice_or_too_much_does_no_harm() -> None:
    outbox = Outbox()
    outbox.answer("log", level="system", text="a")
    outbox.acknowledge(99)
    outbox.acknowledge(1)
    outbox.answer("log", level="system", text="b")
    ours, theirs = socket.socketpair()
    connection = Connection(ours, outbox, b"")
    theirs.settimeout(WAIT)
    assert protocol.decode_event(theirs.recv(1000).strip())["n"] == 2
    connection.close()
    theirs.close()


def test_the_limit_leaves_room_for_a_usual_turn() -> None:
    assert LIMIT_BYTES >= 1024 * 1024


# Lines


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b"[]",
        b'{"cmd":"nothing","id":1}',
        b'{"cmd":"query","id":1}',
        b'{"cmd":"exec","id":true,"command":"x","timeout":1}',
        b"\xff\xfe",
        b"",
    ],
)
def test_a_malformed_command_is_answered_with_an_error(bridge: Driver, line: bytes) -> None:
    bridge.send_raw(line + b"\n")
    assert "could not be read" in bridge.read()["error"]
    assert bridge.exec("echo fine")["stdout"] == "fine\n"


def test_lines_may_arrive_cut_anywhere() -> None:
    lines = Lines()
    data = "{'a'}\n{'ü'}\nrest".encode()
    found = [line for byte in data for line in lines.feed(bytes([byte]))]
    assert found == [b"{'a'}", "{'ü'}".encode()]


def test_a_line_beyond_the_limit_is_skipped_and_the_next_one_is_read() -> None:
    lines = Lines()
    chunk = b"x" * (16 * 1024 * 1024)
    found = [line for _ in range(5) for line in lines.feed(chunk)]
    assert found == []
    assert lines.feed(b"tail\nnext\n") == [None, b"next"]


def test_a_line_with_fifty_megabytes_is_taken(bridge: Driver) -> None:
    bridge.query("x" * 50_000_000)
    bridge.finish()
    assert len(bridge.gateway.requests[0]["messages"][0]["content"][0]["text"]) == 50_000_000


# Commands


def test_a_query_before_init_fails_and_ends(data_dir: str) -> None:
    with driver(Path(data_dir)) as bridge:
        error, done = bridge.turn()
    assert "not been initialized" in error["error"]
    assert done["status"] == "failed"


def test_a_second_query_is_refused_while_a_turn_runs(bridge: Driver) -> None:
    bridge.gateway.script = [[HOLD, *text("one")]]
    bridge.query("first")
    assert bridge.gateway.holding.wait(WAIT)
    refused = bridge.turn("second", turn_id="t2")
    assert refused[-1]["status"] == "failed"
    bridge.gateway.released.set()
    assert bridge.finish("t1")[-1]["status"] == "completed"


def test_init_is_refused_while_a_turn_runs(bridge: Driver) -> None:
    bridge.gateway.script = [[HOLD, *text("one")]]
    bridge.query("first")
    assert bridge.gateway.holding.wait(WAIT)
    assert "a turn is running" in bridge.init()["error"]


def test_turns_may_follow_each_other_at_once(bridge: Driver) -> None:
    for number in range(20):
        bridge.gateway.script = [text("x")]
        assert bridge.turn(turn_id=f"t{number}")[-1]["status"] == "completed"


def test_a_bad_init_is_answered_with_an_error(bridge: Driver) -> None:
    number = bridge.send("init", agent={}, options={"systemPrompt": 5}, transcript=[])
    assert "init failed" in bridge.read_until(lambda event: event.get("command_id") == number)["error"]


def test_a_permission_that_nobody_asked_for_is_an_error(bridge: Driver) -> None:
    number = bridge.send("permission", request_id="r", behavior="allow")
    assert bridge.read_until(lambda event: event.get("command_id") == number)["ev"] == "error"


# exec


def test_exec_gives_output_errors_and_exit_code(bridge: Driver) -> None:
    result = bridge.exec("echo out; echo err >&2; exit 3")
    assert (result["stdout"], result["stderr"], result["exit_code"]) == ("out\n", "err\n", 3)
    assert not result["timed_out"]
    assert not result["truncated"]


def test_exec_runs_in_the_workspace_with_env_cwd_and_stdin(bridge: Driver) -> None:
    (bridge.root / "workspace" / "sub").mkdir()
    result = bridge.exec('pwd; echo "$A $HOME"; cat', cwd="sub", env={"A": "1"}, stdin="given")
    assert result["stdout"] == f"{bridge.root}/workspace/sub\n1 {bridge.root}/home\ngiven"


def test_exec_in_a_folder_that_does_not_exist_says_so(bridge: Driver) -> None:
    assert "no such folder" in bridge.exec("true", cwd="nowhere")["error"]


def test_exec_that_a_signal_ended_has_128_and_the_signal_as_its_code(bridge: Driver) -> None:
    assert bridge.exec("kill -9 $$")["exit_code"] == 128 + signal.SIGKILL


def test_exec_beyond_its_time_is_ended_with_its_children(bridge: Driver) -> None:
    started = time.monotonic()
    result = bridge.exec("sleep 60 & echo $!; trap '' TERM; sleep 60", timeout=0.2)
    assert result["timed_out"]
    assert result["exit_code"] == 128 + signal.SIGKILL
    assert time.monotonic() - started < WAIT
    until(lambda: not is_alive(int(result["stdout"])), "the child is gone")


def test_exec_can_be_cancelled(bridge: Driver) -> None:
    number = bridge.send("exec", command="sleep 60", timeout=60)
    bridge.send("cancel", command_id=number)
    result = bridge.read_until(lambda event: event.get("command_id") == number)
    assert result["exit_code"] == 128 + signal.SIGTERM
    assert not result["timed_out"]


def test_exec_keeps_ten_mebibytes_and_says_that_there_was_more(bridge: Driver) -> None:
    result = bridge.exec("head -c 12000000 /dev/zero | tr '\\0' x")
    assert result["truncated"]
    assert len(result["stdout"]) == 10 * 1024 * 1024


def test_the_worst_exec_output_fits_a_line(bridge: Driver) -> None:
    assert len(bridge.exec("head -c 11000000 /dev/zero")["stdout"]) == 10 * 1024 * 1024


def test_several_execs_run_at_the_same_time_and_during_a_turn(bridge: Driver) -> None:
    bridge.gateway.script = [[HOLD, *text("one")]]
    bridge.query("hi")
    assert bridge.gateway.holding.wait(WAIT)
    first = bridge.send("exec", command="until [ -e go ]; do sleep 0.01; done; echo first", timeout=5)
    assert bridge.exec("touch go; echo second")["stdout"] == "second\n"
    found = [event for event in bridge.events if event.get("command_id") == first]
    result = found[0] if found else bridge.read_until(lambda event: event.get("command_id") == first)
    assert result["stdout"] == "first\n"
    bridge.gateway.released.set()
    assert bridge.finish()[-1]["status"] == "completed"


def test_exec_returns_although_a_background_child_holds_its_output(bridge: Driver) -> None:
    started = time.monotonic()
    result = bridge.exec("(sleep 0.5; echo late; touch survived; sleep 60) & echo now $!")
    assert result["stdout"].startswith("now ")
    assert time.monotonic() - started < 0.5
    until(lambda: (bridge.root / "workspace" / "survived").exists(), "the child outlives its shell and its output")


# The end


def test_shutdown_ends_the_turn_the_commands_and_the_process(bridge: Driver) -> None:
    bridge.gateway.script = [calls(tool("Bash", command="sleep 60 & echo $! > child; wait"))]
    bridge.query("hi")
    child = bridge.root / "workspace" / "child"
    until(lambda: child.exists() and child.read_text() != "", "the child has started")
    bridge.send("shutdown")
    assert bridge.finish()[-1]["status"] == "interrupted"
    assert bridge.process.wait(WAIT) == 0
    until(lambda: not is_alive(int(child.read_text())), "the child is gone")


def test_sigterm_leaves_no_process_behind(bridge: Driver) -> None:
    pid = int(bridge.exec("sleep 60 & echo $!")["stdout"])
    bridge.process.terminate()
    assert bridge.process.wait(WAIT) == 0
    until(lambda: not is_alive(pid), "the child is gone")


@pytest.mark.parametrize("end", ["terminate", "shutdown"])
def test_a_silent_child_of_a_command_that_is_over_does_not_outlive_the_bridge(bridge: Driver, end: str) -> None:
    first = int(bridge.exec("sleep 433 >/dev/null 2>&1 & echo $!")["stdout"])
    second = int(bridge.exec("sleep 433 >/dev/null 2>&1 & echo $!")["stdout"])
    if end == "terminate":
        bridge.process.terminate()
    else:
        bridge.send("shutdown")
    assert bridge.process.wait(WAIT) == 0
    until(lambda: not is_alive(first) and not is_alive(second), "the children are gone")


def test_a_bridge_that_nobody_connects_to_ends_itself(data_dir: str) -> None:
    started = Driver(Path(data_dir), orphan_timeout=0.2)
    try:
        assert started.process.wait(WAIT) == 0
    finally:
        started.close()


def test_a_bridge_that_lost_its_server_ends_itself(data_dir: str) -> None:
    with driver(Path(data_dir), orphan_timeout=0.3) as bridge:
        assert bridge.connection is not None
        bridge.connection.close()
        assert bridge.process.wait(WAIT) == 0


def test_a_bridge_with_a_server_does_not_end_itself(data_dir: str) -> None:
    with driver(Path(data_dir), orphan_timeout=0.2) as bridge:
        assert bridge.exec("sleep 0.5; echo alive")["stdout"] == "alive\n"


def test_commands_do_not_inherit_the_bridge_s_descriptors(bridge: Driver) -> None:
    assert bridge.exec("ls /proc/self/fd")["stdout"].split() == ["0", "1", "2", "3"]


def test_work_leaves_no_descriptor_thread_or_zombie_behind(bridge: Driver) -> None:
    def left() -> tuple[int, int, int]:
        tasks = list(Path(f"/proc/{bridge.process.pid}/task").iterdir())
        children = [child for task in tasks for child in (task / "children").read_text().split()]
        return len(os.listdir(f"/proc/{bridge.process.pid}/fd")), len(tasks), len(children)

    def work(turn_id: str) -> None:
        bridge.gateway.script = [calls(tool("Bash", command="(sleep 0.1; echo x) &"), tool("Grep", "g", pattern="x")), text("x")]
        bridge.turn(turn_id=turn_id)
        bridge.exec("no-such-command", timeout=0.01)
        bridge.exec("sleep 5", timeout=0.01)
        bridge.exec("true", cwd="nowhere")

    before = left()
    for number in range(3):
        work(f"w{number}")
    until(lambda: left() == before, f"as at the beginning: {before}, not {left()}")
