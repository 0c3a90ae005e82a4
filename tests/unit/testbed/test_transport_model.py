"""The RFC's model by hand-computed numbers, and what the marker's numbers mean. No root."""

import socket
import threading
import time

import pytest

from fabricpilot.errors import UsageError
from testbed.transport.bulk import BulkFlow
from testbed.transport.compare import jain_index
from testbed.transport.counters import BINS, MarkerStats
from testbed.transport.marker import attach_marker, classes_of_bands, recommended_k_bytes
from testbed.transport.rfc8257 import CongestionEstimate, after, reduced_window


def test_alpha_moves_by_one_sixteenth_of_the_difference_per_window():
    estimate = CongestionEstimate(window_end=1000, snd_una=1000)
    assert estimate.acknowledge(ack=2000, ece=False, snd_nxt=5000)  # the first ACK ends the empty window
    assert estimate.alpha == 15 / 16
    assert not estimate.acknowledge(ack=3000, ece=True, snd_nxt=6000)
    assert not estimate.acknowledge(ack=5000, ece=False, snd_nxt=9000)  # equal to WindowEnd: not yet
    assert estimate.acknowledge(ack=6000, ece=False, snd_nxt=9000)
    assert estimate.alpha == pytest.approx(15 / 16 * 15 / 16 + 1 / 16 * 1000 / 4000)
    assert (estimate.window_end, estimate.bytes_acked, estimate.bytes_marked) == (9000, 0, 0)


def test_sequence_numbers_wrap():
    estimate = CongestionEstimate(window_end=2**32 - 100, snd_una=2**32 - 200)
    assert estimate.acknowledge(ack=50, ece=True, snd_nxt=1000)
    assert estimate.alpha == 1.0
    assert after(50, 2**32 - 100)
    assert not after(50, 50)


def test_window_after_marks():
    assert reduced_window(20, 1.0) == 10
    assert reduced_window(20, 0.0) == 20
    assert reduced_window(20, 0.1) == pytest.approx(19)


def test_jain_index():
    assert jain_index([5, 5]) == 1
    assert jain_index([1, 0, 0, 0]) == 0.25
    assert jain_index([]) == 0


def marker_stats(packets=0, queue_bytes_sum=0, bins=None, **others):
    empty = {"bytes": 0, "marked": 0, "not_capable": 0, "no_queue": 0, "queue_bytes_max": 0}
    counts = [0] * BINS
    for number, count in (bins or {}).items():
        counts[number] = count
    given = empty | others | {"packets": packets, "queue_bytes_sum": queue_bytes_sum, "bins": tuple(counts)}
    return MarkerStats(bin_bytes=100, **given)


def test_marker_statistics():
    stats = marker_stats(packets=12, no_queue=2, queue_bytes_sum=5000, bins={0: 4, 3: 5, BINS - 1: 1})
    assert stats.mean_queue_bytes == 500
    assert [stats.queue_quantile_bytes(q) for q in (0.1, 0.5, 0.9, 1.0)] == [100, 400, 400, BINS * 100]
    later = marker_stats(packets=13, no_queue=2, queue_bytes_sum=5700, bins={0: 4, 3: 5, 7: 1, BINS - 1: 1})
    change = later.since(stats)
    assert (change.packets, change.mean_queue_bytes, change.queue_quantile_bytes(0.5)) == (1, 700, 800)
    assert marker_stats().mean_queue_bytes == marker_stats().queue_quantile_bytes(0.5) == 0


def test_threshold_from_rate_and_round_trip():
    assert recommended_k_bytes(10e9, 100e-6) == round(125_000 / 7)
    assert recommended_k_bytes(100e6, 100e-6) == 5 * 1514


def test_classes_of_a_port_with_bands():
    classes = classes_of_bands([32, 24, 16], major=1)
    assert len(classes) == 64
    assert [classes[dscp] for dscp in (32, 24, 16)] == [0x10001, 0x10002, 0x10003]
    assert classes[56] == 0x10001  # control traffic
    assert classes[0] == classes[46] == 0x10003


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"k_bytes": 0}, "k_bytes = 0"),
        ({"k_bytes": 2**32}, "k_bytes"),
        ({"netns": "no-such-namespace"}, "no network namespace 'no-such-namespace'"),
        ({"interface": "no-such-port"}, "no interface no-such-port"),
        ({"mode": "red"}, "mode = 'red'"),
        ({"mode": "virtual", "class_by_dscp": {0: 0x10001}}, "one per port"),
    ],
)
def test_wrong_arguments_are_named(change, complaint):
    arguments = {"netns": None, "interface": "lo", "k_bytes": 30_000} | change
    with pytest.raises(UsageError, match=complaint), attach_marker(**arguments):
        pass


def test_bulk_flow_ends_when_closed():
    flow = BulkFlow(*socket.socketpair())
    threads = [threading.Thread(target=flow.send), threading.Thread(target=flow.receive)]
    for thread in threads:
        thread.start()
    while flow.received_bytes < 1 << 20:
        time.sleep(0.001)
    flow.close()
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)
