"""The flow table in the kernel: what is entered is found and read once, who makes room for whom, and who leaves."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from datapath_kit import KernelSender, bpf_file_system, build_frame, elements, flow_key, start_agent

from fabricpilot.levels import Thresholds
from hostagent.datapath import bpf_syscall as bpf
from hostagent.datapath.base import FLOW_KEY_DTYPE, Settings
from hostagent.datapath.flow_table import BUCKET_DTYPE, BUCKET_FLOWS, HASH_DTYPE, TAGS_DTYPE

SETTINGS = Settings(Thresholds((10**6,)), (8, 16), (1, 2))
PLACES = 64
SOURCE_PORT = slice(34, 36)


@pytest.fixture(scope="module")
def of_eight_buckets(tmp_path_factory) -> Iterator[KernelSender]:
    with bpf_file_system(tmp_path_factory.mktemp("small")) as root:
        sender = KernelSender(root / "fabricpilot", PLACES)
        try:
            yield sender
        finally:
            sender.close()


@pytest.fixture
def small(of_eight_buckets) -> KernelSender:
    """A table of eight buckets, hashed the same way each time."""
    of_eight_buckets.reset()
    of_eight_buckets.datapath.apply(SETTINGS)
    secret = np.random.default_rng(2).integers(0, 2**32, 10, np.uint32)
    bpf.update(of_eight_buckets.datapath.map_fd("flow_hash"), np.zeros(1, np.uint32), secret)
    return of_eight_buckets


@pytest.fixture
def sender(kernel_sender) -> KernelSender:
    """A table of 4,096 places."""
    kernel_sender.datapath.apply(SETTINGS)
    return kernel_sender


def datagram(port: int, payload_bytes: int = 10) -> bytes:
    """Of a flow of its own; its checksum is left to the NIC."""
    frame = DATAGRAMS.setdefault(payload_bytes, build_frame(flow_key(protocol=17), payload_bytes))
    return frame[: SOURCE_PORT.start] + port.to_bytes(2, "big") + frame[SOURCE_PORT.stop :]


DATAGRAMS: dict[int, bytes] = {}


def ports(sender: KernelSender) -> list[int]:
    return sorted(sender.datapath.flows().keys["source_port"].tolist())


def hash_of(keys: np.ndarray, secret: np.ndarray) -> np.ndarray:
    """The kernel's hash, told once more: NH of RFC 4418 on 32-bit words, and a mixing step."""
    words, secret = keys.view("<u4").reshape(len(keys), -1), secret["secret"][0]
    with np.errstate(over="ignore"):
        halves = (words + secret).astype(np.uint64)
        total = (halves[:, ::2] * halves[:, 1::2]).sum(axis=1, dtype=np.uint64)
        total ^= total >> np.uint64(32)
        total *= np.uint64(0x9E3779B97F4A7C15)
    return total ^ total >> np.uint64(29)


def bucket_of(half: np.ndarray, buckets: int) -> np.ndarray:
    return (half * np.uint64(buckets)) >> np.uint64(32)


def test_flows_are_where_their_hash_says(sender):
    """The first in a bucket at home, all in one of their two, under their tag; addresses of both versions."""
    rng = np.random.default_rng(1)
    for number in range(400):
        version = rng.choice((4, 6))
        source = f"10.{number >> 8}.{number & 255}.1" if version == 4 else f"2001:db8::{number:x}"
        destination = "10.9.9.9" if version == 4 else "2001:db8:1::1"
        key = flow_key(source, destination, int(rng.integers(1, 2**16)), 80, int(rng.choice((6, 17))))
        sender.send(key, 100, syn=bool(key["protocol"] == 6))
    buckets = 4096 // BUCKET_FLOWS
    tags = elements(sender.datapath, "flow_tags", TAGS_DTYPE)["tags"]
    flows = elements(sender.datapath, "flows", BUCKET_DTYPE)["flow"]
    secret = elements(sender.datapath, "flow_hash", HASH_DTYPE)
    assert len(set(secret["secret"][0].tolist())) > 1
    assert np.count_nonzero(tags) == 400
    bucket, way = np.nonzero(tags)
    hashes = hash_of(np.ascontiguousarray(flows["key"][bucket, way]), secret)
    low, high = hashes & np.uint64(2**32 - 1), hashes >> np.uint64(32)
    assert (bucket_of(low, buckets) == bucket).all()  # no bucket of this table is full
    assert (tags[bucket, way] == ((low ^ high) & np.uint64(127) | np.uint64(128))).all()
    home = hashes >> np.uint64(7) & np.uint64(7)
    alone = np.bincount(bucket, minlength=buckets)[bucket] == 1
    assert (home == way)[alone].all()
    assert alone.any()
    assert 300 < np.count_nonzero(home == way) < 400


def test_a_table_takes_nearly_as_many_flows_as_it_has_places(sender):
    for port in range(1, 3001):
        sender.run(datagram(port))
    counters = sender.datapath.counters()
    assert counters["flows_inserted"] == 3000
    assert counters["flows_evicted"] <= 80  # 25 on average
    assert len(sender.datapath.flows()) == 3000 - counters["flows_evicted"]


