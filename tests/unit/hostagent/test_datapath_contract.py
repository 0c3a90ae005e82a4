"""The rules of flows, levels and marks, the same for every data path: the fake one, and the others where there is root.

nftables has real packets on a wire. Conntrack counts the packet at hand and estimates payload, so its level may be that
of up to one packet more or less (`tolerance_bytes`); and it decides what a connection is. What it cannot do is left to
the other two (`owns_its_table`).
"""

import os
import time
from dataclasses import replace

import numpy as np
import pytest
from datapath_kit import flow_key
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fabricpilot.histogram import LogHistogram
from fabricpilot.levels import Thresholds
from hostagent.datapath.base import (
    FLAG_ENDED,
    FLAG_SAW_START,
    FLAG_TURN,
    FLOW_KEY_DTYPE,
    FLOW_STATE_DTYPE,
    Datapath,
    MessageRule,
    Settings,
)
from hostagent.datapath.fake import FakeDatapath
from hostagent.datapath.layout import counter_names

THRESHOLDS = (1000, 5000, 20000)
DSCP = (32, 24, 16, 8)
PRIORITY = (0x10001, 0x10002, 0x10003, 0x10004)
SETTINGS = Settings(Thresholds(THRESHOLDS), DSCP, PRIORITY)
LIFE = FLAG_SAW_START | FLAG_ENDED
FLOW = flow_key()

needs_root = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root (CAP_BPF)")]


FAKE, EBPF, NFTABLES = "fake", pytest.param("ebpf", marks=needs_root), pytest.param("nftables", marks=needs_root)

# A test of what only a data path with a flow table of its own does to the byte and packet.
owns_its_table = pytest.mark.parametrize("sender", [FAKE, EBPF], indirect=True)


@pytest.fixture(params=[FAKE, EBPF, NFTABLES])
def sender(request):
    """Something with `.datapath` and `.send(key, payload_bytes, ...)`."""
    if request.param == "fake":
        return FakeSender()
    made = request.getfixturevalue("kernel_sender" if request.param == "ebpf" else "nft_sender")
    made.datapath.apply(SETTINGS)
    return made


class FakeSender:
    def __init__(self) -> None:
        self.datapath = FakeDatapath(4096)
        self.datapath.apply(SETTINGS)
        self.send = self.datapath.send


def state_of(datapath: Datapath, key: np.ndarray) -> np.void | None:
    table = datapath.flows()
    assert table.keys.dtype == FLOW_KEY_DTYPE
    assert table.states.dtype == FLOW_STATE_DTYPE
    rows = [row for row in range(len(table)) if table.keys[row].tobytes() == key.tobytes()]
    assert len(rows) <= 1
    return table.states[rows[0]] if rows else None


def assert_level(left, level: int) -> None:
    assert (left.dscp, left.priority) == (DSCP[level], PRIORITY[level])


def assert_level_of(sender, left, attained: int) -> None:
    """The packet is on the level of `attained` bytes, give or take what the data path may err by."""
    tolerance = getattr(sender, "tolerance_bytes", 0)
    limits = [max(0, attained - tolerance), attained + tolerance]
    lowest, highest = (sum(bytes_ >= threshold for threshold in THRESHOLDS) for bytes_ in limits)
    assert lowest <= DSCP.index(left.dscp) <= highest
    assert_level(left, DSCP.index(left.dscp))


@pytest.mark.parametrize("key", [FLOW, flow_key("2001:db8::1", "2001:db8::2")], ids=["ipv4", "ipv6"])
def test_level_is_that_of_the_bytes_sent_before(sender, key):
    assert_level(sender.send(key, syn=True), 0)
    attained = 0
    for payload in [999, 1, 1400, 1400, 1199, 1, *[1400] * 12]:
        left = sender.send(key, payload)
        assert_level_of(sender, left, attained)
        attained += payload
        state = state_of(sender.datapath, key)
        assert (state["attained_bytes"], DSCP[state["level"]]) == (attained, left.dscp)
    assert left.dscp == DSCP[3]


