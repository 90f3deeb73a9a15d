"""The quickstart, line for line, against the built file: shell, Python and curl, without a key and with one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.servers import Server, as_user, ash, environment, running

AGENT = """You are a helpful coding assistant.
Answer questions about JavaScript and TypeScript.
Keep answers concise. Include working code examples.
"""
PYTHON_SNIPPET = """
from ash_ai import AshClient

client = AshClient(server_url="http://localhost:4100")

# Create a session
session = client.create_session("my-agent")

# Send a message and stream the response
for event in client.send_message_stream(session.id, "What is a closure?"):
    if event.type == "message":
        print(event.data, end="")

# Clean up
client.end_session(session.id)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "my-agent").mkdir()
    (folder / "my-agent" / "CLAUDE.md").write_text(AGENT)
    return folder


@pytest.fixture(scope="module")
def server(ash_pyz: Path, home: Path) -> Iterator[Server]:
    with running(ash_pyz, home / "data") as started:
        yield started


@pytest.fixture(scope="module")
def env(server: Server, home: Path) -> dict[str, str]:
    return environment(ASH_SERVER_URL=server.url, ASH_HOME=str(home / "client"))


@pytest.fixture(scope="module")
def deployed(ash_pyz: Path, env: dict[str, str], home: Path) -> str:
    done = ash(ash_pyz, "deploy", "./my-agent", "--name", "my-agent", env=env, cwd=home)
    assert done.returncode == 0, done.stderr
    return "my-agent"


