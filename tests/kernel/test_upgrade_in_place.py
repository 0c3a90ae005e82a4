"""Another version of the program takes over while packets pass: what can be kept is kept, and none leaves untagged."""

import json
import os
import select
import shutil
import socket
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from datapath_kit import (
    bpf_file_system,
    bpf_objects,
    build_frame,
    elements,
    flow_key,
    in_netns,
    our_programs,
    run,
    start_agent,
)
from pyroute2 import IPRoute

from fabricpilot.errors import KernelError
from fabricpilot.levels import Thresholds
from hostagent.datapath import bpf_syscall as bpf
from hostagent.datapath import ebpf, layout, source, tc_filter, tcx_link, upgrade
from hostagent.datapath.base import Settings, SocketRule
from hostagent.datapath.cgroup_links import cgroup_mount
from hostagent.datapath.ebpf import EbpfDatapath
from hostagent.datapath.flow_table import TAGS_DTYPE
from hostagent.datapath.layout import SETTINGS_DTYPE

SETTINGS = Settings(Thresholds((10**9, 2 * 10**9, 3 * 10**9)), (32, 24, 16, 8), (11, 12, 13, 14))
DSCP = 32 << 2  # of level 0, where all packets are

# What the next version has changed in ebpf/.
CODE = ("egress.c", "\tint reason;\n", "\tint reason;\n\tvolatile int another_version = 1; (void)another_version;\n")
COUNTERS = ("counters.h", "struct counters {", "struct counters {\n\t__u64 another;")
FLOWS = ("flow.h", "struct flow_state {", "struct flow_state {\n\t__u64 another;")
SLOTS = ("level.h", "\n};\n\n/* Key: slot", "\n\t__u64 another;\n};\n\n/* Key: slot")


BY_BOTH = pytest.mark.parametrize("hook", ["auto", "clsact"])


@pytest.fixture
def hook():
    """How the first version attaches, in the tests that do not say otherwise; the next ones are left the choice."""
    return "auto"


@pytest.fixture
def host(make_netns, tmp_path, hook):
    """Where pins go, in a namespace with nic0 -- nic1, nic0 scheduled by this version, and the way to the next."""
    name = make_netns("host")
    with bpf_file_system(tmp_path / "bpf") as root, in_netns(name):
        run("ip", "link", "add", "nic0", "type", "veth", "peer", "name", "nic1")
        run("ip", "addr", "add", "10.9.1.1/24", "dev", "nic0")
        for nic in ("nic0", "nic1"):
            run("ip", "link", "set", nic, "up")
        run("ip", "neigh", "add", "10.9.1.2", "lladdr", "02:00:00:00:00:02", "dev", "nic0")
        made = Host(root / "fabricpilot", tmp_path, hook)
        yield made
        made.close()


class Host:
    def __init__(self, pin_dir: Path, directory: Path, hook: str):
        self.pin_dir, self.directory = pin_dir, directory
        self.first = EbpfDatapath(pin_dir, 4096, hook)
        self.first.attach("nic0")
        self.first.apply(SETTINGS)

    def change(self, monkeypatch, *changes: tuple[str, str, str]) -> None:
        """From here on this process, and the loader it starts, is of another version."""
        changed = self.directory / "ebpf"
        shutil.copytree(source.EBPF_DIR, changed)
        for name, before, after in changes:
            text = (changed / name).read_text()
            assert before in text
            (changed / name).write_text(text.replace(before, after, 1))
        for function in (source.program_source, source.map_layouts):
            monkeypatch.setattr(function, "__defaults__", (changed, *function.__defaults__[1:]))
        (self.directory / "sitecustomize.py").write_text(
            "import hostagent.datapath.source as s\nfrom pathlib import Path\n"
            f"s.program_source.__defaults__ = (Path({str(changed)!r}), *s.program_source.__defaults__[1:])\n"
        )
        monkeypatch.syspath_prepend(str(self.directory))

        if SLOTS in changes:
            wider = np.dtype([*SETTINGS_DTYPE.descr, ("another", "<u8")])
            for module in (ebpf, layout):
                monkeypatch.setattr(module, "SETTINGS_DTYPE", wider)

    def send(self, payload_bytes: int, **flags: bool) -> None:
        """A packet of one flow through the pinned program."""
        program = bpf.obj_get(self.pin_dir / "egress")
        bpf.prog_test_run(program, build_frame(flow_key(), payload_bytes, **flags))
        os.close(program)

    def close(self) -> None:
        self.first.close()
        leftover = EbpfDatapath(self.pin_dir, 4096)
        leftover.detach()
        leftover.close()