def test_the_first_packet_is_at_the_top_however_large(sender):
    sender.send(FLOW, syn=True)
    assert_level(sender.send(FLOW, 3000, segments=3), 0)
    assert_level(sender.send(FLOW, 1), 1)


def test_packets_without_payload_are_at_the_top(sender):
    sender.send(FLOW, syn=True)
    for _ in range(20):
        sender.send(FLOW, 1400)
    assert_level(sender.send(FLOW, 1400), 3)
    assert_level(sender.send(FLOW), 0)
    assert_level(sender.send(FLOW, fin=True), 0)
    assert state_of(sender.datapath, FLOW)["level"] == 3


@pytest.mark.parametrize("flags", [{}, {"fin": True}, {"rst": True}, {"syn": True, "rst": True}], ids=str)
def test_only_syn_or_payload_makes_an_entry(sender, flags):
    assert_level(sender.send(FLOW, **flags), 0)
    assert len(sender.datapath.flows()) == 0
    sender.send(flow_key(protocol=17))
    assert len(sender.datapath.flows()) == 0


def test_a_tcp_flow_seen_in_mid_life_stays_on_the_last_level(sender):
    assert_level(sender.send(FLOW, 100), 3)
    assert_level(sender.send(FLOW, 100), 3)
    assert not state_of(sender.datapath, FLOW)["flags"] & FLAG_SAW_START
    assert sender.datapath.counters()["flows_midlife"] == 1


def test_udp_starts_at_the_top_and_sinks(sender):
    key = flow_key(protocol=17)
    assert_level(sender.send(key, 1200), 0)
    assert_level_of(sender, sender.send(key, 1200), 1200)
    assert_level(sender.send(key, 1200), 1)
    assert state_of(sender.datapath, key)["flags"] & FLAG_SAW_START


@owns_its_table
def test_protocols_directions_and_ports_are_flows_of_their_own(sender):
    keys = [
        FLOW,
        flow_key(protocol=17),
        flow_key("10.0.0.2", "10.0.0.1", 80, 40000),
        flow_key(source_port=40001),
        flow_key("2001:db8::1", "2001:db8::2"),
    ]
    for size, key in enumerate(keys, 1):
        sender.send(key, syn=True)
        sender.send(key, size)
    assert [int(state_of(sender.datapath, key)["attained_bytes"]) for key in keys] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("flag", ["fin", "rst"])
def test_end_of_flow(sender, flag):
    sender.send(FLOW, syn=True)
    sender.send(FLOW, 500)
    assert not state_of(sender.datapath, FLOW)["flags"] & FLAG_ENDED
    sender.send(FLOW, 500, **{flag: True})
    ended = state_of(sender.datapath, FLOW)
    assert ended["flags"] & FLAG_ENDED
    assert ended["attained_bytes"] == 1000
    sender.send(FLOW)  # the acknowledgement of the other side's FIN
    assert state_of(sender.datapath, FLOW)["last_seen_ns"] == ended["last_seen_ns"]
    assert ended["last_seen_ns"] > ended["first_seen_ns"]


def test_an_ended_and_forgotten_flow_does_not_come_back_by_an_acknowledgement(sender):
    sender.send(FLOW, syn=True)
    sender.send(FLOW, 500, fin=True)
    assert sender.datapath.forget(sender.datapath.flows().keys) == 1
    sender.send(FLOW)
    sender.send(FLOW, rst=True)
    assert len(sender.datapath.flows()) == 0


