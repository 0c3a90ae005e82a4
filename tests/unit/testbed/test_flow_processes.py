"""Sender and receiver as processes over loopback: every byte counts, and what goes wrong is a lost flow."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from testbed.flows.protocol import HEADER, PORT, REPLY
from testbed.flows.recorded import RecordedTrace

SIZES = [12, 13, 1_000, 100_000, 5_000_000]


@pytest.fixture
def loopback() -> str:
    """A loopback address of this test alone, so that tests running side by side do not meet."""
    return f"127.77.{time.monotonic_ns() // 1000 % 250 + 1}.{time.monotonic_ns() % 250 + 1}"


@pytest.fixture
def receiver(loopback: str) -> Iterator[None]:
    command = [sys.executable, "-m", "testbed.flows.receiver", loopback]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    yield
    process.communicate(timeout=5)
    assert process.returncode == 0


def send(tmp_path: Path, address: str, sizes: list[int]) -> dict[int, list[str]]:
    """Run a sender over a trace of these sizes, 5 ms apart; {flow: what it said}."""
    n = len(sizes)
    trace = RecordedTrace(np.arange(n) * 5_000_000, np.array(sizes, np.int64), np.zeros(n, np.int64))
    trace.save(tmp_path / "trace.csv")
    command = [sys.executable, "-m", "testbed.flows.sender", str(tmp_path / "trace.csv"), "0", address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.stdin.write(f"{time.monotonic_ns() + 20_000_000}\n")
        process.stdin.flush()
        said = {}
        while (line := process.stdout.readline()) not in ("end\n", ""):
            flow, *rest = line.split()
            said[int(flow)] = rest
        process.stdin.close()
        assert process.wait(5) == 0
    return said


@pytest.mark.usefixtures("receiver")
def test_every_flow_completes_and_large_ones_take_longer(tmp_path: Path, loopback: str) -> None:
    said = send(tmp_path, loopback, SIZES)
    assert sorted(said) == list(range(len(SIZES)))
    fct_ns = [int(said[flow][1]) for flow in sorted(said)]
    assert all(0 < fct < 5e9 for fct in fct_ns)
    assert all(int(late) < int(fct) for late, fct in said.values())  # FCT counts from the scheduled start


def test_nobody_listening_is_a_lost_flow(tmp_path: Path, loopback: str) -> None:
    said = send(tmp_path, loopback, [1000])
    assert said[0][1:] == ["lost", "Connection", "refused"]


def test_a_receiver_that_misses_bytes_makes_a_lost_flow(tmp_path: Path, loopback: str) -> None:
    def answer_one_byte_less() -> None:
        connection, _ = listener.accept()
        with connection:
            flow, size = HEADER.unpack(connection.recv(HEADER.size, socket.MSG_WAITALL))
            connection.recv(size - HEADER.size, socket.MSG_WAITALL)
            connection.sendall(REPLY.pack(flow, size - 1))

    with socket.create_server((loopback, PORT)) as listener:
        thread = threading.Thread(target=answer_one_byte_less)
        thread.start()
        said = send(tmp_path, loopback, [1000])
        thread.join(5)
    assert said[0][1:4] == ["lost", "wrong", "answer"]
