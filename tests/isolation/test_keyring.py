"""Leaving the session keyring: what a process started later can still find in it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.integration import battlefield

PROBE = battlefield.ATTACKS["find a key in the server's session keyring"]
ATTACK = PROBE.fill({"python": sys.executable, "key_name": battlefield.KEY_NAME})
SCRIPT = """
import subprocess, sys
sys.path.insert(0, sys.argv[1])
from ash.isolation.keyring import leave_session_keyring
from tests.integration.battlefield import plant_key
planted = plant_key()
before = subprocess.run(sys.argv[2], shell=True, stdout=subprocess.DEVNULL).returncode
problem = leave_session_keyring()
after = subprocess.run(sys.argv[2], shell=True, stdout=subprocess.DEVNULL).returncode
print(planted, before, after, problem)
"""


def test_a_key_of_the_session_is_found_by_children_until_the_keyring_is_left() -> None:
    command = [sys.executable, "-c", SCRIPT, battlefield.PROJECT, ATTACK]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    if found[:2] != ["True", "0"]:
        pytest.skip("this host has no kernel keyrings (keyctl)")
    assert found[2:] == ["1"]
