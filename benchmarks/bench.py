"""Measures the built ash.pyz on this machine and prints the table of docs/performance.md.

    python benchmarks/bench.py [--pyz dist/ash.pyz] [--quick] [--write docs/performance.md]

Each figure is measured in this one run, next to a calibration (an empty `python -I -S`), because absolute figures do not
travel between machines. Loopback only; bounded in count and time; every server and folder it makes is removed.
Needs psutil.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import psutil

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
SCRIPT = {"replies": [{"text": "Measured answers are short answers."}]}


class Row(NamedTuple):
    what: str
    value: str
    aim: str
    how: str


def clock(work: Callable[[], object]) -> float:
    """Milliseconds that `work` takes."""
    begun = time.perf_counter()
    work()
    return (time.perf_counter() - begun) * 1000


def spread(samples: list[float], unit: str = "ms") -> str:
    ordered = sorted(samples)
    return f"p50 {statistics.median(ordered):.1f} {unit}, p95 {ordered[int((len(ordered) - 1) * 0.95)]:.1f} {unit} (n={len(ordered)})"


def proportional_memory(processes: list[psutil.Process]) -> float:
    """PSS in MiB: memory shared between processes counts once."""
    import psutil

    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total / 2**20


class Server:
    """One server under test with a data folder of its own."""

    def __init__(self, pyz: Path, folder: Path, env: dict[str, str], *arguments: str) -> None:
        self.data_dir = Path(tempfile.mkdtemp(dir=folder))
        self._env, self._pyz, self._arguments = env, pyz, arguments
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> Server:
        command = [sys.executable, str(self._pyz), "start", "--port", "0", "--data-dir", str(self.data_dir), *self._arguments]
        self.process = subprocess.Popen(command, env=self._env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.port = json.loads((self.data_dir / "server.json").read_text())["port"]
                self.call("GET", "/health")
                return self
            except (OSError, ValueError):
                time.sleep(0.002)
        raise SystemExit(f"the server did not start: {self.process.stderr and self.process.stderr.read(2000)!r}")

    def __exit__(self, *_: object) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)

    def call(self, method: str, path: str, body: object = None, connection: http.client.HTTPConnection | None = None) -> Any:
        link = connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        link.request(method, path, json.dumps(body) if body is not None else None, {"Content-Type": "application/json"})
        answer = link.getresponse()
        raw = answer.read()
        if answer.status >= 400:
            raise SystemExit(f"{method} {path}: {answer.status} {raw[:300]!r}")
        if connection is None:
            link.close()
        return json.loads(raw)

    def create(self, connection: http.client.HTTPConnection | None = None) -> str:
        return str(self.call("POST", "/api/sessions", {"agent": "bench"}, connection)["session"]["id"])

    def wait_for_warm(self, count: int) -> None:
        deadline = time.monotonic() + 10
        while self.call("GET", "/health")["pool"]["warm"] < count and time.monotonic() < deadline:
            time.sleep(0.01)

    def turn(self, session: str, partial: bool = False) -> dict[str, float]:
        """Milliseconds to the headers, the first event, the first text and the end of one turn, and what the bridge says it took."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = json.dumps({"content": "Hello", "includePartialMessages": partial})
        begun = time.perf_counter()
        link.request("POST", f"/api/sessions/{session}/messages", body, {"Content-Type": "application/json"})
        answer = link.getresponse()
        times = {"headers": (time.perf_counter() - begun) * 1000}
        for line in answer:
            moment = (time.perf_counter() - begun) * 1000
            if line.startswith(b"event: "):
                times.setdefault("first", moment)
            if line.startswith(b"event: text_delta") or b'"type":"assistant"' in line:
                times.setdefault("text", moment)
            if line.startswith(b"data: ") and b'"duration_ms"' in line:
                times["bridge"] = json.loads(line[6:])["duration_ms"]
            times["total"] = moment
        link.close()
        return times

    def whole_turn(self, session: str, link: http.client.HTTPConnection) -> dict[str, float]:
        """Milliseconds of a turn on a connection that stays open, and what the bridge says it took."""
        begun = time.perf_counter()
        link.request("POST", f"/api/sessions/{session}/messages", json.dumps({"content": "Hello"}), {"Content-Type": "application/json"})
        lines = link.getresponse().read().splitlines()
        total = (time.perf_counter() - begun) * 1000
        return {"total": total, "bridge": next(json.loads(line[6:])["duration_ms"] for line in lines if b'"duration_ms"' in line)}

    def tree(self) -> list[psutil.Process]:
        import psutil

        assert self.process is not None
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]


def median_start(command: list[str], env: dict[str, str], rounds: int) -> list[float]:
    return [clock(lambda: subprocess.run(command, env=env, capture_output=True, check=True)) for _ in range(rounds)]


def start_up(pyz: Path, folder: Path, env: dict[str, str], rounds: int) -> Iterator[Row]:
    bare = median_start([sys.executable, "-I", "-S", "-c", "pass"], env, rounds * 2)
    yield Row("calibration: empty `python -I -S`", spread(bare), "", "process start to exit")
    yield Row(
        "`ash --help`", spread(median_start([sys.executable, str(pyz), "--help"], env, rounds * 2)), "< 80 ms", "process start to exit"
    )
    fresh = {**env, "ASH_CACHE_DIR": str(folder / "fresh-cache")}
    first = clock(lambda: Server(pyz, folder, fresh).__enter__().__exit__())
    yield Row("first start ever, unpacking, to stopped again", f"{first:.0f} ms", "", "exec to exit, empty cache; once")
    healthy = []
    for _ in range(rounds):
        server = Server(pyz, folder, env)
        healthy.append(clock(server.__enter__))
        server.__exit__()
    yield Row("start to first 200 of /health", spread(healthy), "< 600 ms", "exec to answer, polled every 2 ms; file unpacked before")