@owns_its_table
@pytest.mark.parametrize("ended", [True, False], ids=["ended", "alive"])
def test_a_syn_on_used_ports_starts_afresh_and_is_counted(sender, ended):
    sender.send(FLOW, syn=True)
    first = state_of(sender.datapath, FLOW)
    for _ in range(3):
        sender.send(FLOW, 1000)
    if ended:
        sender.send(FLOW, fin=True)
    assert_level(sender.send(FLOW, syn=True), 0)
    fresh = state_of(sender.datapath, FLOW)
    assert (fresh["attained_bytes"], fresh["flags"] & LIFE, fresh["packets"]) == (0, FLAG_SAW_START, 1)
    assert fresh["first_seen_ns"] > first["first_seen_ns"]
    assert_level(sender.send(FLOW, 1000), 0)
    counters = sender.datapath.counters()
    assert (counters["flows_restarted"], counters["restarted_bytes"]) == (1, 3000)


@owns_its_table
@pytest.mark.parametrize("flag", ["fin", "rst"])
def test_ports_of_a_connection_without_data_are_reused_as_well(sender, flag):
    sender.send(FLOW, syn=True)
    sender.send(FLOW, **{flag: True})
    sender.send(FLOW, syn=True)
    assert state_of(sender.datapath, FLOW)["flags"] & LIFE == FLAG_SAW_START
    assert sender.datapath.counters()["flows_restarted"] == 1


def test_a_retransmitted_syn_is_no_new_flow(sender):
    sender.send(FLOW, syn=True)
    first = state_of(sender.datapath, FLOW)
    sender.send(FLOW, syn=True)
    assert state_of(sender.datapath, FLOW)["first_seen_ns"] == first["first_seen_ns"]
    assert sender.datapath.counters()["flows_restarted"] == 0


@owns_its_table
def test_gso_counts_all_segments(sender):
    sender.send(FLOW, syn=True)
    sender.send(FLOW, 2800, segments=2)
    state = state_of(sender.datapath, FLOW)
    assert (state["attained_bytes"], state["packets"]) == (2800, 3)
    counters = sender.datapath.counters()
    assert (counters["packets_level_0"], counters["bytes_level_0"]) == (3, 2800)


def test_foreign_dscp_is_respected_and_accounted(sender):
    sender.send(FLOW, syn=True)
    left = sender.send(FLOW, 1200, dscp=46)
    assert (left.dscp, left.priority) == (46, None)
    assert state_of(sender.datapath, FLOW)["attained_bytes"] == 1200
    assert sender.datapath.counters()["foreign_dscp"] == 1
    assert_level_of(sender, sender.send(FLOW, 1200, dscp=DSCP[2]), 1200)


def test_foreign_dscp_is_overwritten_where_asked(sender):
    sender.datapath.apply(Settings(Thresholds(THRESHOLDS), DSCP, PRIORITY, respect_dscp=False))
    assert_level(sender.send(FLOW, syn=True, dscp=46), 0)
    assert sender.datapath.counters()["foreign_dscp"] == 0


@owns_its_table
def test_observe_mode_computes_and_counts_everything_and_changes_no_packet(sender):
    watched = Settings(Thresholds(THRESHOLDS), DSCP, PRIORITY, observe=True)
    sender.datapath.apply(watched)
    assert sender.datapath.settings() == watched
    sender.send(FLOW, syn=True)
    for dscp in (0, DSCP[2]):
        left = sender.send(FLOW, 1200, dscp=dscp)
        assert (left.dscp, left.priority) == (dscp, None)
    state = state_of(sender.datapath, FLOW)
    assert (state["attained_bytes"], state["level"]) == (2400, 1)
    counters = sender.datapath.counters()
    assert counters["observed"] == 3
    assert (counters["bytes_level_0"], counters["bytes_level_1"]) == (1200, 1200)
    sender.datapath.apply(SETTINGS)
    assert_level(sender.send(FLOW, 1200), 1)


