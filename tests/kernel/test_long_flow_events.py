"""The ring of flows that became long: what the kernel writes into it, and what it does not."""

import time

import pytest
from datapath_kit import KernelSender, build_frame, flow_key

from fabricpilot.levels import Thresholds
from hostagent.datapath.base import MessageRule, Settings
from hostagent.datapath.layout import LONG_FLOW_DTYPE
from hostagent.datapath.pinned_names import LONG_FLOW_RING
from hostagent.datapath.ring import Ring
from hostagent.long_flows import open_long_flow_events
from hostagent.observe import observe

BLIND_GAP_S = 0.4
SETTINGS = Settings(
    Thresholds((1000, 2000, 3000)),
    (32, 24, 16, 8),
    (1, 2, 3, 4),
    messages=MessageRule(blind_gap_ns=int(BLIND_GAP_S * 1e9), starved_ns=0),
)


@pytest.fixture
def sender(pin_dir):
    kernel = KernelSender(pin_dir, 8192)
    kernel.datapath.apply(SETTINGS)
    yield kernel
    kernel.close()


@pytest.fixture
def ring(sender):
    opened = Ring(sender.datapath.map_fd(LONG_FLOW_RING), LONG_FLOW_DTYPE)
    yield opened
    opened.close()


def test_a_flow_is_told_of_once_when_it_becomes_long_and_when_it_ends(sender, ring):
    key = flow_key(source_port=7)
    sender.send(key, syn=True)
    for _ in range(3):
        sender.send(key, 1000)
    assert len(ring.read(10)) == 0
    for _ in range(5):
        sender.send(key, 1000)
    (event,) = ring.read(10)
    assert event["key"].tobytes() == key.tobytes()
    assert (event["attained_bytes"], event["backlog_bytes"], event["ended"]) == (3000, 0, 0)
    state = sender.datapath.flows().states[0]
    assert event["message_began_ns"] == state["message_began_ns"] < event["at_ns"] <= state["last_seen_ns"] + 10**8
    sender.send(key, fin=True)
    sender.send(key, fin=True)
    (event,) = ring.read(10)
    assert (event["attained_bytes"], event["ended"]) == (8000, 1)


def test_short_flows_and_those_of_unknown_size_are_not_told_of(sender, ring):
    short, unknown = flow_key(source_port=1), flow_key(source_port=2)
    sender.send(short, syn=True)
    sender.send(short, 2900)
    sender.send(short, fin=True)
    for _ in range(5):
        sender.send(unknown, 1000)
    assert len(ring.read(10)) == 0


def test_each_message_of_a_flow_is_told_of(sender, ring):
    key = flow_key(protocol=17)
    for _ in range(2):
        for _ in range(5):
            sender.send(key, 1000)
        time.sleep(1.2 * BLIND_GAP_S)
    events = ring.read(10)
    assert events["attained_bytes"].tolist() == [3000, 3000]


def test_a_full_ring_is_counted_and_goes_on_when_it_is_read(sender, ring):
    room = ring._size // (LONG_FLOW_DTYPE.itemsize + 8)
    sender.datapath.apply(Settings(Thresholds((1, 2, 3)), (32, 24, 16, 8), (1, 2, 3, 4)))
    frame = bytearray(build_frame(flow_key(protocol=17), 3))
    for port in range(1, room + 12):
        frame[34:36] = port.to_bytes(2)
        for _ in range(2):  # one byte beyond the last threshold: long with the second packet
            sender.run(bytes(frame))
    told = ring.read(room + 100)
    untold = sender.datapath.counters()["long_untold"]
    assert len(told) + untold == room + 11
    assert 0 < untold < 20
    key = flow_key(source_port=50_000, protocol=17)
    sender.send(key, 3)
    sender.send(key, 3)
    assert [event["key"].tobytes() for event in ring.read(10)] == [key.tobytes()]


def test_the_agent_takes_events_as_summaries(sender):
    events = open_long_flow_events(sender.datapath)
    key = flow_key()
    sender.send(key, syn=True)
    for _ in range(4):
        sender.send(key, 1000)
    sender.send(key, fin=True)
    (long,), (ended,) = events.take(levels=4)
    assert (long.source, long.destination_port, long.size_bytes, long.level) == ("10.0.0.1", 80, 3000, 3)
    assert (ended.source_port, ended.size_bytes) == (40000, 4000)
    assert events.status()["told"] == 2
    events.close()


def test_what_is_known_to_be_long_is_reported_as_long_before_it_has_sent_enough(sender):
    key = flow_key(protocol=17)
    for _ in range(4):
        sender.send(key, 1000)
    table = sender.datapath.flows()
    assert len(observe(table, 10**9, 30.0).long) == 1
