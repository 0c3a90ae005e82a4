"""The daemons' word to systemd, on a real notify socket."""

import socket
import uuid

import pytest

from fabricpilot import notify


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path, monkeypatch):
    """The service manager's end of the notify socket, bound to a path and to an abstract name."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@fptest-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name.replace("@", "\0", 1))
        sock.settimeout(1)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield sock


def test_messages_arrive_one_by_one(manager):
    notify.ready()
    notify.watchdog()
    notify.stopping()
    assert [manager.recv(4096) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"STOPPING=1"]


@pytest.mark.parametrize("name", [None, "", "relative", "/nobody/listens/here"])
def test_nobody_to_tell_is_no_error(monkeypatch, name):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if name is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", name)
    notify.ready()
    notify.watchdog()
    notify.stopping()


def test_a_manager_that_does_not_read_never_blocks_us(manager):
    for _ in range(2000):
        notify.watchdog()