def test_new_settings_hold_from_the_next_packet(sender):
    sender.send(FLOW, syn=True)
    sender.send(FLOW, 600)
    assert_level(sender.send(FLOW, 100), 0)
    other = Settings(Thresholds((300,)), (10, 12), (7, 8))
    for wanted in (other, SETTINGS, other):
        sender.datapath.apply(wanted)
        assert sender.datapath.settings() == wanted
    sender.send(FLOW, 1200)
    left = sender.send(FLOW, 100)
    assert (left.dscp, left.priority) == (12, 8)


def test_forget_says_how_many_were_there(sender):
    keys = np.stack([flow_key(source_port=port) for port in range(2000, 2050)])
    for key in keys[::2]:
        sender.send(key, syn=True)
    assert sender.datapath.forget(keys) == 25
    assert sender.datapath.forget(keys) == 0
    assert sender.datapath.forget(keys[:0]) == 0
    counters = sender.datapath.counters()
    assert (counters["flows_inserted"], counters["flows_forgotten"], counters["flows_evicted"]) == (25, 25, 0)


GAP_NS = 120_000_000  # a busy machine does not stop a test for so long between two packets
PAUSE_S = 0.3  # longer than the gap, and than twice of it, by some ticks
SHORT_GAP = MessageRule(blind_gap_ns=GAP_NS, starved_ns=0)
BY_MESSAGE = replace(SETTINGS, messages=SHORT_GAP)


@pytest.mark.parametrize("protocol", [6, 17])
@owns_its_table
def test_a_silent_flow_begins_a_new_message_at_the_top(sender, protocol):
    key = flow_key(protocol=protocol)
    sender.datapath.apply(BY_MESSAGE)
    sender.send(key, syn=protocol == 6)
    for level in (0, 1):
        assert_level(sender.send(key, 2000), level)
    time.sleep(PAUSE_S)
    assert_level(sender.send(key), 0)  # an acknowledgement of what the other side sends breaks no silence
    assert_level(sender.send(key, 2000), 0)
    assert_level(sender.send(key, 2000), 1)
    state = state_of(sender.datapath, key)
    assert (state["attained_bytes"], state["earlier_bytes"], state["last_message_bytes"]) == (4000, 4000, 4000)
    assert state["message_began_ns"] - state["first_seen_ns"] > 0.9e9 * PAUSE_S
    finished = sender.datapath.finished_messages()
    assert LogHistogram(finished.sizes).sparse() == LogHistogram.of([4000]).sparse()
    assert finished.durations.sum() == sender.datapath.counters()["messages_finished"] == 1


@owns_its_table
def test_a_flow_seen_in_mid_life_is_known_from_its_next_message_on(sender):
    sender.datapath.apply(BY_MESSAGE)
    assert_level(sender.send(FLOW, 100), 3)
    time.sleep(PAUSE_S)
    assert_level(sender.send(FLOW, 100), 0)
    assert sender.datapath.finished_messages().sizes.sum() == 0  # what was before it has no size


@owns_its_table
def test_an_ended_flow_begins_no_message(sender):
    sender.datapath.apply(BY_MESSAGE)
    sender.send(FLOW, syn=True)
    sender.send(FLOW, 3000, segments=4)
    sender.send(FLOW, 3000, segments=4, fin=True)
    time.sleep(PAUSE_S)
    sender.send(FLOW, 1400)
    assert state_of(sender.datapath, FLOW)["attained_bytes"] == 7400


@owns_its_table
def test_what_is_sent_again_is_ranked_like_everything_else(sender):
    sender.send(FLOW, syn=True)
    for _ in range(4):
        sender.send(FLOW, 1400)
    assert_level(sender.send(FLOW, 1400, repeated=True), 2)
    assert_level(sender.send(FLOW, 1400), 2)


