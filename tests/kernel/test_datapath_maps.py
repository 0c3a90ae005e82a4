"""The flow table read and emptied in batches while it changes; settings that never tear."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from datapath_kit import build_frame, flow_key, start_agent

from fabricpilot.levels import Thresholds
from hostagent.datapath import bpf_syscall as bpf
from hostagent.datapath.base import FLOW_KEY_DTYPE, FLOW_STATE_DTYPE, Settings
from hostagent.datapath.layout import pack_settings


@contextmanager
def flow_map(kind: int, entries: int) -> Iterator[int]:
    fd = bpf.map_create(kind, FLOW_KEY_DTYPE.itemsize, FLOW_STATE_DTYPE.itemsize, entries, "fp_test")
    try:
        yield fd
    finally:
        os.close(fd)


def some_keys(count: int) -> np.ndarray:
    keys = np.zeros(count, FLOW_KEY_DTYPE)
    keys["source"] = np.frombuffer(bytes(10) + b"\xff\xff\x0a\0\0\x01", np.uint8)
    keys["destination"][:, 12:] = np.arange(count, dtype=">u4").view(np.uint8).reshape(-1, 4)
    keys["protocol"] = 6
    return keys


def fill(fd: int, keys: np.ndarray) -> None:
    state = np.zeros(1, FLOW_STATE_DTYPE)
    for row in range(len(keys)):
        state["attained_bytes"] = row
        bpf.update(fd, keys[row : row + 1], state)


@pytest.mark.parametrize("kind", [bpf.MAP_TYPE_HASH, bpf.MAP_TYPE_LRU_HASH], ids=["hash", "lru"])
@pytest.mark.parametrize("expected", [0, 5000, 100_000])
def test_every_entry_is_read_once_whatever_was_expected(kind, expected):
    with flow_map(kind, 8192) as fd:
        keys = some_keys(5000)
        fill(fd, keys)
        read, states = bpf.lookup_all(fd, FLOW_KEY_DTYPE, FLOW_STATE_DTYPE, expected)
        rows = states["attained_bytes"].astype(int)
        assert sorted(rows) == list(range(5000))
        assert (read == keys[rows]).all()


def test_a_bucket_larger_than_the_room_left(monkeypatch):
    # Two buckets for 64 entries: each holds far more than the single entry there is room for at first.
    monkeypatch.setattr(bpf, "_MAX_BATCH", 1)
    with flow_map(bpf.MAP_TYPE_HASH, 2) as fd:
        keys = some_keys(2)
        fill(fd, keys)
        assert len(bpf.lookup_all(fd, FLOW_KEY_DTYPE, FLOW_STATE_DTYPE, 0)[0]) == 2
    with flow_map(bpf.MAP_TYPE_HASH, 4096) as fd:
        keys = some_keys(4096)  # as full as it gets: some buckets hold several
        fill(fd, keys)
        read, _ = bpf.lookup_all(fd, FLOW_KEY_DTYPE, FLOW_STATE_DTYPE, 0)
        assert len({key.tobytes() for key in read}) == len(read) == 4096


def test_empty_map():
    with flow_map(bpf.MAP_TYPE_LRU_HASH, 1024) as fd:
        assert len(bpf.lookup_all(fd, FLOW_KEY_DTYPE, FLOW_STATE_DTYPE, 0)[0]) == 0
        assert bpf.delete_all(fd, some_keys(10)) == 0


def test_delete_skips_what_is_not_there():
    with flow_map(bpf.MAP_TYPE_LRU_HASH, 8192) as fd:
        keys = some_keys(3000)
        fill(fd, keys[::3])
        assert bpf.delete_all(fd, keys) == 1000
        assert len(bpf.lookup_all(fd, FLOW_KEY_DTYPE, FLOW_STATE_DTYPE, 0)[0]) == 0


def test_reading_while_entries_come_and_go_doubles_none_and_misses_none_that_stays():
    with flow_map(bpf.MAP_TYPE_LRU_HASH, 16_384) as fd:
        keys = some_keys(4000)
        staying, changing = keys[:2000], keys[2000:]
        fill(fd, staying)
        stop = threading.Event()

        def churn() -> None:
            while not stop.is_set():
                fill(fd, changing)
                bpf.delete_all(fd, changing)

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            until = time.monotonic() + 1.0
            while time.monotonic() < until:
                read, _ = bpf.lookup_all(fd, FLOW_KEY_DTYPE, FLOW_STATE_DTYPE, 0)
                seen = {key.tobytes() for key in read}
                assert len(seen) == len(read)
                assert {key.tobytes() for key in staying} <= seen
        finally:
            stop.set()
            thread.join()


def test_evictions_are_counted(kernel_sender):
    frame = bytearray(build_frame(flow_key(protocol=17), 10))
    for port in range(1, 6001):  # the table has 4096 entries
        frame[34:36] = port.to_bytes(2, "big")
        kernel_sender.run(bytes(frame))
    table = kernel_sender.datapath.flows()
    counters = kernel_sender.datapath.counters()
    assert counters["flows_inserted"] == 6000
    assert counters["flows_evicted"] == 6000 - len(table) >= 6000 - 4096
    assert len(table) > 0.95 * 4096  # full but for a bucket or two that nobody chose so far


def test_settings_never_tear(kernel_sender):
    """Two agents' worth of changes against packets on another CPU: every mark is of one vector or the other."""
    vectors = [
        Settings(Thresholds((1, 2, 3)), (32, 24, 16, 8), (1, 2, 3, 4)),
        Settings(Thresholds((1, 2, 3)), (33, 25, 17, 9), (11, 12, 13, 14)),
    ]
    kernel_sender.datapath.apply(vectors[0])
    pairs = {pair for vector in vectors for pair in zip(vector.dscp, vector.priority, strict=True)}
    changes, stop = 0, threading.Event()

    def change() -> None:
        nonlocal changes
        while not stop.is_set():
            kernel_sender.datapath.apply(vectors[(changes + 1) % 2])
            changes += 1

    thread = threading.Thread(target=change)
    thread.start()
    seen = set()
    try:
        frame = build_frame(flow_key(protocol=17), 10)
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            left = kernel_sender.run(frame)
            seen.add((left.dscp, left.priority))
    finally:
        stop.set()
        thread.join()
    assert changes > 20
    assert seen <= pairs
    assert {priority > 4 for _, priority in seen} == {True, False}  # both vectors were met