def sessions(pyz: Path, folder: Path, env: dict[str, str], rounds: int) -> Iterator[Row]:
    with Server(pyz, folder, env, "--warm-sandboxes", "0") as server:
        deploy(server)
        cold = [clock(server.create) for _ in range(rounds)]
    with Server(pyz, folder, env, "--warm-sandboxes", "2") as server:
        server.wait_for_warm(2)
        time.sleep(1)
        memory = proportional_memory(server.tree()[:1])
        yield Row("idle server, PSS", f"{memory:.1f} MB", "< 60 MB", "smaps_rollup of the server process, two warm sandboxes beside it")
        deploy(server)
        warm = []
        for _ in range(rounds):
            server.wait_for_warm(2)
            warm.append(clock(server.create))
    yield Row("create a session, warm sandbox", spread(warm), "p50 < 8 ms", "POST /api/sessions to 201, two warm ones waiting")
    yield Row("create a session, cold", spread(cold), "p50 < 80 ms", "the same with no warm pool")


def deploy(server: Server) -> None:
    server.call("POST", "/api/agents", {"name": "bench", "systemPrompt": "Answer briefly."})


def turns(pyz: Path, folder: Path, env: dict[str, str], rounds: int) -> Iterator[Row]:
    script = folder / "script.json"
    script.write_text(json.dumps(SCRIPT))
    with Server(pyz, folder, env, "--model", "offline", "--offline-script", str(script)) as server:
        deploy(server)
        samples = []
        for _ in range(rounds):
            server.wait_for_warm(2)
            session = server.create()
            samples.append(server.turn(session, partial=True))
            server.call("DELETE", f"/api/sessions/{session}")
        session = server.create()
        link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        later = [server.whole_turn(session, link) for _ in range(rounds * 4)]
        link.close()
    yield Row("turn: first event", spread([s["first"] for s in samples]), "", "POST messages to the first frame, first turn of a session")
    yield Row("turn: first text", spread([s["text"] for s in samples]), "", "to the first text_delta")
    yield Row("turn: total", spread([s["total"] for s in samples]), "", "to the end of the stream, scripted reply of five words")
    yield Row(
        "later turns: total", spread([s["total"] for s in later]), "", "the same, one turn after another in one session, on one connection"
    )
    own = [s["total"] - s["bridge"] for s in later]
    yield Row("later turns: the server's part", spread(own), "p50 < 5 ms", "total less what the bridge reports as the turn's duration")


def live_memory(pyz: Path, folder: Path, env: dict[str, str], count: int) -> Iterator[Row]:
    with Server(pyz, folder, env, "--warm-sandboxes", "0") as server:
        deploy(server)
        before = proportional_memory(server.tree())
        for _ in range(count):
            server.turn(server.create())
        time.sleep(0.5)
        after = proportional_memory(server.tree())
        yield Row(
            "live session after a turn, PSS",
            f"{(after - before) / count:.1f} MB",
            "< 9 MB",
            f"process tree with {count} sessions, less without",
        )


def burst(pyz: Path, folder: Path, env: dict[str, str], seconds: float, workers: int = 4) -> Iterator[Row]:
    counts = [0] * workers
    with Server(pyz, folder, env, "--warm-sandboxes", "4") as server:
        deploy(server)
        stop = time.monotonic() + seconds

        def work(index: int) -> None:
            while time.monotonic() < stop:
                server.call("DELETE", f"/api/sessions/{server.create()}")
                counts[index] += 1

        threads = [threading.Thread(target=work, args=(index,)) for index in range(workers)]
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rate = sum(counts) / (time.monotonic() - begun)
    yield Row("sessions created per second", f"{rate:.0f}", "> 30", f"{workers} callers for {seconds:g} s, each session ended at once")


def table(rows: list[Row]) -> str:
    lines = ["| what | measured | aim | how |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {row.what} | {row.value} | {row.aim} | {row.how} |" for row in rows])


def write(page: Path, text: str) -> None:
    """Put the table between the marks of the page; everything around it is prose and stays."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pyz", type=Path, default=ROOT / "dist" / "ash.pyz")
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it works")
    parser.add_argument("--write", type=Path, help="put the table into this page")
    options = parser.parse_args()
    rounds = 5 if options.quick else 25
    folder = Path(tempfile.mkdtemp(prefix="ash-bench-"))
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "ASH_CACHE_DIR": str(folder / "cache")}
    rows: list[Row] = []
    try:
        with Server(options.pyz, folder, env):
            pass  # unpack once, outside of every figure
        for part in (
            start_up(options.pyz, folder, env, max(3, rounds // 2)),
            sessions(options.pyz, folder, env, rounds),
            turns(options.pyz, folder, env, rounds),
            live_memory(options.pyz, folder, env, 5 if options.quick else 20),
            burst(options.pyz, folder, env, 3 if options.quick else 10),
        ):
            for row in part:
                rows.append(row)
                print(f"{row.what:48} {row.value:44} {row.aim}", flush=True)  # noqa: T201 - a program's output
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    moment = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    host = f"{os.cpu_count()} cores, Linux {platform.release()}, CPython {platform.python_version()}"
    size = f"`ash.pyz` of {options.pyz.stat().st_size / 1e6:.1f} MB"
    if options.write:
        write(options.write, f"Measured {moment}: {host}, {size}.\n\n{table(rows)}")


if __name__ == "__main__":
    main()
