"""Real packets over a veth pair: TCP and UDP from sockets, odd frames from packet sockets, seen at the other end."""

import signal
import socket
import struct

import pytest
from datapath_kit import build_frame, flow_key, in_netns, run, start_agent
from datapath_wire import (
    ADDRESSES,
    PORT,
    SETTINGS,
    Host,
    Seen,
    captured,
    dscp_at,
    first_time,
    on_one_cpu,
    sent_again,
    transfer,
)

from hostagent.datapath.base import FLAG_ENDED, FLAG_SAW_MESSAGE, FLAG_SAW_START, FLAG_TOLD, FLAG_UNSENT
from hostagent.datapath.ebpf import EbpfDatapath

SIZE_BYTES = 5_000_000


def check_marks(packets: list[Seen]) -> dict[int, int]:
    """Every packet of a flow carries the mark that the bytes sent before it demand; returns packets per level."""
    assert {seen.dscp for seen in packets if not seen.payload_bytes} == {SETTINGS.dscp[0]}
    counts = dict.fromkeys(range(4), 0)
    for place, seen in first_time(packets):
        assert seen.dscp == dscp_at(place), f"at {place} bytes"
        counts[SETTINGS.dscp.index(seen.dscp)] += 1
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
    assert state["attained_bytes"] == SIZE_BYTES
    assert int(state["flags"]) & ~FLAG_UNSENT == FLAG_ENDED | FLAG_SAW_START | FLAG_SAW_MESSAGE | FLAG_TOLD
    assert table.keys["destination_port"][row] == PORT
    assert 0 < int(state["last_seen_ns"]) - int(state["first_seen_ns"]) < 20e9
    counters = host.datapath.counters()
    sent_bytes = SIZE_BYTES + sent_again(capture.packets)
    assert sum(counters[f"bytes_level_{level}"] for level in range(4)) == sent_bytes
    assert counters["write_failed"] == counters["flows_evicted"] == counters["untracked_malformed"] == 0


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
        with on_one_cpu():
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
    with captured(host.receiver) as capture, raw_socket(host.sender) as raw, on_one_cpu():
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
from hostagent.datapath.base import MessageRule, Settings
from hostagent.datapath.ebpf import EbpfDatapath
datapath = EbpfDatapath(Path(sys.argv[1]), 4096)
one_message = MessageRule(gap_ns=3600 * 10**9, starved_ns=0)
thresholds = Thresholds((50_000, 500_000, 2_000_000))
datapath.apply(Settings(thresholds, (32, 24, 16, 8), (1, 2, 3, 4), messages=one_message))
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