def test_a_slot_is_filled_only_when_no_packet_can_be_reading_it(kernel_sender, monkeypatch):
    """The order of an update: grace period, the slot that is not in force, then the index."""
    datapath = kernel_sender.datapath
    datapath.apply(Settings(Thresholds((1000,)), (8, 16), (1, 2)))
    events = []
    update, wait = bpf.update, bpf.wait_for_running_programs
    names = {fd: name for name, fd in datapath._pins.maps.items()}

    def spied_update(fd, key, value):
        names.update({fd: name for name, fd in datapath._pins.maps.items()})
        events.append((names[fd], int(key[0]), value.copy()))
        update(fd, key, value)

    monkeypatch.setattr(bpf, "update", spied_update)
    monkeypatch.setattr(bpf, "wait_for_running_programs", lambda: (events.append(("grace",)), wait()))
    before = datapath._active_index(datapath._pins)
    wanted = Settings(Thresholds((5000,)), (8, 16), (1, 2))
    datapath.apply(wanted)
    assert [event[0] for event in events] == ["grace", "slots", "active"]
    assert events[1][1] == before ^ 1
    assert events[1][2].tobytes() == pack_settings(wanted).tobytes()
    assert int(events[2][2][0]) == before ^ 1
    events.clear()
    datapath.apply(wanted)
    assert events == []  # nothing to do: idempotent


def test_grace_period_also_without_membarrier(monkeypatch):
    class Refusing:
        def __getattr__(self, name):
            return getattr(real, name)

        def syscall(self, number, *arguments):
            return -1 if number == 324 else real.syscall(number, *arguments)

    real = bpf._libc
    monkeypatch.setattr(bpf, "_libc", Refusing())
    bpf.wait_for_running_programs()


def test_agent_memory_after_adopting(kernel_sender):
    kernel_sender.datapath.apply(Settings(Thresholds((1000,)), (8, 16), (1, 2)))
    code = """
import sys
from pathlib import Path
from hostagent.datapath.ebpf import EbpfDatapath
datapath = EbpfDatapath(Path(sys.argv[1]), 4096)
assert datapath.adopted
datapath.attached(), datapath.settings(), datapath.flows(), datapath.counters()
assert not {"bcc", "torch", "scipy", "numba"} & set(sys.modules)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")), flush=True)
"""
    agent = start_agent(code, str(kernel_sender.pin_dir))
    said, _ = agent.communicate(timeout=30)
    assert agent.returncode == 0
    assert int(said) < 60_000  # KiB; bcc alone would be 74 MB more
