"""The netfilter data path under real sockets: local, forwarded, translated, idle, hidden from conntrack, too many."""

import socket
import struct
import threading
import time

import numpy as np
import pytest
from agent_kit import wait_for
from datapath_kit import flow_key, in_netns, run
from nft_kit import NIC, wire_up

from fabricpilot.levels import Thresholds
from hostagent.datapath.base import FLAG_ENDED, FLAG_SAW_START, Settings
from hostagent.datapath.nftables import NftablesDatapath

SETTINGS = Settings(Thresholds((10_000, 100_000, 1_000_000)), (32, 24, 16, 8), (0x10001, 0x10002, 0x10003, 0x10004))
OURS, THEIRS = "192.0.2.1", "192.0.2.2"
TCP, UDP = 6, 17
TICK_NS = 20e6  # a tick of the kernel's clock, of 10 ms at most, and what two clocks differ


@pytest.fixture
def namespaces(make_netns):
    """A namespace, entered, wired to a peer."""
    here, peer = make_netns("nft"), make_netns("peer")
    wire_up(here, peer)
    run("ip", "link", "set", NIC, "arp", "on", netns=here)
    with in_netns(here):
        yield here, peer


@pytest.fixture
def datapath(namespaces):
    opened = NftablesDatapath(4096, 30.0)
    opened.attach(NIC)
    opened.apply(SETTINGS)
    yield opened
    opened.detach()
    opened.close()


def listen(namespace: str, address: str = THEIRS) -> socket.socket:
    with in_netns(namespace):
        listening = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    listening.settimeout(5)
    return listening


def connect(listening: socket.socket) -> tuple[socket.socket, socket.socket]:
    sending = socket.create_connection(listening.getsockname()[:2], timeout=5)
    return sending, listening.accept()[0]


def transfer(sending: socket.socket, receiving: socket.socket, size: int) -> None:
    """Send `size` bytes and take them all out at the other end."""
    sending.setblocking(True)
    writer = threading.Thread(target=sending.sendall, args=(bytes(size),))
    writer.start()
    got = 0
    while got < size:
        got += len(receiving.recv(1 << 20))
    writer.join()


