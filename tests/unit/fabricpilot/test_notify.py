"""The daemons' word to systemd, on a real notify socket."""

import os
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
    notify.ready("scheduling eth0")
    notify.watchdog()
    notify.status("4,711 flows\non eth0")
    notify.stopping()
    heard = [manager.recv(4096).decode() for _ in range(4)]
    assert heard == ["READY=1\nSTATUS=scheduling eth0", "WATCHDOG=1", "STATUS=4,711 flows on eth0", "STOPPING=1"]


@pytest.mark.parametrize("name", [None, "", "relative", "/nobody/listens/here"])
def test_nobody_to_tell_is_no_error(monkeypatch, name):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if name is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", name)
    notify.ready()
    notify.watchdog()
    notify.stopping()


@pytest.mark.parametrize(
    ("limit", "process", "interval"),
    [
        ("10000000", None, 5.0),
        ("10000000", "self", 5.0),
        ("10000000", "1", None),
        ("0", None, None),
        ("soon", None, None),
    ],
)
def test_the_watchdog_interval_is_half_the_limit(manager, monkeypatch, limit, process, interval):
    monkeypatch.setenv("WATCHDOG_USEC", limit)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    if process is not None:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if process == "self" else process)
    assert notify.watchdog_interval_s() == interval


def test_without_a_manager_there_is_no_watchdog(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", "10000000")
    assert notify.watchdog_interval_s() is None


def test_a_manager_that_does_not_read_never_blocks_us(manager):
    for _ in range(2000):
        notify.watchdog()
