"""Real programs in real sandboxes reach real servers through the proxy, and nothing else. All servers are on loopback."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from ash.config import Config
from ash.egress import Egress, EgressAccess
from ash.models import Json
from ash.sandbox import Limits, Sandbox
from tests.egress.network import OPEN, Table, answering, echo, host
from tests.harness import serving
from tests.integration import sites
from tests.integration.sites import Site
from tests.sandboxes import Pool, leftovers, open_pool, until

pytestmark = [
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed"),
]
LIMITS = Limits(memory_mb=2048, cpu_percent=200, max_processes=200, max_file_mb=256)
ALLOWED = ("web.test:*", "also.test:*")


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not os.path.exists(f"/usr/bin/{program}"), reason=f"{program} is not in /usr/bin, where sandboxes would see it"
    )


class Net(NamedTuple):
    """A pool of sandboxes with a proxy each. What agents ask for is `ALLOWED`; the policy allows loopback."""

    pool: Pool
    egress: Egress
    events: list[tuple[str, str, Json]]

    async def take(self, session: str, *hosts: str) -> Sandbox:
        sandbox = await self.pool.take(session)
        self.egress.bind(sandbox.id, EgressAccess(session, "default", "helper", hosts or ALLOWED))
        return sandbox


@pytest.fixture
async def net(data_dir: str) -> AsyncIterator[Net]:
    events: list[tuple[str, str, Json]] = []

    async def record(session: str, kind: str, data: Json) -> None:
        events.append((session, kind, data))

    table = Table(web_test=["127.0.0.1"], also_test=["127.0.0.1"], metadata_test=["169.254.169.254"])
    async with Egress(policy_of=lambda tenant, agent: OPEN, record=record, resolve=table) as egress:

        async def opened(id: str, gateway: str) -> None:
            await egress.open(id, os.path.dirname(gateway))

        async with open_pool(data_dir, limits=LIMITS, on_open=opened, on_close=egress.close) as pool:
            if pool.status().isolation == "unavailable":
                pytest.skip(f"this host cannot isolate: {pool.status().warnings[0]}")
            yield Net(pool, egress, events)
    assert leftovers(data_dir) == []


@pytest.fixture
async def box(net: Net, site: Site) -> Sandbox:
    """A sandbox whose workspace holds the certificate that `site` is to be trusted by."""
    sandbox = await net.take("s1")
    Path(net.pool.session_dir("s1"), "workspace", "ca.pem").write_bytes(site.ca)
    return sandbox


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="ash-site-") as folder, sites.serving(folder) as found:
        yield found


async def run(sandbox: Sandbox, command: str, timeout: float = 60) -> str:
    result = await sandbox.exec(command, timeout=timeout)
    assert result.exit_code == 0, result
    return result.stdout + result.stderr


async def fails(sandbox: Sandbox, command: str, timeout: float = 60) -> str:
    result = await sandbox.exec(command, timeout=timeout)
    assert result.exit_code != 0, result
    return result.stdout + result.stderr


# Programs that people use


@needs("curl")
async def test_curl_fetches_over_http_and_https(box: Sandbox, site: Site) -> None:
    assert await run(box, f"curl -fsS {site.http}/hello.txt") == "hello from outside\n"
    assert await run(box, f"curl -fsS --cacert ca.pem {site.https}/hello.txt") == "hello from outside\n"


async def test_pythons_urllib_fetches_over_http_and_https(box: Sandbox, site: Site) -> None:
    script = (
        "import ssl, sys, urllib.request as u; print(u.urlopen(sys.argv[1], context=ssl.create_default_context(cafile='ca.pem')).read())"
    )
    for base in (site.http, site.https):
        assert "hello from outside" in await run(box, f'/usr/bin/python3 -c "{script}" {base}/hello.txt')


@pytest.mark.skipif(not os.path.isdir("/usr/lib/python3/dist-packages/pip"), reason="the system's Python has no pip")
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_pip_installs_from_an_index(box: Sandbox, site: Site, scheme: str) -> None:
    base = site.http if scheme == "http" else site.https
    trust = "--trusted-host web.test" if scheme == "http" else "--cert ca.pem"
    options = f"-q --no-cache-dir --disable-pip-version-check --target lib {trust} --index-url {base}/simple"
    await run(box, f"/usr/bin/python3 -m pip install {options} toy")
    assert await run(box, "PYTHONPATH=lib /usr/bin/python3 -c 'import toy; print(toy.VALUE)'") == "42\n"


@needs("npm")
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_npm_installs_from_a_registry(box: Sandbox, site: Site, scheme: str) -> None:
    registry = f"{site.http}/npm/" if scheme == "http" else f"{site.https}/npms/"
    await run(box, f"npm install --no-audit --no-fund --no-update-notifier --cafile ca.pem --registry {registry} toy", timeout=120)
    assert await run(box, "node -p 'require(\"toy\")'") == "42\n"


@needs("git")
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_git_clones(box: Sandbox, site: Site, scheme: str) -> None:
    base = site.http if scheme == "http" else site.https
    await run(box, f"GIT_SSL_CAINFO=/workspace/ca.pem git clone -q {base}/toy.git copy")
    assert await run(box, "git -C copy log --format=%s") == "first\n"


@needs("node")
async def test_node_reaches_hosts_where_it_heeds_the_variables(box: Sandbox, site: Site) -> None:
    major = int((await run(box, "node -p 'process.versions.node'")).split(".")[0])
    fetch = f"fetch('{site.http}/hello.txt').then(a => a.text()).then(console.log, e => {{ console.error(e); process.exit(1) }})"
    if major < 24:
        pytest.skip(f"node {major} heeds no proxy in fetch; from 24 on (and late 22) it does")
    assert "hello from outside" in await run(box, f'node -e "{fetch}"')


@needs("go")
async def test_go_fetches(box: Sandbox, site: Site) -> None:
    program = """package main