def most_bytes(sending: socket.socket, size: int) -> int:
    """What conntrack may count of `size` bytes sent: SACKs look like payload, and what was sent again counts again."""
    info = sending.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    segment_bytes, segments_again = (struct.unpack_from("=I", info, offset)[0] for offset in (16, 100))
    return size + max(64, size // 50) + segment_bytes * segments_again


def state_of(datapath: NftablesDatapath, key: np.ndarray) -> np.void | None:
    table = datapath.flows()
    [*rows] = np.flatnonzero([row.tobytes() == key.tobytes() for row in table.keys])
    return table.states[rows[0]] if rows else None


@pytest.mark.parametrize("size", [0, 1, 5_000, 100_000, 3_000_000])
def test_size_and_duration_of_a_tcp_flow(namespaces, datapath, size):
    listening = listen(namespaces[1])
    begin_ns = time.monotonic_ns()
    sending, receiving = connect(listening)
    connected_ns = time.monotonic_ns()
    key = flow_key(OURS, THEIRS, sending.getsockname()[1], listening.getsockname()[1])
    transfer(sending, receiving, size)
    time.sleep(0.3)
    most = most_bytes(sending, size)
    shut_ns = time.monotonic_ns()
    sending.close()
    closed_ns = time.monotonic_ns()
    time.sleep(0.3)  # the receiver acknowledges the FIN, and our acknowledgements go on
    receiving.close()
    time.sleep(0.1)
    state = state_of(datapath, key)
    assert state["flags"] == FLAG_ENDED | FLAG_SAW_START
    assert size <= state["attained_bytes"] <= most
    assert begin_ns - TICK_NS < int(state["first_seen_ns"]) < connected_ns + TICK_NS
    assert shut_ns - TICK_NS < int(state["last_seen_ns"]) < closed_ns + 100e6
    assert datapath.forget(datapath.flows().keys) >= 1
    assert len(datapath.flows()) == 0


def test_both_directions_of_a_server_are_told_apart(namespaces, datapath):
    """We answer on a connection the peer opened: the flow is the reply direction."""
    listening = socket.create_server((OURS, 0))
    with in_netns(namespaces[1]):
        asking = socket.create_connection(listening.getsockname(), timeout=5)
    answering = listening.accept()[0]
    asking.sendall(b"x" * 100)
    transfer(answering, asking, 200_000)
    table = datapath.flows()
    key = flow_key(OURS, THEIRS, listening.getsockname()[1], asking.getsockname()[1])
    assert [row.tobytes() for row in table.keys] == [key.tobytes()]
    assert 200_000 <= table.states["attained_bytes"][0] <= most_bytes(answering, 200_000)
    assert table.states["level"][0] == 2


def test_only_scheduled_interfaces_are_seen(namespaces, datapath):
    listening = socket.create_server(("127.0.0.1", 0))
    with socket.create_connection(listening.getsockname()) as sending:
        sending.sendall(b"x" * 1000)
        assert len(datapath.flows()) == 0
    assert sum(value for name, value in datapath.counters().items() if name.startswith("packets_")) == 0


def test_forwarded_and_translated_traffic_has_the_key_of_the_wire(namespaces, datapath, make_netns):
    """A container behind us, masqueraded: scheduled, and named as the fabric sees it."""
    here, peer = namespaces
    container = make_netns("box")
    run("ip", "link", "add", "box", "type", "veth", "peer", "name", "eth0", "netns", container)
    for namespace, device, address in ((here, "box", "198.51.100.1/24"), (container, "eth0", "198.51.100.2/24")):
        run("ip", "addr", "add", address, "dev", device, netns=namespace)
        run("ip", "link", "set", device, "up", netns=namespace)
    run("ip", "route", "add", "default", "via", "198.51.100.1", netns=container)
    run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    rules = "chain c { type nat hook postrouting priority 100; oifname nic masquerade; }; "
    run("nft", f"table ip nat {{ {rules} }}")
    listening = listen(peer)
    with in_netns(container):
        sending, receiving = connect(listening)
    transfer(sending, receiving, 300_000)
    translated = receiving.getpeername()
    assert translated[0] == OURS
    state = state_of(datapath, flow_key(OURS, THEIRS, translated[1], listening.getsockname()[1]))
    assert 300_000 <= state["attained_bytes"] <= most_bytes(sending, 300_000)
    assert state["level"] == 2
    assert len(datapath.flows()) == 1  # the answers leave by another interface


def test_a_flow_that_goes_on_after_it_was_forgotten_is_told_from_there(namespaces, datapath):
    sending, receiving = connect(listen(namespaces[1]))
    transfer(sending, receiving, 50_000)
    assert datapath.forget(datapath.flows().keys) == 1
    assert len(datapath.flows()) == 0
    transfer(sending, receiving, 4_000)
    [state] = datapath.flows().states
    assert 4_000 <= state["attained_bytes"] <= 4_100
    assert not state["flags"] & (FLAG_SAW_START | FLAG_ENDED)
    assert datapath.counters()["flows_forgotten"] == 1


def test_a_flow_that_conntrack_gave_up_is_shown_as_ended_until_forgotten(namespaces, datapath):
    run("sysctl", "-qw", "net.netfilter.nf_conntrack_udp_timeout=3")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
        sending.sendto(bytes(700), (THEIRS, 9))
        sending.sendto(bytes(300), (THEIRS, 9))
    [alive] = datapath.flows().states
    assert not alive["flags"] & FLAG_ENDED
    wait_for(lambda: datapath.flows().states["flags"][0] & FLAG_ENDED)
    for _ in range(2):
        table = datapath.flows()
        assert table.states["attained_bytes"].tolist() == [1000]
        assert table.states["flags"][0] & FLAG_ENDED
    assert datapath.forget(table.keys) == 1
    assert len(datapath.flows()) == 0


def test_flows_older_than_the_data_path_are_of_unknown_age(namespaces):
    """One known to conntrack without accounting, one unknown to it: both go to the bottom and say so."""
    listening = listen(namespaces[1])
    unknown = connect(listening)
    run("nft", "table ip before { chain c { type filter hook output priority 0; ct state invalid drop; }; }")
    uncounted = connect(listening)
    opened = NftablesDatapath(4096, 30.0)
    opened.attach(NIC)
    opened.apply(SETTINGS)
    try:
        for sending, receiving in (unknown, uncounted):
            transfer(sending, receiving, 2_000)
            key = flow_key(OURS, THEIRS, sending.getsockname()[1], listening.getsockname()[1])
            state = state_of(opened, key)
            assert (state["level"], state["flags"]) == (3, 0)
        counters = opened.counters()
        assert counters["packets_level_3"] >= 2
        assert (counters["bytes_level_0"], counters["flows_midlife"]) == (0, 2)
    finally:
        opened.detach()
        opened.close()


def test_what_conntrack_does_not_track_is_left_alone_and_counted(namespaces, datapath):
    rules = "type filter hook output priority raw; udp dport 99 notrack; "
    run("nft", f"table ip hide {{ chain c {{ {rules} }}; }}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
        for _ in range(3):
            sending.sendto(b"hidden", (THEIRS, 99))
        sending.sendto(b"seen", (THEIRS, 98))
    counters = datapath.counters()
    assert counters["untracked_notrack"] == 3
    assert counters["packets_level_0"] == 1
    assert len(datapath.flows()) == 1
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as echo:
        echo.sendto(bytes.fromhex("0800f7ff00000000"), (THEIRS, 0))
    assert datapath.counters()["untracked_other_protocol"] >= 1


def test_a_full_flow_table_is_counted_and_stops_no_tagging(namespaces):
    opened = NftablesDatapath(64, 30.0)
    opened.attach(NIC)
    opened.apply(SETTINGS)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
            for port in range(1000, 1200):
                sending.sendto(b"x", (THEIRS, port))
        counters = opened.counters()
        assert counters["packets_level_0"] == 200
        assert counters["insert_failed"] == 200 - len(opened.flows()) > 0
    finally:
        opened.detach()
        opened.close()


def test_ipv6(namespaces, datapath):
    for namespace, address in zip(namespaces, ("2001:db8::1/64", "2001:db8::2/64"), strict=True):
        run("ip", "addr", "add", address, "dev", NIC, "nodad", netns=namespace)
    listening = listen(namespaces[1], "2001:db8::2")
    sending, receiving = connect(listening)
    transfer(sending, receiving, 300_000)
    key = flow_key("2001:db8::1", "2001:db8::2", sending.getsockname()[1], listening.getsockname()[1])
    state = state_of(datapath, key)
    assert 300_000 <= state["attained_bytes"] <= most_bytes(sending, 300_000)
    assert state["level"] == 2