def test_a_full_table_makes_room_for_every_new_flow(small):
    """Which is found from its second packet on; nothing fails and nothing is counted twice."""
    for port in range(1, 1001):
        assert small.run(datagram(port)).dscp == 8
        assert port % 10 or port in ports(small)
    table, counters = small.datapath.flows(), small.datapath.counters()
    assert len(table) == PLACES
    assert (counters["flows_inserted"], counters["flows_evicted"]) == (1000, 1000 - PLACES)
    assert counters["packets_level_0"] == 1000


def test_flows_of_one_packet_make_room_before_those_under_way(small):
    """24 flows with a second packet in 64 places: no bucket and its second are full of them."""
    for port in [*range(1, 25)] * 2:
        small.run(datagram(port))
    for port in range(1000, 3000):
        small.run(datagram(port))
    assert set(range(1, 25)) <= set(ports(small))
    assert len(ports(small)) == PLACES


def test_flows_that_ended_make_room_before_those_that_go_on(small):
    going, ended, newcomers = range(1, 13), range(101, 201), range(1000, 1020)
    for port in (*going, *ended):
        key = flow_key(source_port=port)
        small.send(key, syn=True)
        small.send(key, 10)
        if port in ended:
            small.send(key, fin=True)
    for port in newcomers:
        small.run(datagram(port))
        small.run(datagram(port))
    present = set(ports(small))
    assert len(present) == PLACES
    assert {*going, *newcomers} <= present


def test_the_longest_silent_makes_room_first(small):
    """All have sent two packets; half of them once more, when the clock of UDP flows (the timer's) has moved on."""
    silent, recent, newcomers = range(1, 21), range(101, 121), range(1000, 1028)
    for port in [*silent, *recent] * 2:
        small.run(datagram(port))
    assert small.datapath.counters()["flows_evicted"] == 0
    time.sleep(0.05)
    for port in recent:
        small.run(datagram(port))
    for port in newcomers:
        small.run(datagram(port))
        small.run(datagram(port))
    present = set(ports(small))
    assert {*recent, *newcomers} <= present
    assert not set(silent) <= present


def test_forget_takes_out_what_is_there_and_nothing_else(sender):
    for port in range(1, 1001):
        sender.run(datagram(port))
    keys = sender.datapath.flows().keys
    some = keys[keys["source_port"] % 3 == 0]
    unknown = some.copy()
    unknown["protocol"] = 6
    assert sender.datapath.forget(np.concatenate([some, unknown, some])) == len(some) == 333
    assert ports(sender) == [port for port in range(1, 1001) if port % 3]
    for port in range(1, 1001):
        sender.run(datagram(port))
    assert ports(sender) == [*range(1, 1001)]
    assert sender.datapath.counters()["flows_inserted"] == 1333
    table = sender.datapath.flows()
    assert set(table.states["packets"][table.keys["source_port"] % 3 == 0].tolist()) == {1}
    assert sender.datapath.forget(np.zeros(0, FLOW_KEY_DTYPE)) == 0


def test_the_first_packets_of_a_flow_on_two_cpus_enter_it_once(sender):
    program = bpf.obj_get(sender.pin_dir / "egress")
    flows = 800  # few enough that none has to make room
    barrier = threading.Barrier(2)

    def send() -> None:
        for port in range(1, flows + 1):
            barrier.wait()
            bpf.prog_test_run(program, datagram(port, 100))

    both = [threading.Thread(target=send) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    table, counters = sender.datapath.flows(), sender.datapath.counters()
    assert sorted(table.keys["source_port"].tolist()) == [*range(1, flows + 1)]
    assert set(table.states["packets"].tolist()) == {2}
    assert set(table.states["attained_bytes"].tolist()) == {200}
    assert counters["flows_inserted"] == flows


def test_reading_while_flows_come_and_go_tears_none_and_misses_none_that_stays(small):
    """Each flow's bytes follow from its port, so a key with another flow's state shows."""
    program = bpf.obj_get(small.pin_dir / "egress")
    staying = range(60_001, 60_005)
    passing = range(1, 60_001)  # none sends a second packet before it has gone
    sizes = {port: 10 + port % 7 for port in (*staying, *passing)}
    for port in [*staying] * 2:
        bpf.prog_test_run(program, datagram(port, sizes[port]))
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            for port in passing:
                if stop.is_set():
                    break
                bpf.prog_test_run(program, datagram(port, sizes[port]))

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        while small.datapath.counters()["flows_evicted"] < 5000:
            table = small.datapath.flows()
            seen = table.keys["source_port"].tolist()
            assert set(staying) <= set(seen)
            for port, state in zip(seen, table.states, strict=True):
                assert int(state["attained_bytes"]) == sizes[port] * int(state["packets"]), port
    finally:
        stop.set()
        thread.join()


def test_processes_that_read_at_once_read_all(sender):
    """The kernel keeps one place in the table for whoever reads."""
    for port in range(1, 801):
        sender.run(datagram(port))
    code = """
import sys, time
from pathlib import Path
from hostagent.datapath.ebpf import EbpfDatapath
datapath = EbpfDatapath(Path(sys.argv[1]), 4096)
until = time.monotonic() + 1
while time.monotonic() < until:
    assert len({key.tobytes() for key in datapath.flows().keys}) == 800
"""
    readers = [start_agent(code, str(sender.pin_dir)) for _ in range(2)]
    assert [reader.wait(30) for reader in readers] == [0, 0]