class Packets(threading.Thread):
    """A stream of small datagrams out of nic0, and the traffic class of each that arrives at nic1."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        so_rcvbufforce = 33
        self.tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
        self.tap.bind(("nic1", 0x0800))
        self.tap.setsockopt(socket.SOL_SOCKET, so_rcvbufforce, 256 << 20)
        self.tap.settimeout(0.3)
        self.sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sender.connect(("10.9.1.2", 9))
        self.sent = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            self.sender.send(b"x")
            self.sent += 1
            time.sleep(0.0005)

    def stop(self) -> list[int]:
        self.over.set()
        self.join()
        seen = []
        while True:
            try:
                frame = self.tap.recv(2048)
            except TimeoutError:
                break
            if frame[23] == 17:
                seen.append(frame[15])
        self.sender.close()
        self.tap.close()
        return seen


@pytest.mark.parametrize(
    ("changes", "kept", "hook"),
    [
        ((CODE,), {"flows", "counters", "settings"}, "auto"),
        ((CODE,), {"flows", "counters", "settings"}, "clsact"),
        ((COUNTERS,), {"flows", "settings"}, "auto"),
        ((FLOWS,), {"settings"}, "auto"),
        ((SLOTS,), {"flows", "counters"}, "auto"),
    ],
    ids=["code", "code by clsact", "counters", "flows", "settings"],
)
def test_another_version_takes_over_under_traffic(host, monkeypatch, changes, kept):
    [(way, program)] = our_programs("nic0")
    packets = Packets()
    packets.start()
    while not packets.sent:
        time.sleep(0.01)
    host.send(0, syn=True)
    host.send(1500)
    flows_before = len(host.first.flows())
    assert flows_before == 2
    host.change(monkeypatch, *changes)

    monkeypatch.setattr("hostagent.datapath.ebpf._READ", {})  # this process's dtypes are those of the first version
    second = EbpfDatapath(host.pin_dir, 4096)
    assert second.adopted == (changes == (CODE,))
    assert second.attached() == ["nic0"]
    second.apply(SETTINGS)
    second.attach("nic0")
    assert second.attached() == ["nic0"]
    [(way_now, program_now)] = our_programs("nic0")
    assert (way_now, program_now == program) == (way, False)
    time.sleep(0.2)
    seen = packets.stop()
    assert len(seen) >= packets.sent
    assert set(seen) == {DSCP}  # every single one

    tags = elements(second, "flow_tags", TAGS_DTYPE)["tags"]
    identity = second._pins.identity()[0]
    assert (np.count_nonzero(tags) == 2) == ("flows" in kept)
    assert (int(identity["upgrades"]), int(identity["fresh_starts"])) == (1, 0 if "flows" in kept else 1)
    if changes == (CODE,):
        after = second.counters()
        assert after["packets_level_0"] == packets.sent + 2  # each once, and the two of above
        assert after["flows_inserted"] == 2
        assert 1500 in second.flows().states["attained_bytes"]
        assert second.counters()["flows_evicted"] == 0
    second.close()


def test_new_settings_are_in_force_from_the_new_programs_first_packet_on(host, monkeypatch):
    """The old settings cannot be kept; `apply` comes first, so the filters are turned over with the new ones there."""
    host.change(monkeypatch, SLOTS)
    seen = []
    monkeypatch.setattr("hostagent.datapath.ebpf._READ", {})
    turned = upgrade.turn_over

    def watched(ipr, ways, before, after):
        active, slot = np.zeros(1, np.uint32), np.zeros(bpf.map_sizes(after.maps["slots"])[1], np.uint8)
        bpf.lookup(after.maps["active"], np.zeros(1, np.uint32), active)
        bpf.lookup(after.maps["slots"], active, slot)
        seen.append((len(our_programs("nic0")), bool(slot.any())))
        turned(ipr, ways, before, after)

    monkeypatch.setattr(upgrade, "turn_over", watched)
    second = EbpfDatapath(host.pin_dir, 4096)
    second.apply(SETTINGS)
    assert seen == [(1, True)]
    second.close()


HINT = """
import socket, sys
refused = told = 0
print("ready", flush=True)
sys.stdin.readline()
with socket.socket() as connection:  # of the cgroup that the process is in when it is made
    while not refused or told < 10:
        try:
            connection.setsockopt(0x4650, 1, bytes(8))
            told += 1
        except OSError:
            refused += bool(told)
        if told == 1:
            print("heard", flush=True)
            told += 1
