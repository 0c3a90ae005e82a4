"""Real packets over a veth pair: TCP and UDP from sockets, odd frames from packet sockets, seen at the other end."""

import contextlib
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from datapath_kit import bpf_file_system, build_frame, flow_key, in_netns, run, start_agent

from fabricpilot.levels import Thresholds
from hostagent.datapath.base import FLAG_ENDED, FLAG_SAW_START, Settings
from hostagent.datapath.ebpf import EbpfDatapath

THRESHOLDS = (50_000, 500_000, 2_000_000)
SETTINGS = Settings(Thresholds(THRESHOLDS), (32, 24, 16, 8), (1, 2, 3, 4))
SIZE_BYTES = 5_000_000
PORT = 5001
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
def captured(netns: str) -> Iterator[Capture]:
    """Headers of everything that arrives at nic0 of a namespace from its peer."""
    with in_netns(netns):
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        tap.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        tap.bind(("nic0", 0))
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
    if len(frame) < 74:  # cut short, or without TCP options: none of a socket's
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
    if protocol != 6:
        return None
    sequence, flags = struct.unpack_from("!I", frame, offset + 4)[0], frame[offset + 13]
    return Seen(traffic_class >> 2, traffic_class & 3, sequence, flags, end - offset - (frame[offset + 12] >> 4) * 4)


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


def check_marks(packets: list[Seen]) -> dict[int, int]:
    """Every packet carries the mark that the bytes sent before it demand; returns packets per level."""
    start = next(seen.sequence for seen in packets if seen.flags & 2) + 1
    counts = dict.fromkeys(range(4), 0)
    highest = 0
    for seen in packets:
        if not seen.payload_bytes:
            assert seen.dscp == SETTINGS.dscp[0]
            continue
        attained = (seen.sequence - start) % 2**32
        if attained < highest:
            continue  # a retransmission travels on the level that the flow has by then
        highest = attained + seen.payload_bytes
        level = SETTINGS.thresholds.level_of(attained)
        assert seen.dscp == SETTINGS.dscp[level], f"at {attained} bytes"
        counts[level] += 1
    return counts


@pytest.mark.parametrize("version", [4, 6])
def test_every_packet_of_a_tcp_flow_carries_the_mark_its_bytes_demand(host, version):
    with captured(host.receiver) as capture:
        transfer(host, version, SIZE_BYTES)
    counts = check_marks(capture.packets)
    assert min(counts.values()) > 0
    table = host.datapath.flows()
    row = int(table.states["attained_bytes"].argmax())
    state = table.states[row]
    sent_bytes = sum(seen.payload_bytes for seen in capture.packets)  # a retransmission counts once more
    assert sent_bytes >= SIZE_BYTES
    assert state["attained_bytes"] == sent_bytes
    assert state["flags"] == FLAG_ENDED | FLAG_SAW_START
    assert table.keys["destination_port"][row] == PORT
    assert 0 < int(state["last_seen_ns"]) - int(state["first_seen_ns"]) < 20e9
    counters = host.datapath.counters()
    assert sum(counters[f"bytes_level_{level}"] for level in range(4)) == sent_bytes
    assert counters["write_failed"] == counters["insert_failed"] == counters["untracked_malformed"] == 0


def test_ecn_of_a_socket_survives(host):
    with captured(host.receiver) as capture, in_netns(host.sender):
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 2)  # ECT(0)
        udp.sendto(b"x" * 100, (ADDRESSES[4][1], 9))
        udp.close()
    marks = {frame[15] for frame in capture.frames if frame[12:14] == b"\x08\x00" and frame[23] == 17}
    assert marks == {32 << 2 | 2}


