"""A scheduled host and its peer over a veth pair: real sockets on one side, what arrives captured on the other.

The fixtures `pin_dir`, `wire` and `host` are lent to all tests on the kernel by tests/kernel/conftest.py.
"""

import bisect
import contextlib
import itertools
import os
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from datapath_kit import bpf_file_system, in_netns, run

from fabricpilot.levels import Thresholds
from hostagent.datapath.base import MessageRule, Settings
from hostagent.datapath.ebpf import EbpfDatapath

THRESHOLDS = (50_000, 500_000, 2_000_000)
ONE_MESSAGE = MessageRule(gap_ns=3600 * 10**9, starved_ns=0)  # a flow, whatever pauses its sender makes
SETTINGS = Settings(Thresholds(THRESHOLDS), (32, 24, 16, 8), (1, 2, 3, 4), messages=ONE_MESSAGE)
SIZE_BYTES = 5_000_000
PORT = 5001
SOURCE_PORT_AT, DESTINATION_PORT_AT = 34, 36  # in an Ethernet frame, behind an IPv4 header without options
ADDRESSES = {4: ("10.77.0.1", "10.77.0.2"), 6: ("fd77::1", "fd77::2")}


@dataclass
class Host:
    sender: str  # namespaces
    receiver: str
    datapath: EbpfDatapath


@pytest.fixture
def pin_dir(tmp_path):
    with bpf_file_system(tmp_path / "bpf") as root:
        yield root / "fabricpilot"


@pytest.fixture
def wire(make_netns) -> tuple[str, str]:
    """Two namespaces joined by a veth pair, both named nic0, with both IP versions."""
    names = make_netns("send"), make_netns("recv")
    run("ip", "link", "add", "nic0", "type", "veth", "peer", "name", "nic0", "netns", names[1], netns=names[0])
    for side, name in enumerate(names):
        run("ip", "link", "set", "lo", "up", netns=name)
        run("ip", "address", "add", f"{ADDRESSES[4][side]}/24", "dev", "nic0", netns=name)
        run("ip", "-6", "address", "add", f"{ADDRESSES[6][side]}/64", "dev", "nic0", "nodad", netns=name)
        run("ip", "link", "set", "nic0", "up", netns=name)
    return names


@pytest.fixture
def host(wire, pin_dir) -> Iterator[Host]:
    with in_netns(wire[0]):
        datapath = EbpfDatapath(pin_dir, 4096)
        datapath.apply(SETTINGS)
        datapath.attach("nic0")
        yield Host(*wire, datapath)
        datapath.detach()
        datapath.close()


@dataclass
class Seen:
    """A TCP or UDP packet at the receiver."""

    dscp: int
    ecn: int
    sequence: int
    flags: int
    payload_bytes: int


@dataclass
class Capture:
    packets: list[Seen] = field(default_factory=list)
    frames: list[bytes] = field(default_factory=list)


@contextlib.contextmanager
def captured(netns: str, interface: str = "nic0") -> Iterator[Capture]:
    """Headers of everything that arrives at an interface of a namespace from its peer."""
    with in_netns(netns):
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        tap.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        tap.bind((interface, 0))
    tap.settimeout(0.1)
    capture, stop = Capture(), threading.Event()

    def listen() -> None:
        while True:
            try:
                frame, (_, _, kind, *_) = tap.recvfrom(256)
            except TimeoutError:
                if stop.is_set():
                    return
                continue
            if kind != socket.PACKET_OUTGOING:
                capture.frames.append(frame)
                if (seen := parsed(frame)) is not None:
                    capture.packets.append(seen)

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield capture
        time.sleep(0.2)
    finally:
        stop.set()
        thread.join()
        dropped = struct.unpack("II", tap.getsockopt(263, 6, 8))[1]  # SOL_PACKET, PACKET_STATISTICS
        tap.close()
        assert dropped == 0, "the capture lost packets: the test can say nothing"


def parsed(frame: bytes) -> Seen | None:
    kind = frame[12:14]
    if len(frame) < 66:  # cut short, or without TCP options: none of a socket's
        return None
    if kind == b"\x08\x00":
        traffic_class, protocol = frame[15], frame[23]
        offset = 14 + (frame[14] & 15) * 4
        end = 14 + struct.unpack_from("!H", frame, 16)[0]
    elif kind == b"\x86\xdd":
        traffic_class, protocol = struct.unpack_from("!H", frame, 14)[0] >> 4 & 0xFF, frame[20]
        offset = 54
        end = 54 + struct.unpack_from("!H", frame, 18)[0]
    else:
        return None
    if protocol != 6 or len(frame) < offset + 20:
        return None
    sequence, flags = struct.unpack_from("!I", frame, offset + 4)[0], frame[offset + 13]
    return Seen(traffic_class >> 2, traffic_class & 3, sequence, flags, end - offset - (frame[offset + 12] >> 4) * 4)