print(told, flush=True)
"""


def test_hints_are_heard_all_along(host, monkeypatch):
    """An application hints without pause until it is refused: when the data path goes, and not before."""
    directory = cgroup_mount() / f"fptest-{uuid.uuid4().hex[:8]}"
    directory.mkdir()
    child = start_agent(HINT)
    try:
        assert child.stdout.readline() == "ready\n"
        (directory / "cgroup.procs").write_text(str(child.pid))
        host.first.serve_sockets(SocketRule(hint_cgroups=(directory.name,)))
        child.stdin.write("go\n")
        child.stdin.flush()
        assert child.stdout.readline() == "heard\n"
        host.change(monkeypatch, CODE)
        second = EbpfDatapath(host.pin_dir, 4096)
        host.first.close()
        for _ in range(2):
            second.apply(SETTINGS)
            second.attach("nic0")
            second.serve_sockets(SocketRule(hint_cgroups=(directory.name,)))
        links = [path.name for path in host.pin_dir.iterdir() if path.name.startswith("hint_")]
        assert links == [f"hint_{directory.stat().st_ino}"]
        assert attached_to(directory) == [
            json.loads(run("bpftool", "-j", "prog", "show", "pinned", str(host.pin_dir / "hint")))["id"]
        ]
        assert child.poll() is None
        assert not select.select([child.stdout], [], [], 0)[0]
        second.detach()
        said, _ = child.communicate(timeout=20)
        assert int(said) > 1000
        assert attached_to(directory) == []
        second.close()
    finally:
        child.kill()
        child.wait()
        directory.rmdir()


def attached_to(cgroup: Path) -> list[int]:
    """Ids of the programs on a cgroup."""
    return [entry["id"] for entry in json.loads(run("bpftool", "-j", "cgroup", "show", str(cgroup)).strip() or "[]")]


@BY_BOTH
def test_a_nic_that_cannot_be_turned_over_leaves_all_with_the_old_program(host, monkeypatch, hook):
    run("ip", "link", "add", "nic2", "type", "veth", "peer", "name", "nic3")
    host.first.attach("nic2")
    before = our_programs("nic0"), our_programs("nic2")
    host.change(monkeypatch, CODE)
    second = EbpfDatapath(host.pin_dir, 4096)
    kind = tc_filter.ClsactFilter if hook == "clsact" else tcx_link.TcxLink
    put, put_on = kind.put, []

    def refuse_the_second(way, nic, pins):
        put_on.append(nic.name)
        if len(put_on) == 2:
            raise KernelError("refused")
        put(way, nic, pins)

    monkeypatch.setattr(kind, "put", refuse_the_second)
    with pytest.raises(KernelError, match="refused"):
        second.apply(SETTINGS)
    assert len(put_on) == 3  # the first one twice: there and back
    assert (our_programs("nic0"), our_programs("nic2")) == before
    assert not host.pin_dir.with_name("fabricpilot-new").exists()
    monkeypatch.setattr(kind, "put", put)
    second.apply(SETTINGS)
    assert second.attached() == ["nic0", "nic2"]
    second.close()


def test_a_set_of_before_there_were_layouts_is_replaced_afresh(host):
    """Its identity is shorter, too; what it says of interfaces is still true."""
    objects = bpf_objects(host.pin_dir)
    (host.pin_dir / "layouts").unlink()
    short = bpf.map_create(bpf.MAP_TYPE_ARRAY, 4, 56, 1, "identity")
    bpf.update(short, np.zeros(1, np.uint32), host.first._pins.identity().view(np.uint8)[:56].copy())
    (host.pin_dir / "identity").unlink()
    bpf.obj_pin(short, host.pin_dir / "identity")
    os.close(short)
    second = EbpfDatapath(host.pin_dir, 8192)
    assert not second.adopted
    assert (second.settings(), second.counters(), len(second.flows())) == (None, {}, 0)
    assert second.attached() == ["nic0"]
    second.apply(SETTINGS)
    assert second.attached() == ["nic0"]
    assert second.counters()["fresh_starts"] == 1
    assert not objects & bpf_objects(host.pin_dir) - {("map", int(bpf._info(second._pins.maps["interfaces"])[1]))}
    second.detach()
    assert "clsact" not in run("tc", "qdisc", "show", "dev", "nic0")
    second.close()


CLAIM = """
import sys
from pathlib import Path
from fabricpilot.errors import UsageError
from hostagent.datapath.ebpf import EbpfDatapath
from hostagent.datapath.flow_table import TAGS_DTYPE
datapath = EbpfDatapath(Path(sys.argv[1]), 4096)
for what in (datapath.claim, datapath.detach):
    try:
        what()
        print("done", flush=True)
    except UsageError as error:
        print(error, flush=True)
"""


def test_one_agent_per_data_path(host, monkeypatch):
    host.first.claim()
    host.first.claim()

    def another_tries() -> list[str]:
        said, _ = start_agent(CLAIM, str(host.pin_dir)).communicate(timeout=30)
        return said.splitlines()

    assert ["an agent is at work on" in line for line in another_tries()] == [True, True]
    host.change(monkeypatch, CODE)
    second = EbpfDatapath(host.pin_dir, 4096)
    host.first.close()
    second.claim()
    second.attach("nic0")  # another folder takes the place of the one that was claimed
    assert ["an agent is at work on" in line for line in another_tries()] == [True, True]
    assert second.attached() == ["nic0"]
    with IPRoute() as ipr:
        assert ipr.link_lookup(ifname="nic0")
    second.close()
    assert another_tries() == ["done", "done"]
    assert our_programs("nic0") == []
