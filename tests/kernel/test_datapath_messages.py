"""Messages of real TCP connections, and levels by what was written: over a veth pair, with sizes that are known."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from datapath_kit import flow_key, in_netns, overwrite_state, run
from datapath_wire import (
    ADDRESSES,
    PORT,
    SETTINGS,
    THRESHOLDS,
    Host,
    captured,
    dscp_at,
    first_time,
    message_at,
    sent_again,
    transfer,
    wait_for_gap,
)

from fabricpilot.histogram import LogHistogram
from fabricpilot.levels import Thresholds
from hostagent.datapath.base import FLAG_SAW_MESSAGE, FLAG_SAW_START, FLOW_STATE_DTYPE, MessageRule
from hostagent.datapath.layout import LONG_FLOW_DTYPE
from hostagent.datapath.pinned_names import LONG_FLOW_RING
from hostagent.datapath.ring import Ring

GAP_S = 0.3  # beyond what a busy machine makes of a pause within a message
RULE = MessageRule(gap_ns=int(GAP_S * 1e9), starved_ns=0)
BY_MESSAGE = replace(SETTINGS, messages=RULE)
BY_BACKLOG = replace(SETTINGS, use_backlog=True)
SIZES = (1_000, 60_000, 700_000, 300, 2_500_000, 100, 40_000)


class Service:
    """A TCP server that answers every message, whose size the client sends first, with one byte."""

    def __init__(self, host: Host) -> None:
        with in_netns(host.receiver):
            self._listener = socket.create_server((ADDRESSES[4][1], PORT))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        with in_netns(host.sender):
            self.connection = socket.create_connection((ADDRESSES[4][1], PORT), timeout=20)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def request(self, size_bytes: int) -> None:
        """Send a message of that size in one write, and wait for the answer."""
        self.connection.sendall(size_bytes.to_bytes(8) + bytes(size_bytes - 8))
        assert self.connection.recv(1) == b"!"

    def close(self) -> None:
        self.connection.close()
        self._thread.join(20)
        self._listener.close()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection, contextlib.suppress(ConnectionError):
            while head := connection.recv(8, socket.MSG_WAITALL):
                left = int.from_bytes(head) - 8
                while left:
                    left -= len(connection.recv(min(left, 1 << 18)))
                connection.sendall(b"!")


@pytest.fixture
def service(host: Host) -> Iterator[Service]:
    """A persistent connection over the scheduled NIC."""
    service = Service(host)
    yield service
    service.close()


def only_flow(host: Host) -> np.void:
    table = host.datapath.flows()
    rows = [row for row in range(len(table)) if table.keys["destination_port"][row] == PORT]
    assert len(rows) == 1
    return table.states[rows[0]]


def test_each_message_of_a_persistent_connection_starts_at_the_top(host, service):
    host.datapath.apply(BY_MESSAGE)
    with captured(host.receiver) as capture:
        for size in SIZES:
            service.request(size)
            wait_for_gap(service.connection, 1.2 * GAP_S)
    met = set()
    for place, seen in first_time(capture.packets):
        message, position = message_at(place, SIZES)
        assert seen.dscp == dscp_at(position), (message, position)
        met.add(message)
    assert met == set(range(len(SIZES)))
    flow = only_flow(host)
    assert (flow["attained_bytes"], flow["last_message_bytes"]) == (SIZES[-1], SIZES[-2])
    assert flow["earlier_bytes"] == sum(SIZES[:-1])
    finished = host.datapath.finished_messages()
    assert LogHistogram(finished.sizes).sparse() == LogHistogram.of(SIZES[:-1]).sparse()
    assert host.datapath.counters()["messages_finished"] == len(SIZES) - 1
    took_us = LogHistogram(host.datapath.finished_messages().durations)
    assert took_us.total == len(SIZES) - 1
    assert took_us.quantile(1) < GAP_S * 1e6  # the pauses, which are longer, do not count


def test_without_a_pause_it_is_one_message(host, service):
    host.datapath.apply(replace(BY_MESSAGE, messages=MessageRule(gap_ns=10 * 10**9)))
    for _ in range(30):
        service.request(10_000)
    assert only_flow(host)["attained_bytes"] >= 300_000
    assert host.datapath.counters()["messages_finished"] == 0


def test_the_least_gap_is_twice_the_round_trip_time(host, service):
    """Requests that follow each answer at once are one message over a slow path, however short the configured gap."""
    host.datapath.apply(replace(BY_MESSAGE, messages=MessageRule(gap_ns=1000, starved_ns=0)))
    with in_netns(host.sender):
        run("tc", "qdisc", "add", "dev", "nic0", "root", "tbf", "rate", "200kbit", "burst", "1600", "latency", "5s")
    for _ in range(12):
        service.request(1000)  # 43 ms each; the smoothed time comes from the handshake's 3 ms
    begun = host.datapath.counters()["messages_finished"]
    for _ in range(6):
        service.request(1000)
    assert host.datapath.counters()["messages_finished"] == begun
    wait_for_gap(service.connection, 1.2 * GAP_S)
    service.request(1000)
    assert host.datapath.counters()["messages_finished"] == begun + 1


def test_a_connection_seen_in_mid_life_is_on_the_last_level_until_its_next_message(host, service):
    host.datapath.apply(BY_MESSAGE)
    service.request(5000)
    host.datapath.forget(host.datapath.flows().keys)
    with captured(host.receiver) as capture:
        wait_for_gap(service.connection, 1.2 * GAP_S)
        service.request(5000)  # like an SSH session after half an hour: nothing was in flight, so its start is seen
    flow = only_flow(host)
    assert flow["flags"] & (FLAG_SAW_START | FLAG_SAW_MESSAGE) == FLAG_SAW_MESSAGE
    assert {seen.dscp for _, seen in first_time(capture.packets)} == {SETTINGS.dscp[0]}
    assert host.datapath.counters()["flows_midlife"] >= 1


def test_a_transfer_forgotten_on_its_way_is_of_unknown_size(host):
    def forget(sent: int) -> None:
        if sent == 2_000_000:
            host.datapath.forget(host.datapath.flows().keys)

    with in_netns(host.sender):
        run("tc", "qdisc", "add", "dev", "nic0", "root", "tbf", "rate", "100mbit", "burst", "20k", "latency", "50ms")
    host.datapath.apply(BY_BACKLOG)
    with captured(host.receiver) as capture:
        transfer(host, 4, 5_000_000, forget)
    assert first_time(capture.packets)[-1][1].dscp == SETTINGS.dscp[-1]
    assert not only_flow(host)["flags"] & FLAG_SAW_MESSAGE


@pytest.mark.parametrize("size_bytes", [2_000, 40_000, 120_000, 450_000])
def test_what_is_written_in_one_go_travels_on_the_level_of_its_size(host, service, size_bytes):
    """From the first packet that leaves when all is written: TCP sends some while the application still writes."""
    host.datapath.apply(BY_BACKLOG)
    with in_netns(host.sender):
        run("tc", "qdisc", "add", "dev", "nic0", "root", "tbf", "rate", "50mbit", "burst", "5k", "latency", "400ms")
    with captured(host.receiver) as capture:
        service.request(size_bytes)
    levels = [SETTINGS.dscp.index(seen.dscp) for _, seen in first_time(capture.packets)]
    assert levels == sorted(levels), "a flow never rises within a message"
    assert levels[-1] == SETTINGS.thresholds.level_of(size_bytes - 1)
    assert host.datapath.sees_backlog()
    assert levels[len(levels) // 4] == levels[-1], "placed by what was written, not by what was sent"


def lose_some(host: Host, every: int = 100) -> None:
    """Segments one by one over 50 Mbit/s; the receiver loses one of so many full ones, of each hundred the 61st."""
    with in_netns(host.sender):
        run("ip", "link", "set", "nic0", "gso_max_segs", "1")
        run("tc", "qdisc", "add", "dev", "nic0", "root", "tbf", "rate", "50mbit", "burst", "5k", "limit", "2m")
    lose = f"meta l4proto tcp meta length > 1000 numgen inc mod {every} == {every * 3 // 5} drop"
    with in_netns(host.receiver):
        run("nft", "add table ip lossy; add chain ip lossy in { type filter hook prerouting priority 0 ; }")
        run("nft", f"add rule ip lossy in {lose}")


def test_what_is_sent_again_is_not_counted_as_waiting(host, service):
    """What is in flight behind a lost packet was counted when it was sent: it does not wait once more."""
    host.datapath.apply(BY_BACKLOG)
    lose_some(host)
    with captured(host.receiver) as capture:  # in front of what loses
        service.request(440_000)
    sent = [seen for seen in capture.packets if seen.payload_bytes]
    assert 440_000 < sum(seen.payload_bytes for seen in sent) < THRESHOLDS[1]
    assert {seen.dscp for seen in sent[len(sent) // 2 :]} == {SETTINGS.dscp[1]}
    assert {seen.dscp for seen in sent} <= set(SETTINGS.dscp[:2])


@pytest.mark.parametrize("settings", [BY_BACKLOG, SETTINGS], ids=["written", "sent"])
def test_a_short_message_stays_at_the_top_however_much_of_it_is_sent_again(host, service, settings):
    host.datapath.apply(settings)
    lose_some(host, every=2)
    size_bytes = THRESHOLDS[0] - 2000
    with captured(host.receiver) as capture:
        service.request(size_bytes)
    sent = [seen for seen in capture.packets if seen.payload_bytes]
    assert sum(seen.payload_bytes for seen in sent) > 1.5 * THRESHOLDS[0]
    assert {seen.dscp for seen in sent} == {SETTINGS.dscp[0]}
    assert only_flow(host)["attained_bytes"] == size_bytes


def test_what_is_sent_again_makes_no_flow_long(host, service):
    """All of a message is in the send buffer, 500 bytes short of long: less than any segment that is sent again."""
    line_bytes = 440_500
    host.datapath.apply(replace(BY_BACKLOG, thresholds=Thresholds((10_000, 100_000, line_bytes))))
    lose_some(host)
    service.connection.setsockopt(socket.SOL_SOCKET, 32, 4 << 20)  # SO_SNDBUFFORCE
    ring = Ring(host.datapath.map_fd(LONG_FLOW_RING), LONG_FLOW_DTYPE)
    try:
        with captured(host.receiver) as capture:
            service.request(line_bytes - 500)
        assert sent_again(capture.packets) > 0
        assert len(ring.read(10)) == 0
    finally:
        ring.close()


def test_backlog_is_not_looked_at_where_it_is_not_wanted(host, service):
    host.datapath.apply(SETTINGS)
    with captured(host.receiver) as capture:
        service.request(450_000)
    sent = first_time(capture.packets)
    assert all(seen.dscp == dscp_at(place) for place, seen in sent)
    assert {seen.dscp for _, seen in sent} == set(SETTINGS.dscp[:2])


def test_bins_in_the_kernel_are_those_of_the_histogram(kernel_sender):
    """Sizes of all magnitudes; at the very edge of a bin the kernel's 17-bit mantissa may choose its neighbour."""
    kernel_sender.datapath.apply(replace(BY_MESSAGE, messages=MessageRule(blind_gap_ns=1)))
    rng = np.random.default_rng(1)
    values = [*range(1, 130), *(int(2**e) for e in rng.uniform(0, 46, 300)), 2**46 - 1, 2**50]
    key = flow_key(protocol=17)
    kernel_sender.send(key, 1)
    expected = LogHistogram.of(np.minimum(values, 2**46 - 1))
    for value in values:
        state = np.zeros(1, FLOW_STATE_DTYPE)
        state["attained_bytes"], state["flags"] = value, FLAG_SAW_START | FLAG_SAW_MESSAGE
        state["message_began_ns"], state["last_data_ns"] = 1000, 1000 + 1000 * min(value, 2**30)
        overwrite_state(kernel_sender.datapath, state)
        kernel_sender.send(key, 1)
    finished = kernel_sender.datapath.finished_messages()
    assert finished.sizes.sum() == finished.durations.sum() == len(values)
    moved = np.abs(np.cumsum(finished.sizes - expected.counts))  # values that lie in a neighbouring bin
    assert moved.max() <= 1
    assert moved.sum() <= 3
    assert finished.durations[: 8 * 7].tolist() == finished.sizes[: 8 * 7].tolist()
