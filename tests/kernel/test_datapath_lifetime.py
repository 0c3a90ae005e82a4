"""Attach, adopt, replace, detach: never two programs of ours, nothing half-attached, no trace; by tcx and by clsact."""

import errno
import logging
import os
import signal
import socket
import time

import pytest
from datapath_kit import (
    bpf_file_system,
    bpf_objects,
    build_frame,
    flow_key,
    in_netns,
    our_programs,
    run,
    start_agent,
    take_off,
    wait_until_freed,
)

from fabricpilot.config import DatapathSection
from fabricpilot.errors import KernelError, UsageError
from fabricpilot.levels import Thresholds
from hostagent.datapath import bpf_syscall as bpf
from hostagent.datapath import ebpf, open_datapath, tc_filter
from hostagent.datapath.base import Settings
from hostagent.datapath.ebpf import EbpfDatapath
from hostagent.datapath.flow_table import BUCKET_FLOWS
from hostagent.datapath.pinned_names import MAPS

SETTINGS = Settings(Thresholds((1000, 5000, 20000)), (32, 24, 16, 8), (11, 12, 13, 14))
RETURN_UNSPEC = bytes([0xB7, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0x95, 0, 0, 0, 0, 0, 0, 0])  # r0 = -1; exit


# Where a way of attaching hardly matters: by tcx, and by both with -m slow.
BY_BOTH = pytest.mark.parametrize("hook", ["tcx", pytest.param("clsact", marks=pytest.mark.slow)], indirect=True)


@pytest.fixture
def nic(make_netns):
    """A namespace, entered, with a veth pair nic0 -- nic1."""
    name = make_netns("nic")
    run("ip", "link", "add", "nic0", "type", "veth", "peer", "name", "nic1", netns=name)
    run("ip", "link", "set", "nic0", "up", netns=name)
    run("ip", "link", "set", "nic1", "up", netns=name)
    with in_netns(name):
        yield "nic0"


@pytest.fixture
def datapath(pin_dir, hook, loaded_once):
    opened = EbpfDatapath(pin_dir, 4096, hook)
    yield opened
    opened.detach()
    opened.close()


def tc_state() -> str:
    devices = ("nic0", "nic1")
    filters = [run("tc", "filter", "show", "dev", device, side) for device in devices for side in ("egress", "ingress")]
    links = [str(bpf.tcx_egress(socket.if_nametoindex(device))) for device in devices]
    return "".join([run("tc", "qdisc", "show"), *filters, *links])


def ways(device: str = "nic0") -> list[str]:
    """How programs of ours are on it."""
    return [way for way, _ in our_programs(device)]


def test_looking_changes_nothing(pin_dir, nic):
    before = tc_state()
    looked = open_datapath(DatapathSection(pin_dir=str(pin_dir)))
    assert (looked.attached(), looked.settings(), looked.counters(), len(looked.flows())) == ([], None, {}, 0)
    looked.detach()
    looked.close()
    assert tc_state() == before
    assert not pin_dir.exists()


def test_attach_twice_is_one_program_and_detach_leaves_no_trace(pin_dir, nic, hook):
    before = tc_state()
    datapath = EbpfDatapath(pin_dir, 4096, hook)
    for _ in range(2):
        datapath.attach("nic0")
        datapath.attach("nic1")
        assert datapath.attached() == ["nic0", "nic1"]
        assert ways("nic0") == ways("nic1") == [hook]
        assert datapath.attached_by(["nic0", "nic9"]) == {hook: ["nic0"]}
    datapath.apply(SETTINGS)
    objects = bpf_objects(pin_dir)
    assert len(objects) > len(MAPS)
    for _ in range(2):
        datapath.detach()
        assert (datapath.attached(), datapath.settings()) == ([], None)
    datapath.close()
    assert tc_state() == before
    assert not pin_dir.exists()
    wait_until_freed(objects)


