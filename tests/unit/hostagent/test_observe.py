"""Sorting a read of the flow table into finished, long and the rest."""

import numpy as np
import pytest

from fabricpilot.histogram import LogHistogram
from fabricpilot.wire import MAX_FINISHED_SAMPLE, MAX_LONG_FLOWS
from hostagent.datapath.base import FLAG_ENDED as ENDED
from hostagent.datapath.base import FLAG_SAW_MESSAGE, FLOW_KEY_DTYPE, FLOW_STATE_DTYPE, FinishedMessages, FlowTable
from hostagent.datapath.base import FLAG_SAW_START as STARTED
from hostagent.observe import address, observe, summary

SECOND = 10**9
NOW = 1000 * SECOND


def table(*flows, protocol=6):
    """A flow table from (attained_bytes, silent_s, flags) triples; ports count up from 1."""
    keys = np.zeros(len(flows), FLOW_KEY_DTYPE)
    states = np.zeros(len(flows), FLOW_STATE_DTYPE)
    keys["source"] = np.frombuffer(bytes(10) + b"\xff\xff" + bytes([10, 0, 0, 1]), "u1")
    keys["source_port"] = np.arange(1, len(flows) + 1)
    keys["protocol"] = protocol
    for row, (attained, silent_s, flags) in enumerate(flows):
        last = NOW - int(silent_s * SECOND)
        fields = ("attained_bytes", "packets", "first_seen_ns", "last_seen_ns", "flags")
        for field, value in zip(fields, (attained, 1, last - 5_000_000, last, flags), strict=True):
            states[row][field] = value
    return FlowTable(keys, states, NOW)


def test_ended_and_idle_flows_have_finished():
    seen = observe(table((500, 1, STARTED | ENDED), (900, 31, STARTED), (700, 29, STARTED), protocol=17), 10_000, 30)
    assert list(seen.finished) == [0, 1]
    assert seen.active == 1


def test_an_ended_flow_is_told_once_and_forgotten_later():
    ended = (500, 1, STARTED | ENDED)
    assert observe(table(ended), 10_000, 30, NOW - 2 * SECOND).finished_count() == 1
    assert observe(table(ended), 10_000, 30, NOW - SECOND).finished_count() == 0
    assert len(observe(table(ended), 10_000, 30).leaving_keys) == 0
    lingered = observe(table((500, 6, STARTED | ENDED)), 10_000, 30, NOW - SECOND)
    assert (lingered.finished_count(), list(lingered.leaving_keys["source_port"])) == (0, [1])


def test_an_end_stamped_after_the_read_began_belongs_to_the_next():
    just = table((500, -0.001, STARTED | ENDED))
    assert observe(just, 10_000, 30, NOW - SECOND).finished_count() == 0
    later = FlowTable(just.keys, just.states, NOW + SECOND)
    assert observe(later, 10_000, 30, NOW).finished_count() == 1


def test_an_idle_flow_is_told_and_forgotten_at_once():
    seen = observe(table((900, 31, STARTED), protocol=17), 10_000, 30, NOW - SECOND)
    assert (seen.finished_count(), len(seen.leaving_keys)) == (1, 1)


@pytest.mark.parametrize("unmeasured", [(0, 1, STARTED | ENDED), (9000, 1, ENDED)], ids=["no payload", "mid-life"])
def test_a_flow_of_unknown_size_is_forgotten_but_not_told(unmeasured):
    seen = observe(table(unmeasured, (10, 1, STARTED | ENDED)), 10_000, 30)
    assert len(seen.finished) == 2
    assert seen.finished_count() == seen.sizes().total == seen.durations().total == 1
    assert [flow.size_bytes for flow in seen.finished_sample(np.random.default_rng(1))] == [10]


def test_a_connection_that_never_sent_leaves_after_one_idle_timeout():
    """What a SYN flood leaves behind."""
    seen = observe(table((0, 29, STARTED), (0, 31, STARTED), (1, 31, STARTED)), 10_000, 30)
    assert list(seen.leaving) == [1]
    assert seen.finished_count() == 0


