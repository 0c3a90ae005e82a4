"""What applications say of their messages, and what is done at their sockets: processes in cgroups of their own."""

import contextlib
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from datapath_kit import in_netns, run
from datapath_wire import ADDRESSES, PORT, SETTINGS, Host, Seen, captured, first_time, message_at

from fabricpilot.errors import UsageError
from hostagent.datapath.base import SocketRule
from hostagent.datapath.cgroup_links import cgroup_mount

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
HINTED = replace(SETTINGS, use_backlog=True, use_hints=True)
WITHOUT = "hint not wanted here"


@pytest.fixture
def cgroup() -> Iterator[str]:
    """A cgroup of our own, named as in the configuration."""
    name = f"/fptest-{uuid.uuid4().hex[:8]}"
    directory = cgroup_mount() / name[1:]
    directory.mkdir()
    yield name
    directory.rmdir()


@contextlib.contextmanager
def sink(host: Host) -> Iterator[list[int]]:
    """A receiver that reads all of one connection; what it got in all."""
    with in_netns(host.receiver):
        listener = socket.create_server((ADDRESSES[4][1], PORT))
    received: list[int] = []

    def read() -> None:
        connection, _ = listener.accept()
        with connection:
            while data := connection.recv(1 << 18):
                received.append(len(data))

    thread = threading.Thread(target=read)
    thread.start()
    yield received
    thread.join(20)
    listener.close()


def client(host: Host, cgroup: str, *command: str) -> str:
    """Standard output of a command in that cgroup, at the scheduled host."""
    enter = f'echo $$ > {cgroup_mount()}{cgroup}/cgroup.procs && exec "$@"'
    return run("sh", "-c", enter, "sh", *command, netns=host.sender)


def example(host: Host, cgroup: str, *sizes: int) -> str:
    return client(
        host, cgroup, sys.executable, str(EXAMPLES / "message_hint.py"), ADDRESSES[4][1], str(PORT), *map(str, sizes)
    )


def levels_by_message(packets: list[Seen], sizes: list[int]) -> list[set[int]]:
    """Levels of the packets that lie wholly in each message."""
    levels = [set() for _ in sizes]
    for place, seen in first_time(packets):
        number, position = message_at(place, sizes)
        if position + seen.payload_bytes <= sizes[number]:
            levels[number].add(SETTINGS.dscp.index(seen.dscp))
    return levels


def test_a_hinted_message_is_on_the_level_of_its_size_from_its_first_byte_on(host, cgroup):
    host.datapath.apply(HINTED)
    host.datapath.serve_sockets(SocketRule(hint_cgroups=(cgroup,)))
    sizes = [3_000_000, 20_000, 700_000, 400_000, 30_000]  # back to back: only the hints tell them apart
    with captured(host.receiver) as capture, sink(host) as received:
        said = example(host, cgroup, *sizes)
    assert sum(received) == sum(sizes)
    assert said.count("hint taken") == len(sizes)
    for size, levels in zip(sizes, levels_by_message(capture.packets, sizes), strict=True):
        if levels or size > 65_536:  # TCP may put a small message and the end of the one before into one packet
            assert levels == {SETTINGS.thresholds.level_of(size - 1)}, size
    assert host.datapath.counters()["messages_finished"] >= len(sizes) - 2


def test_a_hint_that_was_overrun_counts_no_longer(host, cgroup):
    host.datapath.apply(HINTED)
    host.datapath.serve_sockets(SocketRule(hint_cgroups=(cgroup,)))
    lie = (
        "import sys; sys.path.insert(0, sys.argv[1]); import socket, message_hint as m\n"
        "c = socket.create_connection((sys.argv[2], int(sys.argv[3])))\n"
        "assert m.hint_message(c, 1000)\n"
        "c.sendall(bytes(3_000_000))\n"
    )
    with captured(host.receiver) as capture, sink(host):
        client(host, cgroup, sys.executable, "-c", lie, str(EXAMPLES), ADDRESSES[4][1], str(PORT))
    levels = [SETTINGS.dscp.index(seen.dscp) for _, seen in first_time(capture.packets)]
    assert levels == sorted(levels)
    assert levels[-1] == 3


def test_before_the_connection_is_made_a_hint_is_for_its_first_message(host, cgroup):
    host.datapath.apply(HINTED)
    host.datapath.serve_sockets(SocketRule(hint_cgroups=(cgroup,)))
    early = (
        "import sys; sys.path.insert(0, sys.argv[1]); import socket, message_hint as m\n"
        "c = socket.socket()\n"
        "assert m.hint_message(c, 3_000_000)\n"
        "c.connect((sys.argv[2], int(sys.argv[3])))\n"
        "c.sendall(bytes(100_000))\n"
    )
    with captured(host.receiver) as capture, sink(host):
        client(host, cgroup, sys.executable, "-c", early, str(EXAMPLES), ADDRESSES[4][1], str(PORT))
    assert {seen.dscp for _, seen in first_time(capture.packets)} == {SETTINGS.dscp[3]}