def test_detach_leaves_what_others_have(datapath, nic, hook):
    run("tc", "qdisc", "add", "dev", "nic0", "clsact")
    other = bpf.prog_load(bpf.PROG_TYPE_SCHED_CLS, RETURN_UNSPEC)
    bpf.obj_pin(other, datapath.pin_dir.with_name("other"))
    os.close(other)
    pinned = str(datapath.pin_dir.with_name("other"))
    run("tc", "filter", "add", "dev", "nic0", "egress", "prio", "1", "bpf", "da", "object-pinned", pinned)
    before = tc_state()
    datapath.attach("nic0")
    datapath.attach("nic1")
    if hook == "tcx":
        run("tc", "qdisc", "add", "dev", "nic1", "clsact")
    run("tc", "filter", "add", "dev", "nic1", "ingress", "prio", "1", "bpf", "da", "object-pinned", pinned)
    datapath.detach()
    assert ways("nic0") == ways("nic1") == []
    assert "clsact" in run("tc", "qdisc", "show", "dev", "nic1")  # perhaps ours, but somebody uses it now
    run("tc", "qdisc", "del", "dev", "nic1", "clsact")
    assert tc_state() == before
    datapath.pin_dir.with_name("other").unlink()


@pytest.mark.parametrize("hook", ["clsact"])
def test_a_foreign_filter_at_our_preference_is_named_and_kept(datapath, nic, hook):
    run("tc", "qdisc", "add", "dev", "nic0", "clsact")
    run("tc", "filter", "add", "dev", "nic0", "egress", "prio", "53", "u32", "match", "u32", "0", "0")
    before = tc_state()
    with pytest.raises(KernelError, match="preference 53 of nic0 is taken"):
        datapath.attach("nic0")
    assert tc_state() == before
    assert datapath.attached() == []
    datapath.detach()
    assert tc_state() == before


def test_an_ingress_qdisc_is_in_the_way_of_clsact_alone(datapath, nic, hook):
    run("tc", "qdisc", "add", "dev", "nic0", "ingress")
    if hook == "tcx":
        datapath.attach("nic0")
        assert ways() == ["tcx"]
        return
    with pytest.raises(KernelError, match="ingress qdisc where clsact has to go"):
        datapath.attach("nic0")
    assert datapath._pins.interfaces() == {}


@pytest.mark.parametrize("name", ["nic9", ""])
def test_unknown_interface(datapath, nic, name):
    before = tc_state()
    with pytest.raises(UsageError, match=r"does not exist; there are: lo, nic0, nic1"):
        datapath.attach(name)
    assert tc_state() == before
    assert not datapath.pin_dir.exists()


def test_interface_without_ethernet_header(datapath, nic):
    run("ip", "tuntap", "add", "dev", "tun9", "mode", "tun")
    with pytest.raises(UsageError, match="no Ethernet interface"):
        datapath.attach("tun9")


def links(pin_dir) -> list[str]:
    """Names of the pins of links to interfaces."""
    return sorted(pin.name for pin in pin_dir.glob("egress_*"))


def test_an_interface_that_vanishes_is_no_longer_attached(datapath, nic, hook):
    """Whether another one gets its index or not."""
    datapath.attach("nic0")
    for same_index in (False, True):
        index = socket.if_nametoindex("nic0")
        run("ip", "link", "del", "nic0")
        assert datapath.attached() == []
        given = ["index", str(index)] if same_index else []
        run("ip", "link", "add", "nic0", *given, "type", "veth", "peer", "name", "nic1")
        assert datapath.attached() == []
        if same_index:
            datapath.release(())  # told of the one that went, and the other is not to be scheduled
            assert links(datapath.pin_dir) == []
        datapath.attach("nic0")
        datapath.release(())
        assert datapath.attached() == ["nic0"]
        assert len(links(datapath.pin_dir)) == (hook == "tcx")


@pytest.mark.parametrize("hook", ["tcx"], indirect=True)
def test_one_that_moved_to_another_namespace_does_not_take_our_link_along(datapath, nic, make_netns):
    """The kernel leaves it there; and another interface may have the index here by now."""
    index = socket.if_nametoindex("nic0")
    for look, found in ((lambda: datapath.attach("nic0"), ["tcx"]), (lambda: datapath.release(()), [])) * 2:
        datapath.attach("nic0")
        there = make_netns("there")
        run("ip", "link", "set", "nic0", "netns", there)
        run("ip", "link", "add", "nic0", "index", str(index), "type", "veth")
        with in_netns(there):
            assert ways() == ["tcx"]
        assert (ways(), datapath.attached()) == ([], [])
        look()
        assert ways() == found
        with in_netns(there):
            assert ways() == []
    datapath.attach("nic0")
    run("ip", "link", "set", "nic0", "netns", there, "name", "another")
    datapath.detach()
    with in_netns(there):
        assert ways("another") == []