@contextlib.contextmanager
def on_one_cpu() -> Iterator[None]:
    """What this thread sends inside the block arrives in order: one CPU hands it from end to end of a veth pair."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def wait_for_gap(connection: socket.socket, least_s: float = 0.05) -> None:
    """Wait until what the connection sends next is a message of its own: all acknowledged, and silent by its own clock.

    The kernel asks for twice the smoothed round-trip time, which a slow handshake on a busy machine makes long.
    """
    deadline = time.monotonic() + 20
    while True:
        told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        unacknowledged, srtt_us = (struct.unpack_from("=I", told, offset)[0] for offset in (24, 68))
        if not unacknowledged:
            break
        assert time.monotonic() < deadline, "not acknowledged"
        time.sleep(0.002)
    time.sleep(max(least_s, 3e-6 * srtt_us))


def dscp_at(place: int, thresholds: Thresholds = SETTINGS.thresholds) -> int:
    """The DSCP of a packet whose payload begins at `place` of a message."""
    return SETTINGS.dscp[thresholds.level_of(place)]


def in_place(packets: list[Seen]) -> list[tuple[int, Seen]]:
    """Packets with payload, each with the count of bytes in front of it in its connection.

    The count is of sequence numbers, not of what was captured: packets may overtake each other on their way.
    """
    starts = [(seen.sequence + 1) % 2**32 for seen in packets if seen.flags & 2]
    starts += [seen.sequence for seen in packets if seen.payload_bytes]  # where the handshake was not captured
    return [((seen.sequence - starts[0]) % 2**32, seen) for seen in packets if seen.payload_bytes]


def sent_again(packets: list[Seen]) -> int:
    """Payload bytes that one connection, all of which was captured, has sent more than once."""
    placed = in_place(packets)
    return sum(seen.payload_bytes for _, seen in placed) - max(place + seen.payload_bytes for place, seen in placed)


def first_time(packets: list[Seen]) -> list[tuple[int, Seen]]:
    """Those of `in_place` that carry payload for the first time."""
    kept, highest = [], 0
    for place, seen in in_place(packets):
        if place >= highest:
            kept.append((place, seen))
            highest = place + seen.payload_bytes
    return kept


def message_at(place: int, sizes: Sequence[int]) -> tuple[int, int]:
    """The number of the message that has the byte at `place` of a connection, and that byte's place in the message."""
    ends = list(itertools.accumulate(sizes))
    number = bisect.bisect_right(ends, place)
    return number, place - ends[number] + sizes[number]


def sunk_datagrams(frames: list[bytes], port_at: int) -> dict[int, int]:
    """Payload bytes of the UDP flows over IPv4 among some frames, by the port at that place of a frame.

    Asserts that each datagram was on the level of the bytes before it, and that each flow met all levels.
    """
    sent: dict[int, int] = defaultdict(int)
    met: dict[int, set[int]] = defaultdict(set)
    for frame in frames:
        if frame[12:14] != b"\x08\x00" or frame[23] != 17:
            continue
        port = struct.unpack_from("!H", frame, port_at)[0]
        assert frame[15] >> 2 == dscp_at(sent[port]), (port, sent[port])
        met[port].add(frame[15] >> 2)
        sent[port] += struct.unpack_from("!H", frame, 38)[0] - 8
    assert set.intersection(*met.values()) == set(SETTINGS.dscp)
    return sent


def transfer(host: Host, version: int, size_bytes: int, during=lambda sent: None) -> socket.socket:
    """Send `size_bytes` over TCP and wait until the receiver has all of it; returns the closed connection."""
    family = {4: socket.AF_INET, 6: socket.AF_INET6}[version]
    with in_netns(host.receiver):
        listener = socket.create_server((ADDRESSES[version][1], PORT), family=family)
    received = []

    def receive() -> None:
        connection, _ = listener.accept()
        with connection:
            while data := connection.recv(1 << 18):
                received.append(len(data))

    thread = threading.Thread(target=receive)
    thread.start()
    with in_netns(host.sender):
        connection = socket.create_connection((ADDRESSES[version][1], PORT), timeout=20)
    with connection, listener:
        chunk = bytes(50_000)
        for sent in range(0, size_bytes, len(chunk)):
            connection.sendall(chunk)
            during(sent)
        connection.shutdown(socket.SHUT_WR)
        thread.join(20)
    assert sum(received) == size_bytes
    return connection