def test_hints_of_other_cgroups_do_not_count_and_are_no_error(host, cgroup):
    host.datapath.apply(HINTED)
    inner = cgroup_mount() / cgroup[1:] / "trusted"
    inner.mkdir()
    try:
        host.datapath.serve_sockets(SocketRule(hint_cgroups=(f"{cgroup}/trusted",)))
        with sink(host):
            assert example(host, cgroup, 1000).count(WITHOUT) == 1
        with sink(host):
            assert example(host, f"{cgroup}/trusted", 1000).count("hint taken") == 1
        host.datapath.serve_sockets(SocketRule())
        with sink(host):
            assert example(host, f"{cgroup}/trusted", 1000).count(WITHOUT) == 1
    finally:
        inner.rmdir()


def test_detach_takes_the_programs_off_the_cgroups(host, cgroup):
    host.datapath.serve_sockets(SocketRule((cgroup,), 1_000_000, (PORT,), (cgroup,)))
    attached = run("bpftool", "cgroup", "show", f"{cgroup_mount()}{cgroup}")
    assert "fabricpilot_hin" in attached
    assert "fabricpilot_sen" in attached
    host.datapath.detach()
    assert "fabricpilot" not in run("bpftool", "cgroup", "show", f"{cgroup_mount()}{cgroup}")


def test_other_options_reach_the_kernel_as_they_came(host, cgroup):
    """Ours sees every setsockopt of its cgroups: long ones too, and wrong ones of our own level."""
    host.datapath.serve_sockets(SocketRule(hint_cgroups=(cgroup,)))
    code = (
        "import socket, struct, errno\n"
        "s = socket.socket(); s.setsockopt(6, 1, 1); assert s.getsockopt(6, 1) == 1\n"
        "s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 50_000); assert s.getsockopt(1, 8) == 100_000\n"
        "def refused(*a):\n"
        "    try: s.setsockopt(*a)\n"
        "    except OSError as e: return e.errno\n"
        "assert refused(6, 13, b'no-such-algorithm') == errno.ENOENT\n"
        "assert refused(0x4650, 1, b'short') == errno.ENOPROTOOPT\n"
        "assert refused(0x4650, 2, bytes(8)) == errno.ENOPROTOOPT\n"
        "s.setsockopt(6, 13, b'reno' + bytes(9000))\n"
        "assert s.getsockopt(6, 13, 4) == b'reno'\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "assert refused(0x4650, 1, bytes(8)) in (errno.ENOPROTOOPT, errno.EOPNOTSUPP)\n"
    )
    client(host, cgroup, sys.executable, "-c", code)


def test_send_buffer_of_chosen_ports(host, cgroup):
    host.datapath.apply(SETTINGS)
    host.datapath.serve_sockets(SocketRule((), 1_500_000, (PORT, 9), (cgroup,)))
    ask = (
        "import socket, sys\n"
        "c = socket.create_connection((sys.argv[1], int(sys.argv[2])))\n"
        "print(c.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF))\n"
    )
    with sink(host):
        chosen = int(client(host, cgroup, sys.executable, "-c", ask, ADDRESSES[4][1], str(PORT)))
    host.datapath.serve_sockets(SocketRule((), 1_500_000, (9,), (cgroup,)))
    with sink(host):
        other = int(client(host, cgroup, sys.executable, "-c", ask, ADDRESSES[4][1], str(PORT)))
    most = int(Path("/proc/sys/net/core/wmem_max").read_text())
    assert chosen == 2 * min(1_500_000, most)  # the kernel doubles it, for its own overhead
    assert other < chosen


def test_a_larger_send_buffer_shows_a_message_at_once(host, cgroup):
    host.datapath.apply(replace(SETTINGS, use_backlog=True))
    host.datapath.serve_sockets(SocketRule((), 4_000_000, (), (cgroup,)))
    with in_netns(host.sender):
        run("tc", "qdisc", "add", "dev", "nic0", "root", "tbf", "rate", "100mbit", "burst", "10k", "latency", "200ms")
    with captured(host.receiver) as capture, sink(host):
        example(host, cgroup, 2_500_000)
    levels = [SETTINGS.dscp.index(seen.dscp) for _, seen in first_time(capture.packets)]
    early = next(number for number, level in enumerate(levels) if level == 3)
    assert first_time(capture.packets)[early][0] < 1_000_000  # not 2,000,000


def test_unknown_cgroup_is_named(host):
    with pytest.raises(UsageError, match="no-such"):
        host.datapath.serve_sockets(SocketRule(hint_cgroups=("/no-such",)))


def test_the_client_in_c(host, cgroup, tmp_path):
    subprocess.run(
        ["cc", "-Wall", "-Wextra", "-Werror", "-o", str(tmp_path / "hint"), str(EXAMPLES / "message_hint.c")],
        check=True,
    )
    host.datapath.apply(HINTED)
    host.datapath.serve_sockets(SocketRule(hint_cgroups=(cgroup,)))
    sizes = [30_000, 600_000]
    with captured(host.receiver) as capture, sink(host):
        said = client(host, cgroup, str(tmp_path / "hint"), ADDRESSES[4][1], str(PORT), *map(str, sizes))
    assert said.count("taken") == 2
    assert levels_by_message(capture.packets, sizes) == [{0}, {2}]