def test_a_program_taken_off_by_somebody_is_seen_and_put_back(datapath, nic, hook):
    datapath.attach("nic0")
    take_off("nic0")
    assert ways() == []
    assert datapath.attached() == []
    datapath.attach("nic0")
    assert ways() == [hook]
    datapath.detach()
    assert "clsact" not in tc_state()


def test_a_nic_keeps_the_way_it_has(pin_dir, nic, hook, loaded_once):
    """Whatever a later agent is told to prefer: there is no moment with two programs, or none."""
    other = {"tcx": "clsact", "clsact": "auto"}[hook]
    first, second = EbpfDatapath(pin_dir, 4096, hook), EbpfDatapath(pin_dir, 8192, other)
    first.attach("nic0")
    before = our_programs("nic0")
    second.attach("nic0")  # another version: it takes over in place
    second.attach("nic1")
    [(way, program)] = our_programs("nic0")
    assert (way, program == before[0][1]) == (hook, False)
    assert ways("nic1") != [hook]
    assert second.attached() == ["nic0", "nic1"]
    assert not second.attach("nic0")
    second.release(["nic0"])
    assert ways() == []
    second.attach("nic0")
    assert ways() == ways("nic1") != [hook]
    second.detach()
    assert ways("nic0") == ways("nic1") == []
    assert "clsact" not in tc_state()
    for datapath in (first, second):
        datapath.close()


def test_without_tcx_it_is_clsact_unless_tcx_was_asked_for(pin_dir, nic, loaded_once, monkeypatch):
    monkeypatch.setattr(bpf, "TCX_EGRESS", 4711)  # as a kernel that has never heard of it
    asked = EbpfDatapath(pin_dir, 4096, "tcx")
    with pytest.raises(KernelError, match=r"datapath.hook = tcx: this kernel has none \(Linux 6.6"):
        asked.attach("nic0")
    asked.close()
    datapath = EbpfDatapath(pin_dir, 4096)
    assert datapath.attached_by(["nic0"]) == {"clsact": ["nic0"]}
    datapath.attach("nic0")
    assert datapath.attached_by(["nic0"]) == {"clsact": ["nic0"]}
    monkeypatch.setattr(bpf, "TCX_EGRESS", 47)
    assert ways() == ["clsact"]
    datapath.detach()
    datapath.close()


AGENT = """
import sys
from pathlib import Path
from fabricpilot.levels import Thresholds
from hostagent.datapath.base import Settings
from hostagent.datapath.ebpf import EbpfDatapath
datapath = EbpfDatapath(Path(sys.argv[1]), 4096, sys.argv[2])
datapath.attach("nic0")
datapath.apply(Settings(Thresholds((1000, 5000, 20000)), (32, 24, 16, 8), (11, 12, 13, 14)))
print("bcc" in sys.modules, flush=True)
sys.stdin.read()
"""


def test_killed_agent_leaves_everything_and_the_next_one_adopts_it(pin_dir, nic, hook):
    agent = start_agent(AGENT, str(pin_dir), hook)
    assert agent.stdout.readline() == "False\n"  # the agent never imported bcc
    program = bpf.obj_get(pin_dir / "egress")
    bpf.prog_test_run(program, build_frame(flow_key(), syn=True))
    bpf.prog_test_run(program, build_frame(flow_key(), 1200, sequence=1))
    agent.send_signal(signal.SIGKILL)
    agent.communicate()

    bpf.prog_test_run(program, build_frame(flow_key(), 300, sequence=1201))
    os.close(program)
    next_agent = EbpfDatapath(pin_dir, 4096)
    assert next_agent.adopted
    assert next_agent.attached() == ["nic0"]
    assert next_agent.settings() == SETTINGS
    assert next_agent.flows().states["attained_bytes"].tolist() == [1500]
    counters = next_agent.counters()
    assert (counters["packets_level_0"], counters["packets_level_1"]) == (2, 1)
    next_agent.attach("nic0")
    assert ways() == [hook]
    assert len(next_agent.flows()) == 1
    next_agent.detach()
    next_agent.close()
    assert "clsact" not in tc_state()


