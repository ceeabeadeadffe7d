"""Two network namespaces as machines: what `scripts/two_machines.py` joins, without the training that it does there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "two_machines.py"
LISTEN = """
import socket
with socket.create_server(("10.77.0.1", 29500)) as server:
    print("ready", flush=True)
    print(server.accept()[0].recv(9).decode())
"""
SEND = """
import socket
socket.create_connection(("10.77.0.1", 29500)).sendall(b"hello")
"""
INSIDE = f"""
import subprocess, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import two_machines
two_machines.join()
python = ["ip", "netns", "exec"]
words = [*python, "first", sys.executable, "-S", "-c", {LISTEN!r}]
with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as listener:
    assert listener.stdout.readline() == "ready\\n"
    # this process has no cable
    assert subprocess.run([sys.executable, "-S", "-c", {SEND!r}], stderr=subprocess.DEVNULL).returncode
    before = two_machines.bytes_sent("second")
    two_machines.call(*python, "second", sys.executable, "-S", "-c", {SEND!r})
    print(listener.stdout.read().strip(), two_machines.bytes_sent("second") > before)
"""


def test_two_machines_reach_each_other_by_their_cable_alone() -> None:
    spec = importlib.util.spec_from_file_location("two_machines", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    if reason := script.missing():
        pytest.skip(f"NO NAMESPACES, SO TWO MACHINES ARE NOT TRIED: {reason}")
    done = subprocess.run([*script.UNSHARE, sys.executable, "-S", "-c", INSIDE], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "hello True"), done.stderr
    # nothing is left of them
    assert subprocess.run(["ip", "link", "show", script.CABLE], capture_output=True).returncode
