"""Others' programs on the same NIC run as before, and ours runs beside them: clsact filters before and behind, tcx."""

import errno
import logging
import os
import socket
import struct

import numpy as np
import pytest
from datapath_kit import bpf_file_system, in_netns, our_programs, run

from fabricpilot.levels import Thresholds
from hostagent.datapath import bpf_syscall as bpf
from hostagent.datapath.base import Settings
from hostagent.datapath.ebpf import EbpfDatapath

SETTINGS = Settings(Thresholds((1000, 5000, 20000)), (32, 24, 16, 8), (11, 12, 13, 14))
LAST = 0  # of flags of BPF_LINK_CREATE
TCX_NEXT, TCX_PASS = -1, 0
COUNT = 20


class Counter:
    """Somebody's tc program: counts the packets it sees and returns `verdict`."""

    def __init__(self, verdict: int):
        self.map = bpf.map_create(bpf.MAP_TYPE_ARRAY, 4, 8, 1, "theirs")
        instructions = (
            (0x62, 10, 0, -4, 0),  # *(u32 *)(r10 - 4) = 0
            (0x18, 1, 1, 0, self.map),  # r1 = the map
            (0x00, 0, 0, 0, 0),
            (0xBF, 2, 10, 0, 0),  # r2 = r10
            (0x07, 2, 0, 0, -4),  # r2 += -4
            (0x85, 0, 0, 0, 1),  # call bpf_map_lookup_elem
            (0x15, 0, 0, 2, 0),  # if r0 == 0 goto +2
            (0xB7, 1, 0, 0, 1),  # r1 = 1
            (0xDB, 0, 1, 0, 0),  # lock *(u64 *)(r0 + 0) += r1
            (0xB7, 0, 0, 0, verdict),  # r0 = verdict
            (0x95, 0, 0, 0, 0),  # exit
        )
        code = b"".join(
            struct.pack("=BBhi", opcode, source << 4 | target, offset, immediate)
            for opcode, target, source, offset, immediate in instructions
        )
        self.program = bpf.prog_load(bpf.PROG_TYPE_SCHED_CLS, code)

    @property
    def seen(self) -> int:
        value = np.zeros(1, np.uint64)
        bpf.lookup(self.map, np.zeros(1, np.uint32), value)
        return int(value[0])

    def close(self) -> None:
        os.close(self.program)
        os.close(self.map)


@pytest.fixture
def host(make_netns, tmp_path, hook, loaded_once):
    with bpf_file_system(tmp_path / "bpf") as root, in_netns(make_netns("host")):
        run("ip", "link", "add", "nic0", "type", "veth", "peer", "name", "nic1")
        run("ip", "addr", "add", "10.9.1.1/24", "dev", "nic0")
        for nic in ("nic0", "nic1"):
            run("ip", "link", "set", nic, "up")
        run("ip", "neigh", "add", "10.9.1.2", "lladdr", "02:00:00:00:00:02", "dev", "nic0")
        datapath = EbpfDatapath(root / "fabricpilot", 4096, hook)
        yield datapath
        datapath.detach()
        datapath.close()


@pytest.fixture
def counter():
    made = []

    def make(verdict: int) -> Counter:
        made.append(Counter(verdict))
        return made[-1]

    yield make
    for each in made:
        each.close()


def traffic_classes() -> set[int]:
    """Of `COUNT` datagrams sent out of nic0, as they arrive at nic1."""
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)) as tap,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        tap.bind(("nic1", 0x0800))
        tap.settimeout(2)
        sender.connect(("10.9.1.2", 9))
        for _ in range(COUNT):
            sender.send(b"x")
        seen = []
        while len(seen) < COUNT:
            frame = tap.recv(2048)
            if frame[23] == socket.IPPROTO_UDP:
                seen.append(frame[15])
        return set(seen)


def egress() -> str:
    return run("tc", "filter", "show", "dev", "nic0", "egress")


def test_clsact_filters_before_and_behind_ours(host, counter, hook):
    first, last = counter(-1), counter(-1)
    run("tc", "qdisc", "add", "dev", "nic0", "clsact")
    for preference, theirs in ((1, first), (1000, last)):
        pin = host.pin_dir.with_name(f"theirs{preference}")
        bpf.obj_pin(theirs.program, pin)
        run(
            "tc",
            "filter",
            "add",
            "dev",
            "nic0",
            "egress",
            "prio",
            str(preference),
            "bpf",
            "da",
            "object-pinned",
            str(pin),
        )
        pin.unlink()
    before = egress()
    host.attach("nic0")
    host.apply(SETTINGS)
    assert traffic_classes() == {32 << 2}
    assert min(first.seen, last.seen) >= COUNT
    assert [way for way, _ in our_programs("nic0")] == [hook]
    host.detach()
    assert egress() == before
    seen = last.seen
    assert traffic_classes() == {0}
    assert last.seen >= seen + COUNT


@pytest.fixture
def theirs(counter):
    """Puts somebody's program on nic0 by tcx, and takes it away when the test ends."""
    links = []

    def put(verdict: int, flags: int) -> Counter:
        made = counter(verdict)
        try:
            links.append(bpf.link_create(made.program, index(), bpf.TCX_EGRESS, flags))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            pytest.skip("this kernel lacks tcx (CONFIG_NET_XGRESS, Linux 6.6)")
        return made

    yield put
    for link in links:
        os.close(link)


def index() -> int:
    return socket.if_nametoindex("nic0")


@pytest.mark.parametrize("verdict", [TCX_NEXT, TCX_PASS], ids=["next", "pass"])
def test_a_tcx_program_that_was_there_before(host, theirs, caplog, verdict, hook):
    """By tcx ours goes in front of it; on clsact it never sees what that one lets pass, which is told of."""
    program = theirs(verdict, LAST)
    with caplog.at_level(logging.WARNING):
        host.attach("nic0")
    host.apply(SETTINGS)
    behind = "nic0: 1 tcx programs run before ours" in caplog.text
    assert behind == (hook == "clsact")
    assert host.attached_by(["nic0"]) == {"clsact behind 1 tcx programs" if behind else "tcx": ["nic0"]}
    assert traffic_classes() == ({0} if behind and verdict == TCX_PASS else {32 << 2})
    assert program.seen >= COUNT
    host.detach()
    assert len(bpf.tcx_egress(index())) == 1
    seen = program.seen
    assert traffic_classes() == {0}
    assert program.seen >= seen + COUNT


@pytest.mark.parametrize("hook", ["tcx"], indirect=True)
def test_a_tcx_program_that_puts_itself_before_ours_is_told_of(host, theirs, caplog):
    """That is its right. The next look at the interface says so, once."""
    host.attach("nic0")
    host.apply(SETTINGS)
    program = theirs(TCX_PASS, bpf.FIRST)
    assert traffic_classes() == {0}
    assert program.seen >= COUNT
    for _ in range(3):
        assert not host.attach("nic0")
    assert caplog.text.count("nic0: 1 tcx programs run before ours") == 1
    assert host.attached_by(["nic0"]) == {"tcx behind 1 tcx programs": ["nic0"]}
    theirs(TCX_NEXT, bpf.FIRST)
    host.attach("nic0")
    assert caplog.text.count("nic0: 2 tcx programs run before ours") == 1
