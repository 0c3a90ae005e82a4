"""The control socket: private, one daemon per run_dir, deaf to garbage, and clear when nobody is there."""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from fabricpilot.control import ControlServer, ask
from fabricpilot.errors import FabricpilotError, UsageError


@contextmanager
def serving(server):
    stop = threading.Event()

    def loop():
        while not stop.is_set():
            if server.socket.poll(20):
                server.serve()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield server
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "agent.sock"


def test_question_and_answer(path):
    with ControlServer(path, lambda request: {"asked": request, "bytes": 2**60}) as server, serving(server):
        for _ in range(3):
            assert ask(path, "status") == {"asked": "status", "bytes": 2**60}


def test_only_the_owner_can_ask(path):
    with ControlServer(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


def test_nobody_there(path):
    with pytest.raises(FabricpilotError, match=r"no daemon answers at .*is it running") as caught:
        ask(path, "status")
    assert "\n" not in str(caught.value)


def test_a_daemon_that_hangs(path):
    with ControlServer(path), pytest.raises(FabricpilotError, match="did not answer within"):
        ask(path, "status", timeout_s=0.05)


def test_errors_of_the_daemon_are_told(path, caplog):
    def answer(request):
        if request == "known":
            raise FabricpilotError("no such flow")
        raise KeyError("a bug")

    with ControlServer(path, answer) as server, serving(server):
        with pytest.raises(FabricpilotError, match="no such flow"):
            ask(path, "known")
        with pytest.raises(FabricpilotError, match="its log says why"):
            ask(path, "unknown")
    assert "a bug" in caplog.text


def test_asked_before_the_daemon_can_answer(path):
    with ControlServer(path) as server, serving(server), pytest.raises(FabricpilotError, match="still starting"):
        ask(path, "status")


def test_two_daemons_on_one_run_dir(path):
    with ControlServer(path, lambda request: {"first": True}) as server, serving(server):
        with pytest.raises(UsageError, match="runs already"):
            ControlServer(path)
        assert ask(path, "status") == {"first": True}
    ControlServer(path).close()


def test_the_socket_of_a_killed_daemon_is_taken_over(path):
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time, pathlib; from fabricpilot.control import ControlServer\n"
            "server = ControlServer(pathlib.Path(sys.argv[1])); print('up', flush=True); time.sleep(60)",
            str(path),
        ],
        stdout=subprocess.PIPE,
    )
    assert child.stdout.readline() == b"up\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert path.is_socket()
    with pytest.raises(FabricpilotError, match="no daemon answers"):
        ask(path, "status")
    with ControlServer(path, lambda request: {"second": True}) as server, serving(server):
        assert ask(path, "status") == {"second": True}


def test_garbage_is_passed_over(path):
    with ControlServer(path, lambda request: {"asked": request}) as server, serving(server):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(path))
            raw.sendall(os.urandom(4096))
        with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
            peer.linger = 0
            peer.connect(f"ipc://{path}")
            peer.send_multipart([b"", b"status", b"more"])
            peer.send(b"\xff\xfe")
            assert peer.poll(2000)
            assert b"asked" in peer.recv()
            peer.send(b"x" * 100_000)  # beyond maxmsgsize: this peer loses its connection
            time.sleep(0.05)
        assert ask(path, "status") == {"asked": "status"}
    assert server.malformed >= 1  # random bytes may happen to be frames of ZMTP 1.0


def test_too_long_a_path(tmp_path):
    with pytest.raises(UsageError, match="too long"):
        ControlServer(tmp_path / ("x" * 120))


def test_no_folder_can_be_made():
    with pytest.raises(FabricpilotError, match="cannot make control socket"):
        ControlServer(Path("/proc/no/such/agent.sock"))
