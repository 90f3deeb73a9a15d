"""A secret used by real programs in a real sandbox of a real server, and looked for afterwards everywhere that anyone inside could look."""

from __future__ import annotations

import base64
import json
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ash.config import Config
from ash.models import Json
from tests.egress.network import Table
from tests.harness import Server, serving
from tests.integration import sites
from tests.integration.sites import Site

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")

CANARY = "canary-7f3a9/B+c5d"
BASIC = base64.b64encode(f"me:{CANARY}".encode()).decode()
POLICY = '[egress]\nallow = ["web.test:*"]\nallow_private = ["127.0.0.0/8"]\n'


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not os.path.exists(f"/usr/bin/{program}"), reason=f"{program} is not in /usr/bin, where sandboxes would see it"
    )


class Guarded(sites.Files):
    """Shows its files to those with the secret, and /echo to everybody: what they sent."""

    heard: list[str] = []  # noqa: RUF012 - the test's, not a request's

    def do_GET(self) -> None:
        given = self.headers.get("Authorization", "")
        Guarded.heard.append(f"{self.path} {given}")
        if self.path.startswith("/echo"):
            self._send(200, json.dumps(dict(self.headers)).encode())
        elif CANARY in given or BASIC in given:
            super().do_GET()
        else:
            self._send(401, b"who are you?\n")

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 401:
            self.send_header("WWW-Authenticate", 'Basic realm="web"')
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="ash-site-") as folder, sites.serving(folder, Guarded) as found:
        yield found