import ("io"; "net/http"; "os")
func main() { a, e := http.Get(os.Args[1]); if e != nil { panic(e) }; io.Copy(os.Stdout, a.Body) }
"""
    await box.exec("cat > /workspace/main.go", stdin=program)
    assert "hello from outside" in await run(box, f"cd /workspace && go run main.go {site.http}/hello.txt", timeout=240)


# Programs that want more


@needs("curl")
async def test_what_is_not_allowed_is_a_readable_error_inside_and_an_event_outside(net: Net, box: Sandbox) -> None:
    said = await run(box, "curl -sS http://evil.test/")
    assert "evil.test:80 is not allowed by the agent's settings" in said
    assert 'Add "evil.test" to sandbox.network.allowedDomains' in said
    assert "403" in await fails(box, "curl -sS https://evil.test/")
    assert "evil.test:443 is not allowed by the agent's settings" in await fails(
        box, "/usr/bin/python3 -c \"import urllib.request as u; u.urlopen('https://evil.test/')\""
    )
    await until(lambda: len(net.events) == 2)
    assert {(session, kind, data["host"], data["port"]) for session, kind, data in net.events} == {
        ("s1", "egress.refused", "evil.test", 80), ("s1", "egress.refused", "evil.test", 443)
    }  # fmt: skip


@needs("curl")
@pytest.mark.parametrize(
    "target", ["metadata.test", "169.254.169.254", "[::ffff:169.254.169.254]", "2852039166", "0xa9fea9fe", "169.254.43518"]
)
async def test_metadata_is_not_reached_by_any_spelling(net: Net, target: str) -> None:
    sandbox = await net.take("s2", "*:*", "0.0.0.0/0:*", "[::]/0:*")
    code = await run(
        sandbox, f"curl -sS -o /dev/null -w '%{{http_code}}' --connect-timeout 5 --globoff 'http://{target}/latest/meta-data/'"
    )
    assert code in ("403", "400")


async def test_there_is_no_name_service_and_no_way_around_the_proxy(box: Sandbox) -> None:
    async with host(echo) as port:
        direct = f"import socket; socket.create_connection(('127.0.0.1', {port}), 3)"
        await fails(box, f'/usr/bin/python3 -c "{direct}"')
        ask = f"CONNECT web.test:{port} HTTP/1.0\\r\\n\\r\\n"
        through = f"import socket; s = socket.create_connection(('127.0.0.1', 3128), 3); s.sendall(b'{ask}'); print(s.recv(99))"
        assert "200 Connection established" in await run(box, f'/usr/bin/python3 -c "{through}"')
    await fails(box, "/usr/bin/python3 -c \"import socket; socket.getaddrinfo('web.test', 80)\"")


async def test_the_socket_itself_gives_the_same_answers(box: Sandbox) -> None:
    ask = "CONNECT evil.test:443 HTTP/1.1\\r\\nHost: web.test\\r\\n\\r\\n"
    script = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/ash/egress.sock'); s.sendall(b'{ask}'); print(s.recv(999))"
    assert "403 evil.test:443 is not allowed" in await run(box, f'/usr/bin/python3 -c "{script}"')


async def test_another_sessions_proxy_cannot_be_reached(net: Net, box: Sandbox) -> None:
    other = await net.take("s2", "also.test:*")
    path = os.path.join(net.pool.data_dir, "run", other.id, "gw", "egress.sock")
    assert os.path.exists(path)
    script = f"import socket; socket.socket(socket.AF_UNIX).connect('{path}')"
    await fails(box, f'/usr/bin/python3 -c "{script}"')
    assert (await run(box, "find / -type s 2> /dev/null || true")).split() == ["/run/ash/egress.sock"]


# The relay


async def relays(sandbox: Sandbox) -> list[str]:
    return (await run(sandbox, "grep -la '[r]untime.relay' /proc/[0-9]*/cmdline || true")).split()


@needs("curl")
async def test_a_sandbox_that_uses_no_network_has_no_relay(box: Sandbox, site: Site) -> None:
    assert await relays(box) == []
    await run(box, f"curl -fsS {site.http}/hello.txt")
    assert len(await relays(box)) == 1


@needs("curl")
async def test_a_relay_killed_from_inside_comes_back(box: Sandbox, site: Site) -> None:
    await run(box, f"curl -fsS {site.http}/hello.txt")
    (cmdline,) = await relays(box)
    await run(box, f"kill -9 {cmdline.split('/')[2]}")
    assert await run(box, f"curl -fsS --retry 5 --retry-connrefused {site.http}/hello.txt") == "hello from outside\n"
    (again,) = await relays(box)
    assert again != cmdline


@needs("curl")
async def test_the_end_of_a_sandbox_ends_its_connections(net: Net, box: Sandbox) -> None:
    async with host(answering(b"HTTP/1.1 200 OK\r\n\r\nstart")) as port:
        task = asyncio.ensure_future(box.exec(f"curl -sN http://web.test:{port}/; sleep 30"))
        await until(lambda: net.egress.status()["connections"] >= 1)
        await box.stop(grace=0)
        await asyncio.gather(task, return_exceptions=True)
    assert net.egress.status()["open"] == 0
    assert net.events[-1][1] == "egress.recorded"


@needs("curl")
async def test_large_files_arrive_whole(net: Net, box: Sandbox) -> None:
    size = 32 << 20
    async with host(answering(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size, *[b"x" * (1 << 20)] * 32)) as port:
        assert await run(box, f"curl -fsS http://web.test:{port}/ | wc -c") == f"{size}\n"
        assert await run(box, f"curl -fsSp http://web.test:{port}/ | wc -c") == f"{size}\n"
    counted = (net.egress.live("s1") or {})["hosts"]["web.test"]
    assert counted["connections"] == 2
    assert counted["bytesDown"] >= 2 * size


# The whole server


@needs("curl")
async def test_a_server_with_a_policy_lets_through_what_agent_and_operator_agree_on(make_config: Callable[..., Config]) -> None:
    config = make_config(sandbox="bwrap", warm_sandboxes=0)
    Path(config.data_dir, "policy.toml").write_text('[egress]\nallow = ["127.0.0.2:*", "127.0.0.3:*"]\nallow_private = ["127.0.0.0/8"]\n')
    asked = {"sandbox": {"network": {"allowedDomains": ["127.0.0.2:*", "127.0.0.4:*"]}}}
    async with serving(config) as server, host(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"), "127.0.0.2") as port:
        if server.parts.sandboxes.status().isolation == "unavailable":
            pytest.skip("this host cannot isolate")
        files = [
            {"path": "CLAUDE.md", "content": encoded("be kind")},
            {"path": ".claude/settings.json", "content": encoded(json.dumps(asked))},
        ]
        await server.call("POST", "/api/agents", {"name": "helper", "files": files}, expect=201)
        id = (await server.call("POST", "/api/sessions", {"agent": "helper"}, expect=201))["session"]["id"]

        async def curl(address: str) -> str:
            command = f"curl -sS http://{address}:{port}/"
            return str((await server.call("POST", f"/api/sessions/{id}/exec", {"command": command}, expect=200))["stdout"])

        assert await curl("127.0.0.2") == "hi"
        assert "not allowed by the agent's settings" in await curl("127.0.0.3")
        assert "not allowed by the operator's policy" in await curl("127.0.0.4")
        shown = (await server.call("GET", f"/api/sessions/{id}"))["session"]["egress"]
        assert shown["refused"] == 2
        assert shown["hosts"]["127.0.0.2"]["connections"] == 1


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


async def test_without_a_sandbox_there_is_no_relay_and_no_proxy_variable(make_config: Callable[..., Config]) -> None:
    async with serving(make_config(sandbox="none")) as server:
        id = await server.session()
        environment = (await server.call("POST", f"/api/sessions/{id}/exec", {"command": "env"}, expect=200))["stdout"]
    assert "HOME=" in environment
    assert "PROXY" not in environment.upper()