def test_a_fragmented_datagram_travels_on_one_level(host):
    with captured(host.receiver) as capture, in_netns(host.sender):
        run("ip", "link", "set", "nic0", "mtu", "1300")
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.setsockopt(socket.IPPROTO_IP, 10, 0)  # IP_MTU_DISCOVER, IP_PMTUDISC_DONT
        udp.sendto(b"x" * 60_000, (ADDRESSES[4][1], 9))
        udp.sendto(b"x" * 3000, (ADDRESSES[4][1], 9))
        udp.close()
    marks = [frame[15] >> 2 for frame in capture.frames if frame[12:14] == b"\x08\x00" and frame[23] == 17]
    assert marks == [SETTINGS.dscp[0]] * 47 + [SETTINGS.dscp[1]] * 3
    assert host.datapath.flows().states["attained_bytes"].tolist() == [63_000]
    assert host.datapath.counters()["untracked_fragment"] == 0


def raw_socket(netns: str) -> socket.socket:
    with in_netns(netns):
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        raw.bind(("nic0", 0))
    return raw


@pytest.mark.parametrize("key", [flow_key(), flow_key("fd77::1", "fd77::2")], ids=["ipv4", "ipv6"])
def test_frames_cut_short_anywhere_leave_as_they_are(host, key):
    frame = build_frame(key, 20)
    with captured(host.receiver) as capture, raw_socket(host.sender) as raw:
        for length in range(15, len(frame)):
            raw.send(frame[:length])
    expected = [frame[:length] for length in range(15, len(frame))]
    arrived = [seen for seen in capture.frames if frame.startswith(seen)]
    assert arrived == expected
    assert host.datapath.counters()["untracked_malformed"] == len(expected)


def test_headers_outside_linear_memory_are_brought_there(host):
    # A packet socket with a virtio header can put all but the Ethernet header into page fragments.
    key = flow_key(ADDRESSES[4][0], ADDRESSES[4][1])
    frame = build_frame(key, 6000)
    # struct virtio_net_hdr: checksum to fill in at 34 + 16 (GSO needs it), TCPv4, 14 linear bytes, 1000 a segment
    header = struct.pack("<BBHHHH", 1, 1, 14, 1000, 34, 16)
    with captured(host.receiver) as capture, in_netns(host.sender):
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        raw.setsockopt(263, 15, 1)  # SOL_PACKET, PACKET_VNET_HDR
        raw.bind(("nic0", 0x0800))
        raw.send(header + frame)
        raw.close()
    states = host.datapath.flows().states
    assert states["attained_bytes"].tolist() == [6000]
    assert states["packets"].tolist() == [6]
    assert [seen.dscp for seen in capture.packets if seen.payload_bytes] == [SETTINGS.dscp[3]]  # no SYN: mid-life
    assert host.datapath.counters()["packets_level_3"] == 6  # such packets come without a segment count, too


AGENT = """
import sys
from pathlib import Path
from fabricpilot.levels import Thresholds
from hostagent.datapath.base import Settings
from hostagent.datapath.ebpf import EbpfDatapath
datapath = EbpfDatapath(Path(sys.argv[1]), 4096)
datapath.apply(Settings(Thresholds((50_000, 500_000, 2_000_000)), (32, 24, 16, 8), (1, 2, 3, 4)))
datapath.attach("nic0")
print("attached", flush=True)
sys.stdin.read()
"""


def test_agent_killed_under_traffic_and_the_next_one_adopts(wire, pin_dir):
    """Not a byte uncounted and not a mark wrong while one agent is killed and another one takes over."""
    with in_netns(wire[0]):
        agent = start_agent(AGENT, str(pin_dir))
        assert agent.stdout.readline() == "attached\n"
    adopted = []

    def kill_then_adopt(sent: int) -> None:
        if sent == 1_000_000:
            agent.send_signal(signal.SIGKILL)
            agent.communicate()
        if sent == 3_000_000:
            with in_netns(wire[0]):
                adopted.append(EbpfDatapath(pin_dir, 4096))
                adopted[0].attach("nic0")
                adopted[0].apply(SETTINGS)

    with captured(wire[1]) as capture:
        transfer(Host(*wire, None), 4, SIZE_BYTES, kill_then_adopt)
    assert min(check_marks(capture.packets).values()) > 0
    with in_netns(wire[0]):
        datapath = adopted[0]
        assert datapath.adopted
        assert datapath.flows().states["attained_bytes"].max() == sum(seen.payload_bytes for seen in capture.packets)
        datapath.detach()
        datapath.close()