def curl(*arguments: str, prefix: list[str] | None = None) -> str:
    command = [*(prefix or []), "curl", "-sN", "--max-time", "20", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


def test_chat_prints_the_answer_alone(ash_pyz: Path, env: dict[str, str], home: Path, deployed: str) -> None:
    done = ash(ash_pyz, "chat", deployed, "What is a closure in JavaScript?", env=env, cwd=home)
    assert done.returncode == 0, done.stderr
    assert "closure" in done.stdout.lower()
    assert done.stdout.count("retains access") <= 1, "the answer stands there twice"


def test_keep_prints_the_session_id_on_stderr_and_send_continues_it(ash_pyz: Path, env: dict[str, str], home: Path, deployed: str) -> None:
    first = ash(ash_pyz, "chat", "--keep", deployed, "My name is Ada.", env=env, cwd=home)
    session = next(word for word in first.stderr.split() if word.count("-") == 4)
    assert session not in first.stdout
    again = ash(ash_pyz, "session", "send", session, "What is my name?", env=env, cwd=home)
    assert "Ada" in again.stdout, again.stderr
    assert ash(ash_pyz, "session", "end", session, env=env, cwd=home).returncode == 0


def test_detailed_flow(ash_pyz: Path, env: dict[str, str], home: Path, deployed: str) -> None:
    created = ash(ash_pyz, "session", "create", deployed, env=env, cwd=home)
    session = json.loads(created.stdout)
    assert session["status"] == "active"
    assert session["agentName"] == "my-agent"
    for question in ("What is a closure in JavaScript?", "Now explain it with an example"):
        sent = ash(ash_pyz, "session", "send", session["id"], question, env=env, cwd=home)
        assert sent.returncode == 0, sent.stderr
        assert sent.stdout.strip()
    ended = ash(ash_pyz, "session", "end", session["id"], env=env, cwd=home)
    assert json.loads(ended.stdout)["status"] == "ended"


def test_python_snippet_prints_the_text(ash_pyz: Path, server: Server, home: Path, deployed: str) -> None:
    snippet = PYTHON_SNIPPET.replace("http://localhost:4100", server.url.replace("127.0.0.1", "localhost"))
    run = [sys.executable, "-c", snippet]
    done = subprocess.run(run, env=environment(PYTHONPATH=str(ash_pyz)), cwd=home, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "closure" in done.stdout.lower()
    assert "{'type'" not in done.stdout, "the object was printed instead of its text"


def test_curl_snippets(server: Server, deployed: str) -> None:
    base = server.url.replace("127.0.0.1", "localhost")
    json_type = ("-H", "Content-Type: application/json")
    created = curl("-X", "POST", f"{base}/api/sessions", *json_type, "-d", '{"agent":"my-agent"}')
    session = json.loads(created)["session"]["id"]
    uuid.UUID(session)
    stream = curl("-X", "POST", f"{base}/api/sessions/{session}/messages", *json_type, "-d", '{"content":"What is a closure?"}')
    assert stream.count("event: done") == 1
    assert stream.count("event: ") == stream.count("\nid: ") + stream.startswith("id: "), "a frame without a cursor"
    ended = curl("-X", "DELETE", f"{base}/api/sessions/{session}")
    assert json.loads(ended)["session"]["status"] == "ended"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another local user")
def test_another_local_user_needs_a_key(server: Server) -> None:
    stranger = as_user(61234)
    assert curl("-o", "/dev/null", "-w", "%{http_code}", f"{server.url}/api/agents", prefix=stranger) == "401"
    header = ("-H", f"Authorization: Bearer {server.key()}")
    assert curl("-o", "/dev/null", "-w", "%{http_code}", *header, f"{server.url}/api/agents", prefix=stranger) == "200"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become an ordinary user")
def test_quickstart_as_an_ordinary_user(ash_pyz: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = Path("/tmp") / f"ash-user-{uuid.uuid4().hex[:8]}"
    user = as_user(61235)
    folder.mkdir()
    try:
        shutil.copy(ash_pyz, folder / "ash.pyz")
        shutil.copytree(Path(__file__).parents[2] / "examples" / "quickstart", folder / "my-agent")
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 61235, 61235)
        env = environment(HOME=str(folder), ASH_CACHE_DIR=str(folder / "cache"))
        with running(folder / "ash.pyz", folder / "data", env=env, prefix=user) as server:
            here = {**env, "ASH_SERVER_URL": server.url}
            command = [*user, "/usr/bin/python3", "ash.pyz", "chat", "./my-agent", "Run the command `id -u` please"]
            done = subprocess.run(command, env=here, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, done.stderr
            assert "61235" in done.stdout or "1000" in done.stdout
    finally:
        shutil.rmtree(folder)


def test_one_command_is_enough_without_a_server(ash_pyz: Path, home: Path) -> None:
    env = environment(ASH_HOME=str(home / "nobody"))
    done = ash(ash_pyz, "chat", "./my-agent", "Run the command `echo $((6*7))`", env=env, cwd=home)
    assert done.returncode == 0, done.stderr
    assert "42" in done.stdout


def test_a_piped_message_works(ash_pyz: Path, env: dict[str, str], home: Path, deployed: str) -> None:
    done = ash(ash_pyz, "chat", deployed, env=env, cwd=home, stdin="What is a closure in JavaScript?\n")
    assert "closure" in done.stdout.lower(), done.stderr


def test_the_example_with_settings_may_do_what_they_allow_and_nothing_they_deny(ash_pyz: Path, env: dict[str, str], home: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "tools-and-settings"
    denied = ash(ash_pyz, "chat", str(example), "Run the command `rm -f facts.txt`", env=env, cwd=home)
    assert "denied by the rule 'Bash(rm:*)'" in denied.stdout, denied.stderr
    done = ash(ash_pyz, "chat", str(example), "Read facts.txt and then write Mended the lamp to CHANGES.md", env=env, cwd=home)
    assert "Lighthouse" in done.stdout, done.stderr
    assert "I wrote /workspace/CHANGES.md" in done.stdout


def test_fifty_megabytes_can_be_deployed(ash_pyz: Path, env: dict[str, str], home: Path) -> None:
    folder = home / "large"
    folder.mkdir()
    (folder / "CLAUDE.md").write_text("You are large.\n")
    for number in range(50):
        (folder / f"{number}.bin").write_bytes(os.urandom(1_000_000))
    done = ash(ash_pyz, "deploy", "./large", env=env, cwd=home)
    assert done.returncode == 0, done.stderr
    told = ash(ash_pyz, "chat", "large", "Run the command `ls | wc -l`", env=env, cwd=home)
    assert "51" in told.stdout, told.stderr