@BY_BOTH
def test_another_table_size_is_a_fresh_start_and_is_counted(pin_dir, nic, hook, caplog):
    first = EbpfDatapath(pin_dir, 4096, hook)
    first.attach("nic0")
    first.apply(SETTINGS)
    second = EbpfDatapath(pin_dir, 8192)
    assert second.adopted  # it reads the same
    assert second.attached() == ["nic0"]
    with caplog.at_level(logging.WARNING):
        second.attach("nic0")
    assert "begun afresh: counters, flow_hash, flow_tags, flows" in caplog.text
    assert second.settings() == SETTINGS
    assert (second.counters()["fresh_starts"], second.counters()["upgrades"]) == (1, 1)
    assert bpf.map_sizes(second._pins.maps["flows"])[2] == 8192 // BUCKET_FLOWS
    assert second.attached() == ["nic0"]
    assert ways() == [hook]
    second.detach()  # knows that clsact was ours, though the first one made it
    assert "clsact" not in tc_state()
    for datapath in (first, second):
        datapath.close()


DIES_WHILE_REPLACING = """
import os, signal, sys
from pathlib import Path
from hostagent.datapath import ebpf

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

owner, name = {
    "loading": (ebpf.pinned, "complete"),
    "before the old one goes": (ebpf.pinned, "remove_directory"),
    "before the rename": (ebpf.Path, "rename"),
}[sys.argv[2]]
setattr(owner, name, die)
ebpf.EbpfDatapath(Path(sys.argv[1]), 8192).attach("nic0")
"""


@BY_BOTH
@pytest.mark.parametrize("step", ["loading", "before the old one goes", "before the rename"])
def test_an_agent_killed_while_it_replaces_leaves_a_way_on(pin_dir, nic, hook, step):
    first = EbpfDatapath(pin_dir, 4096, hook)
    first.attach("nic0")
    first.close()
    second = start_agent(DIES_WHILE_REPLACING, str(pin_dir), step)
    second.communicate(timeout=30)
    assert second.returncode == -signal.SIGKILL
    assert ways() == [hook]  # tagging goes on, by the old program or the new one
    third = EbpfDatapath(pin_dir, 8192)
    third.attach("nic0")
    assert third.attached() == ["nic0"]
    assert ways() == [hook]
    third.detach()
    third.close()
    assert {path.name for path in pin_dir.parent.iterdir()} <= {"maps.debug", "progs.debug"}
    assert "clsact" not in tc_state()


@pytest.mark.parametrize(
    ("failing", "hook"),
    [("load", "tcx"), ("complete", "tcx"), ("clsact", "clsact"), ("filter", "clsact"), ("link", "tcx"), ("pin", "tcx")],
    indirect=["hook"],
)
def test_whatever_fails_nothing_is_half_attached(pin_dir, nic, monkeypatch, failing, hook):
    before = tc_state()
    datapath = EbpfDatapath(pin_dir, 4096, hook)
    pin = bpf.obj_pin

    def refuse(*arguments, **_):
        if failing == "pin" and "egress_" not in str(arguments[1]):
            return pin(*arguments)
        raise OSError(errno.EPERM, "refused") if failing in ("link", "pin") else KernelError("refused")

    where = {
        "load": (ebpf.upgrade, "load"),
        "complete": (ebpf.pinned, "complete"),
        "clsact": (tc_filter, "add_clsact"),
        "filter": (tc_filter, "set_filter"),
        "link": (bpf, "link_create"),
        "pin": (bpf, "obj_pin"),
    }[failing]
    with monkeypatch.context() as patch:
        patch.setattr(*where, refuse)
        with pytest.raises(KernelError, match="refused"):
            datapath.attach("nic0")
    assert tc_state() == before
    assert not pin_dir.with_name("fabricpilot-new").exists()
    assert datapath.attached() == []
    if failing in ("load", "complete"):
        assert not pin_dir.exists()
    else:
        assert datapath._pins.interfaces() == {}
        assert links(pin_dir) == []
    datapath.attach("nic0")  # and it can be tried again
    assert datapath.attached() == ["nic0"]
    datapath.detach()
    datapath.close()


def test_lost_pins_do_not_leave_a_program_for_ever(datapath, nic, hook):
    datapath.attach("nic0")
    datapath.close()
    ebpf.pinned.remove_directory(datapath.pin_dir)
    again = EbpfDatapath(datapath.pin_dir, 4096)
    assert again.attached() == []
    if hook == "tcx":  # it went with its pin
        deadline = time.monotonic() + 10
        while ways():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    else:
        assert ways() == ["clsact"]
    again.attach("nic0")
    assert ways() == [hook]
    again.detach()
    assert ways() == []
    again.close()