def test_an_idle_connection_stays_in_the_table_for_its_next_message_but_is_not_active():
    seen = observe(table((50_000, 31, 0), (60_000, 299, 0), (70_000, 301, 0), (80_000, 29, 0)), 10_000, 30)
    assert list(seen.finished) == list(seen.leaving) == [2]
    assert (seen.active, list(seen.long)) == (1, [3])


def test_a_message_whose_start_was_seen_has_a_size_even_if_the_flow_was_not_seen_from_its_start():
    seen = observe(table((500, 1, STARTED | ENDED), (900, 1, ENDED), (300, 1, FLAG_SAW_MESSAGE | ENDED)), 10_000, 30)
    assert seen.sizes().sparse() == LogHistogram.of([500, 300]).sparse()


def test_messages_of_persistent_connections_are_told_once():
    read = table((700, 1, 0), (800, 1, 0))
    read.states["last_message_bytes"] = 4000
    read.states["last_message_ns"] = 2_000_000
    read.states["message_began_ns"] = [NOW - 3 * SECOND, NOW - SECOND]  # the first was told in the report before
    kernel = FinishedMessages(LogHistogram.of([4000, 90]).counts, LogHistogram.of([2000, 10]).counts)
    seen = observe(read, 10_000, 30, NOW - 2 * SECOND, kernel)
    assert seen.finished_count() == 2
    assert seen.sizes().sparse() == LogHistogram.of([4000, 90]).sparse()
    assert seen.durations().sparse() == LogHistogram.of([2000, 10]).sparse()
    sample = seen.finished_sample(np.random.default_rng(1))
    assert [(flow.source_port, flow.size_bytes, flow.duration_us) for flow in sample] == [(2, 4000, 2000)]


def test_messages_since_the_read_before_also_after_counting_began_anew():
    before = FinishedMessages(LogHistogram.of([10, 10]).counts, LogHistogram.of([5, 5]).counts)
    after = FinishedMessages(LogHistogram.of([10, 10, 70]).counts, LogHistogram.of([5, 5, 9]).counts)
    assert LogHistogram(after.since(before).sizes).sparse() == LogHistogram.of([70]).sparse()
    assert before.since(after) is before


def test_a_late_fin_does_not_make_a_message_long():
    read = table((500, 1, STARTED | ENDED))
    read.states["message_began_ns"] = read.states["first_seen_ns"]
    read.states["last_data_ns"] = read.states["message_began_ns"] + 7000
    assert observe(read, 10_000, 30).durations().sparse() == LogHistogram.of([7]).sparse()


def test_long_flows_come_largest_first_and_an_ended_one_is_not_long():
    seen = observe(table((10_000, 1, 0), (9_999, 1, 0), (50_000, 1, 0), (90_000, 1, ENDED)), 10_000, 30)
    assert [flow.size_bytes for flow in seen.long_flows()] == [50_000, 10_000]


def test_what_travels_is_bounded():
    many = MAX_LONG_FLOWS + 300
    ended = [(5, 1, STARTED | ENDED)] * 500
    seen = observe(table(*[(20_000 + i, 1, STARTED) for i in range(many)], *ended), 10_000, 30)
    assert len(seen.long_flows()) == MAX_LONG_FLOWS
    assert len(seen.long) == many
    assert len(seen.finished_sample(np.random.default_rng(1))) == MAX_FINISHED_SAMPLE


def test_a_packet_stamped_after_the_read_is_not_idle():
    seen = observe(table((500, -1, STARTED)), 10_000, 30)
    assert seen.active == 1


def test_empty_table():
    seen = observe(table(), 10_000, 30)
    assert (seen.active, seen.finished_count(), seen.long_flows()) == (0, 0, [])


def test_summary_tells_addresses_and_microseconds():
    flow = summary(table((500, 1, 0)), 0)
    assert (flow.source, flow.source_port, flow.duration_us, flow.size_bytes) == ("10.0.0.1", 1, 5000, 500)


@pytest.mark.parametrize("text", ["10.1.2.3", "fd00::1", "::1"])
def test_addresses(text):
    import ipaddress

    ip = ipaddress.ip_address(text)
    raw = ip.packed if ip.version == 6 else bytes(10) + b"\xff\xff" + ip.packed
    assert address(raw) == text