class Resolver(Table):
    """Stands in for this machine's resolver, which does not know the test's names."""

    def __init__(self) -> None:
        super().__init__(web_test=["127.0.0.1"])

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
async def server(site: Site, make_config: Callable[..., Config], data_dir: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    monkeypatch.setattr("ash.egress.proxy.SystemResolver", Resolver)
    Path(data_dir, "policy.toml").write_text(POLICY)
    Path(data_dir, "private-ca.pem").write_bytes(site.ca)
    Guarded.heard.clear()
    config = make_config(egress_ca_file=str(Path(data_dir, "private-ca.pem")), warm_sandboxes=1, max_processes=200)
    async with serving(config) as found:
        if found.parts.sandboxes.status().isolation != "bwrap":
            pytest.skip("this host cannot isolate")
        yield found


async def begin(server: Server, site: Site, **fields: str) -> str:
    """A session on an agent that has the canary for the site."""
    await server.deploy()
    body = {"type": "custom", "key": CANARY, "agent": "helper", "host": site.https.removeprefix("https://"), "variable": "TOKEN", **fields}
    await server.call("POST", "/api/credentials", body, expect=201)
    return str((await server.call("POST", "/api/sessions", {"agent": "helper"}, expect=201))["session"]["id"])


async def run(server: Server, id: str, command: str, timeout: int = 90) -> Json:
    return dict(await server.call("POST", f"/api/sessions/{id}/exec", {"command": command, "timeout": timeout * 1000}, expect=200))


async def works(server: Server, id: str, command: str) -> str:
    done = await run(server, id, command)
    assert done["exitCode"] == 0, done
    return str(done["stdout"])


# It is of use


@needs("curl")
async def test_curl_and_python_call_an_api_with_a_secret_they_cannot_read(server: Server, site: Site) -> None:
    id = await begin(server, site)
    assert await works(server, id, f'curl -fsS -H "Authorization: Bearer $TOKEN" {site.https}/hello.txt') == "hello from outside\n"
    assert await works(server, id, f'curl -fsS -u "me:$TOKEN" {site.https}/hello.txt') == "hello from outside\n"
    script = (
        "import os, urllib.request as u; "
        f"print(u.urlopen(u.Request('{site.https}/hello.txt', headers={{'Authorization': 'token ' + os.environ['TOKEN']}})).read())"
    )
    assert "hello from outside" in await works(server, id, f'/usr/bin/python3 -c "{script}"')
    assert [line.partition(" ")[2] for line in Guarded.heard] == [f"Bearer {CANARY}", f"Basic {BASIC}", f"token {CANARY}"]


@needs("git")
@pytest.mark.parametrize("how", ["url", "helper", "template"])
async def test_git_clones_a_private_repository(server: Server, site: Site, how: str) -> None:
    id = await begin(server, site, **({"template": "Basic me:{value}"} if how == "template" else {}))
    url = site.https.replace("https://", "https://me:$TOKEN@" if how == "url" else "https://")
    helper = "-c credential.helper='!f() { echo username=me; echo password=$TOKEN; }; f'" if how == "helper" else ""
    await works(server, id, f'git {helper} clone -q "{url}/toy.git" copy')
    assert await works(server, id, "git -C copy log --format=%s") == "first\n"
    assert any(BASIC in line for line in Guarded.heard)


@pytest.mark.skipif(not os.path.isdir("/usr/lib/python3/dist-packages/pip"), reason="the system's Python has no pip")
async def test_pip_installs_from_a_private_index(server: Server, site: Site) -> None:
    id = await begin(server, site)
    index = site.https.replace("https://", "https://me:$TOKEN@") + "/simple"
    options = "-q --no-cache-dir --disable-pip-version-check --target lib"
    await works(server, id, f'/usr/bin/python3 -m pip install {options} --index-url "{index}" toy')
    assert await works(server, id, "PYTHONPATH=lib /usr/bin/python3 -c 'import toy; print(toy.VALUE)'") == "42\n"


@needs("npm")
async def test_npm_installs_from_a_private_registry(server: Server, site: Site) -> None:
    id = await begin(server, site, template="Bearer {value}")
    command = f"npm install --no-audit --no-fund --no-update-notifier --registry {site.https}/npms/ toy"
    await works(server, id, command)
    assert await works(server, id, "node -p 'require(\"toy\")'") == "42\n"


@needs("node")
async def test_node_trusts_the_sessions_authority(server: Server, site: Site) -> None:
    id = await begin(server, site, template="Bearer {value}")
    script = f"""
const http = require("http"), https = require("https"), target = "{site.https.removeprefix("https://")}";
http.request({{host: "127.0.0.1", port: 3128, method: "CONNECT", path: target}}).on("connect", (answer, socket) =>
  https.get({{host: "web.test", path: "/hello.txt", socket, agent: false, headers: {{Host: target}}}}, a => a.pipe(process.stdout))
).end();
"""
    await server.call("POST", f"/api/sessions/{id}/exec", {"command": "cat > /workspace/get.js", "stdin": script}, expect=200)
    assert await works(server, id, "node get.js") == "hello from outside\n"


async def test_it_still_works_after_the_session_slept(server: Server, site: Site) -> None:
    id = await begin(server, site)
    placeholder = await works(server, id, "echo $TOKEN")
    for verb in ("pause", "resume"):
        await server.call("POST", f"/api/sessions/{id}/{verb}", expect=200)
    assert await works(server, id, "echo $TOKEN") == placeholder
    assert await works(server, id, f'curl -fsS -H "Authorization: Bearer $TOKEN" {site.https}/hello.txt') == "hello from outside\n"


# It is nowhere


SEARCH = """
import base64, os, re, sys
half = os.environ["HALF"]
needle = (half + sys.argv[1]).encode()
forms = [needle, base64.b64encode(b"me:" + needle)[:-4], base64.b64encode(needle)[:-4], needle[::-1]]
own = {os.getpid(), os.getppid()}
found = []
def look(path):
    try:
        with open(path, "rb") as file:
            data = file.read(1 << 26)
    except OSError:
        return
    found.extend(path for form in forms if form in data)
for folder in ("/workspace", "/home", "/tmp", "/run", "/agent", "/etc", "/dev/shm", "/opt"):
    for current, _, names in os.walk(folder):
        for name in names:
            look(os.path.join(current, name))
for pid in filter(str.isdigit, os.listdir("/proc")):
    for name in ("environ", "cmdline", "maps", "mountinfo"):
        if int(pid) not in own:
            look(f"/proc/{pid}/{name}")
print("FOUND" if found else "CLEAN", found)
"""


@needs("curl")
async def test_the_secret_is_nowhere_inside_nor_in_anything_the_api_shows(
    server: Server, site: Site, data_dir: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("aiosqlite").setLevel(logging.INFO)  # as the server has it
    id = await begin(server, site)
    outputs: list[Any] = []
    for command in (
        f'curl -sSi -H "Authorization: Bearer $TOKEN" {site.https}/echo',
        f'curl -sSi -u "me:$TOKEN" {site.https}/echo',
        f'curl -sSv -H "Authorization: Bearer $TOKEN" {site.https}/hello.txt',
        f'curl -sSi -H "Authorization: Bearer $TOKEN" -H "Host: evil.test" {site.https}/echo',
        f'curl -sSi -H "Authorization: $TOKEN" {site.http}/echo',
        f"curl -sSi -H 'Authorization: my-own' {site.https}/echo",
        "env; cat /run/ash/ca.pem | tail -30; ls -la /run/ash; cat /proc/self/environ /proc/1/environ /proc/*/cmdline",
        f'curl -sS -o echoed -H "Authorization: Bearer $TOKEN" {site.https}/echo',
    ):
        outputs.append(await run(server, id, command))
    assert any(CANARY in line for line in Guarded.heard)  # it was really used
    assert not any(line.startswith("/echo") and "my-own" in line for line in Guarded.heard)

    # A turn of the agent, with its tool's result in the log.
    frames = await server.frames(id, f'Run the command `curl -s -H "Authorization: Bearer $TOKEN" {site.https}/echo`')
    assert "ash-placeholder" in json.dumps(outputs) or "****" in json.dumps(outputs)

    await server.call("POST", f"/api/sessions/{id}/exec", {"command": "cat > search.py", "stdin": SEARCH}, expect=200)
    half = len(CANARY) // 2
    searched = await works(server, id, f"HALF='{CANARY[:half]}' /usr/bin/python3 search.py '{CANARY[half:]}'")
    assert searched.startswith("CLEAN"), searched

    shown = [await server.call("GET", f"/api/sessions/{id}{path}") for path in ("", "/events", "/messages", "/logs")]
    shown += [await server.call("GET", "/api/credentials"), await server.call("GET", "/api/agents")]
    seen = json.dumps([outputs, shown, [str(frame) for frame in frames]]) + caplog.text
    for form in (CANARY, BASIC, base64.b64encode(CANARY.encode()).decode()[:-4]):
        assert form not in seen
    for path in (path for path in Path(data_dir).rglob("*") if path.is_file()):
        assert CANARY.encode() not in path.read_bytes(), path


async def test_the_search_would_find_it(server: Server, site: Site) -> None:
    id = await begin(server, site)
    await server.call("POST", f"/api/sessions/{id}/exec", {"command": "cat > search.py", "stdin": SEARCH}, expect=200)
    await works(server, id, f"printf %s '{CANARY}' > leaked")
    half = len(CANARY) // 2
    assert (await works(server, id, f"HALF='{CANARY[:half]}' /usr/bin/python3 search.py '{CANARY[half:]}'")).startswith("FOUND")


@needs("curl")
async def test_a_deleted_credential_no_longer_works_in_a_running_session(server: Server, site: Site) -> None:
    id = await begin(server, site)
    [made] = (await server.call("GET", "/api/credentials"))["credentials"]
    await server.call("DELETE", f"/api/credentials/{made['id']}", expect=200)
    answer = await works(server, id, f'curl -sS -H "Authorization: Bearer $TOKEN" {site.https}/hello.txt')
    assert "was deleted" in answer
    assert Guarded.heard == []


@needs("curl")
async def test_each_session_has_an_authority_of_its_own_that_it_cannot_change(server: Server, site: Site) -> None:
    id = await begin(server, site)
    other = (await server.call("POST", "/api/sessions", {"agent": "helper"}, expect=201))["session"]["id"]
    first, second = [(await works(server, session, "tail -12 /run/ash/ca.pem")) for session in (id, other)]
    assert first != second  # each session has its own
    tried = await works(
        server, other, "touch /run/ash/ca.pem && echo worked; rm -f /run/ash/ca.pem && echo worked; test -s /run/ash/ca.pem"
    )
    assert "worked" not in tried