@owns_its_table
def test_a_starved_flow_gets_a_bounded_turn(sender):
    rule = MessageRule(blind_gap_ns=10**12, starved_ns=GAP_NS, turn_bytes=3000)
    sender.datapath.apply(replace(SETTINGS, messages=rule))
    sender.send(FLOW, syn=True)
    for _ in range(20):
        sender.send(FLOW, 1400)
    for _ in range(2):
        assert_level(sender.send(FLOW, 1400), 3)
        time.sleep(PAUSE_S)
        for level in (0, 0, 0, 3, 3):  # 3,000 bytes, to within a packet
            assert_level(sender.send(FLOW, 1400), level)
    assert sender.datapath.counters()["turns"] == 2
    assert state_of(sender.datapath, FLOW)["attained_bytes"] == 32 * 1400
    sender.datapath.apply(replace(SETTINGS, messages=MessageRule(blind_gap_ns=10**12, starved_ns=0)))
    time.sleep(PAUSE_S)
    assert_level(sender.send(FLOW, 1400), 3)


@owns_its_table
def test_starved_flows_do_not_come_back_at_once(sender):
    """Each waits one to two times as long, drawn from when it was first seen."""
    wait_ns, step_ns = 400_000_000, 400_000_000 >> 8
    rule = MessageRule(blind_gap_ns=10**12, starved_ns=wait_ns, turn_bytes=3000)
    sender.datapath.apply(replace(SETTINGS, messages=rule))
    keys = [flow_key(source_port=port) for port in range(1000, 1040)]
    for key in keys:
        sender.send(key, 100)
    before = [state_of(sender.datapath, key) for key in keys]
    time.sleep(0.5)
    draws = set()
    for key, first in zip(keys, before, strict=True):
        sender.send(key, 100)
        state = state_of(sender.datapath, key)
        draw = int(first["first_seen_ns"]) >> 10 & 0xFF
        silent_ns = int(state["last_data_ns"]) - int(first["last_data_ns"])
        if abs(silent_ns - wait_ns - step_ns * draw) > 2e6:  # the fake reads its clock twice
            assert bool(int(state["flags"]) & FLAG_TURN) == (silent_ns >= wait_ns + step_ns * draw)
        draws.add(draw)
    assert len(draws) > 20


def test_counters_have_fixed_names(sender):
    assert tuple(sender.datapath.counters())[: len(counter_names(4))] == counter_names(4)


def test_times_are_of_the_monotonic_clock(sender):
    sender.send(FLOW, 100)
    table = sender.datapath.flows()
    assert 0 <= table.read_at_ns - int(table.states["first_seen_ns"][0]) < 10e9


SCRIPT = st.lists(
    st.tuples(
        st.integers(0, 3),  # flow
        st.sampled_from([0, 1, 999, 1000, 1400, 2800]),  # payload
        st.sampled_from(
            [
                {},
                {"syn": True},
                {"fin": True},
                {"rst": True},
                {"segments": 2},
                {"dscp": 46},
                {"dscp": 8},
                {"repeated": True},
            ]
        ),
    ),
    max_size=60,
)


@pytest.mark.kernel
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root (CAP_BPF)")
def test_fake_and_kernel_agree_on_any_sequence(kernel_sender):
    kernel = kernel_sender
    keys = [FLOW, flow_key(protocol=17), flow_key("2001:db8::1", "2001:db8::2"), flow_key(source_port=50000)]

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(SCRIPT)
    def check(script):
        fake = FakeSender()
        kernel.reset()
        for one in (kernel, fake):
            one.datapath.apply(replace(SETTINGS, messages=MessageRule(blind_gap_ns=10**12, starved_ns=0)))
        for flow, payload, flags in script:
            real, expected = (one.send(keys[flow], payload, **flags) for one in (kernel, fake))
            assert (real.dscp, real.priority) == (expected.dscp, expected.priority)
        assert kernel.datapath.counters() == fake.datapath.counters()
        for key in keys:
            real, expected = (state_of(one.datapath, key) for one in (kernel, fake))
            assert (real is None) == (expected is None)
            if real is not None:
                for field in ("attained_bytes", "packets", "level", "flags"):
                    assert real[field] == expected[field], field

    check()