def test_another_data_path_is_never_disturbed(datapath, nic, hook):
    """A benchmark, or a second agent with other pins, leaves the programs of the first one alone."""
    datapath.attach("nic0")
    before = tc_state()
    by = {"tcx": r"tcx link pinned as .*/fabricpilot/egress_\d+", "clsact": "filter fabricpilot:.* on clsact"}[hook]
    for others in ("auto", "clsact"):
        other = EbpfDatapath(datapath.pin_dir.with_name("other"), 4096, others)
        with pytest.raises(KernelError, match=f"nic0 is scheduled by another data path already, by the {by}"):
            other.attach("nic0")
        assert other.attached() == []
        other.detach()
        other.close()
        assert tc_state() == before
    assert datapath.attached() == ["nic0"]


def test_two_namespaces_do_not_share_pins(pin_dir, nic, make_netns):
    first = EbpfDatapath(pin_dir, 4096)
    first.attach("nic0")
    with in_netns(make_netns("other")), pytest.raises(UsageError, match="belongs to another network namespace"):
        EbpfDatapath(pin_dir, 4096)
    first.detach()
    first.close()


def test_pins_of_a_namespace_that_is_gone_are_removed(pin_dir, make_netns):
    from pyroute2 import netns

    name = f"fptest-gone-{os.getpid()}"
    netns.create(name)
    try:
        with in_netns(name):
            lost = EbpfDatapath(pin_dir, 4096)
            lost.attach("lo")
            lost.close()
    finally:
        netns.remove(name)
    found = EbpfDatapath(pin_dir, 4096)
    assert found.attached() == []
    assert not pin_dir.exists()
    found.close()


def test_pin_dir_outside_a_bpf_file_system(tmp_path, nic):
    before = tc_state()
    datapath = EbpfDatapath(tmp_path / "pins", 4096)
    with pytest.raises(KernelError, match=f"not on a BPF file system; mount one with `mkdir -p {tmp_path}"):
        datapath.attach("nic0")
    datapath.close()
    assert tc_state() == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["relative/pins", "/sys/fs/bpf/fabric.pilot"])
def test_pin_dir_that_cannot_be(path):
    from pathlib import Path

    with pytest.raises(UsageError, match="absolute path, its last part without dots"):
        EbpfDatapath(Path(path), 4096)


@pytest.mark.parametrize("backend", ["auto", "ebpf"])
def test_the_kernel_would_not_even_look_at_such_a_pin_dir(tmp_path, backend):
    with (
        bpf_file_system(tmp_path / "bpf") as root,
        pytest.raises(UsageError, match="absolute path, its last part without dots"),
    ):
        open_datapath(DatapathSection(backend=backend, pin_dir=str(root / "fabric.pilot")))


def test_source_that_does_not_compile_is_one_line(pin_dir, nic, monkeypatch, tmp_path):
    import shutil

    from hostagent.datapath import source

    broken = tmp_path / "ebpf"
    shutil.copytree(source.EBPF_DIR, broken)
    with (broken / "mark.h").open("a") as file:
        file.write("\nint oops = this_is_no_C;\n")
    # The child imports source.py itself, so its folder is given by a sitecustomize in front of its path.
    (tmp_path / "sitecustomize.py").write_text(
        "import hostagent.datapath.source as s\nfrom pathlib import Path\n"
        f"s.program_source.__defaults__ = (Path({str(broken)!r}), {{}})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    datapath = EbpfDatapath(pin_dir, 4096)
    with pytest.raises(KernelError, match=r"could not be compiled.*mark\.h:\d+.*this_is_no_C") as raised:
        datapath.attach("nic0")
    assert "\n" not in str(raised.value)
    datapath.close()
    assert not pin_dir.exists()


def test_no_bcc_is_one_line_with_the_package(pin_dir, nic, monkeypatch, tmp_path):
    (tmp_path / "bcc.py").write_text("raise ImportError('no such thing here')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    datapath = EbpfDatapath(pin_dir, 4096)
    with pytest.raises(KernelError, match="install the Debian package python3-bpfcc"):
        datapath.attach("nic0")
    datapath.close()
    assert not pin_dir.exists()
