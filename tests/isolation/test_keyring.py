"""Leaving the session keyring: what a process started later can still find in it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from ash.isolation.keyring import KEYCTL
from tests.integration import battlefield
from tests.integration.attacks import commands

ATTACK = commands(keyctl=KEYCTL.get(platform.machine(), -1), key_name=battlefield.KEY_NAME)["find a key in the server's session keyring"]
SCRIPT = """
import subprocess, sys
sys.path.insert(0, sys.argv[1])
from ash.isolation.keyring import leave_session_keyring
from tests.integration.battlefield import plant_key
planted = plant_key()
before = subprocess.run(sys.argv[2], shell=True).returncode
problem = leave_session_keyring()
after = subprocess.run(sys.argv[2], shell=True).returncode
print(planted, before, after, problem)
"""


def test_a_key_of_the_session_is_found_by_children_until_the_keyring_is_left() -> None:
    command = [sys.executable, "-c", SCRIPT, battlefield.PROJECT, ATTACK]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    if found[:2] != ["True", "0"]:
        pytest.skip("this host has no kernel keyrings (keyctl)")
    assert found[2:] == ["1"]
