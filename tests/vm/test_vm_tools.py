"""What boots the test guest, without booting it: the cache, the lock it installs from, the command line, following and giving up."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.vm import image, run
from tools.vm.image import GuestFailed

LOCK = """\
attrs==26.1.0 \\
    --hash=sha256:aa
mypy==2.3 \\
    --hash=sha256:bb \\
    --hash=sha256:cc
yarl==1.2 ; python_version >= "3.11" \\
    --hash=sha256:dd
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ash-test-vm"


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_a_package_is_left_out_with_its_hashes() -> None:
    assert image.leave_out(LOCK, {"mypy"}) == LOCK.replace("mypy==2.3 \\\n    --hash=sha256:bb \\\n    --hash=sha256:cc\n", "")


def test_every_package_left_out_is_in_the_lock() -> None:
    locked = {line.partition("==")[0] for line in (image.ROOT / "requirements-dev.lock").read_text().splitlines() if line[0] != " "}
    assert locked >= image.LEFT_OUT


def test_what_was_made_is_made_once_and_replaces_what_is_older(cache: Path) -> None:
    made = [image._made("image", digest, lambda folder: (folder / "x").write_text("1")) for digest in ("old", "new", "new")]
    assert made[1] == made[2]
    assert [path.name for path in cache.iterdir() if path.is_dir()] == ["image-new"]


def test_what_fails_half_way_leaves_nothing_and_keeps_what_was_there(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise GuestFailed("no mirror")

    _ = image._made("image", "old", lambda folder: None)
    with pytest.raises(GuestFailed, match="no mirror"):
        image._made("image", "new", fail)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == ["image-old"]


def test_a_change_of_the_recipe_is_another_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in image.RECIPE:
        (tmp_path / name).write_bytes((image.HERE / name).read_bytes())
    monkeypatch.setattr(image, "HERE", tmp_path)
    before = image._recipe_digest()
    (tmp_path / image.RECIPE[0]).write_text("#")
    assert image._recipe_digest() != before


def test_only_root_builds(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(GuestFailed, match="sudo make test-vm"):
        image.open_image()


def test_the_guest_has_no_network_and_a_disk_that_is_thrown_away(tmp_path: Path) -> None:
    words = run.command(tmp_path, {"in": tmp_path / "in", "data": tmp_path / "data"}, tmp_path, "tcg")
    assert words[words.index("-nic") + 1] == "none"
    assert f"file={tmp_path}/root.ext4,format=raw,if=virtio,snapshot=on" in words
    assert not [word for word in words if "netdev" in word]


def test_the_guest_is_followed_line_by_line_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "progress").touch()
    write = f"f = open({str(tmp_path / 'progress')!r}, 'w'); f.write('one\\ntw'); f.flush(); f.write('o\\n')"
    with run._machine(script(write), tmp_path / "log") as machine, (tmp_path / "progress").open() as lines:
        assert list(run._follow(machine, lines, time.monotonic() + 30)) == ["one", "two"]


def test_a_guest_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    (tmp_path / "progress").write_text("booted\n")
    with (
        pytest.raises(GuestFailed, match="--timeout"),
        run._machine(script("import time; time.sleep(60)"), tmp_path / "log") as machine,
        (tmp_path / "progress").open() as lines,
    ):
        assert list(run._follow(machine, lines, time.monotonic())) == ["booted"]
    assert machine.poll() is not None


def test_a_guest_that_stays_silent_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "BOOT_TIMEOUT", 0.0)
    (tmp_path / "progress").touch()
    with run._machine(script("import time; time.sleep(60)"), tmp_path / "log") as machine, (tmp_path / "progress").open() as lines:
        assert list(run._follow(machine, lines, time.monotonic() + 30)) == []
    assert machine.poll() is not None


def test_the_shell_scripts_parse() -> None:
    scripts = [image.HERE / "build-image.sh", image.HERE / "guest-run", image.ROOT / "tests" / "guest" / "run.sh"]
    for path in scripts:
        assert subprocess.run(["sh", "-n", str(path)], check=False).returncode == 0, path
