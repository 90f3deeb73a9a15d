"""Ordinary programs as agents run them; each is a shell command that exits 0 when all went well. Run in an empty folder. Pure data."""

from __future__ import annotations

_PYTHON = """
import asyncio, concurrent.futures, multiprocessing, socket, sqlite3, ssl, subprocess, tempfile, threading

async def main():
    async def echo(reader, writer):
        writer.write(await reader.readline())
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"hello\\n")
    assert await reader.readline() == b"hello\\n"
    process = await asyncio.create_subprocess_exec("/bin/true")
    assert await process.wait() == 0

if __name__ == "__main__":
    subprocess.run(["/bin/true"], check=True)
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(abs, [-1, -2]) == [1, 2]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        assert list(pool.map(abs, [-1])) == [1]
    asyncio.run(main())
    socket.getaddrinfo("localhost", 80)
    socket.if_nameindex()
    socket.socketpair()
    sqlite3.connect("db").execute("create table t (x)")
    ssl.create_default_context()
    tempfile.TemporaryFile().close()
"""

_NODE = """
const {Worker} = require("worker_threads"), fs = require("fs/promises"), net = require("net"), os = require("os");
const {execFileSync} = require("child_process");
const work = () => new Promise((done, bad) => new Worker("1 + 1", {eval: true}).on("exit", code => code ? bad(code) : done()));
const talk = () => new Promise(done => {
  const server = net.createServer(client => client.end("hi")).listen(0, "127.0.0.1", () => {
    net.connect(server.address().port, "127.0.0.1").on("data", () => { server.close(); done(); });
  });
});
(async () => {
  os.networkInterfaces(); os.cpus(); execFileSync("/bin/true");
  await fs.writeFile("a", "x".repeat(100000)); await fs.copyFile("a", "b"); await fs.readdir(".");
  await work(); await talk();
})().catch(error => { console.error(error); process.exit(1); });
"""

_C = """
#include <pthread.h>
static void *work(void *given) { return given; }
int main(void) { pthread_t thread; pthread_create(&thread, 0, work, 0); return pthread_join(thread, 0); }
"""


def _with_file(name: str, text: str, command: str) -> str:
    return f"cat > {name} <<'END'\n{text}END\n{command}"


PROGRAMS = {
    "python3": _with_file("a.py", _PYTHON, "python3 a.py"),
    "bash": "set -o pipefail; seq 100 | sort -R | sort -n | tail -1 | grep 100; diff <(echo a) <(echo a) && (sleep 0.1 & wait)",
    "git": "git init -q r && cd r && git config user.email a@b.c && git config user.name a && echo x > f && git add . && "
    "git commit -qm x && git clone -q . ../s && git -C ../s log --oneline | grep x && git gc -q && git worktree add -q ../w",
    "node": _with_file("a.js", _NODE, "node a.js"),
    "npm": "npm --version",
    "gcc": _with_file("a.c", _C, "gcc -O1 -pthread a.c -o a.out && ./a.out"),
    "perl": "perl -MIO::Socket::INET -MPOSIX -e 'fork or exit; wait; print 1'",
    "tar": "mkdir d && echo x > d/x && tar czf d.tgz d && rm -r d && tar xzf d.tgz && cat d/x && mkfifo p && cp -a d e",
    "xargs": "find /usr/bin -maxdepth 1 -name 'python3*' | xargs -P 4 -n 1 ls -l",
    "ps": "ps aux | grep ps && id && nproc && uptime -p && free > /dev/null && df . > /dev/null",
    "ssh-keygen": "ssh-keygen -q -t ed25519 -N '' -f key",
    "curl": "curl --version && ! curl -s --max-time 2 http://127.0.0.1:9/",
    "setarch": "setarch $(uname -m) -R true && setarch linux32 true",
    "java": "java -version",
    "go": "go version",
    "strace": "strace --version",
}
"""By the program that they need."""
