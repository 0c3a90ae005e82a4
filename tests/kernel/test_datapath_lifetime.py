"""Attach, adopt, replace, detach: never two filters of ours, nothing half-attached, no trace left behind."""

import json
import logging
import os
import signal

import pytest
from datapath_kit import (
    bpf_file_system,
    bpf_objects,
    build_frame,
    flow_key,
    in_netns,
    run,
    start_agent,
    wait_until_freed,
)

from fabricpilot.config import DatapathSection
from fabricpilot.errors import KernelError, UsageError
from fabricpilot.levels import Thresholds
from hostagent.datapath import bpf_syscall as bpf
from hostagent.datapath import ebpf, open_datapath
from hostagent.datapath.base import Settings
from hostagent.datapath.ebpf import EbpfDatapath
from hostagent.datapath.pinned_names import MAPS

SETTINGS = Settings(Thresholds((1000, 5000, 20000)), (32, 24, 16, 8), (11, 12, 13, 14))
RETURN_UNSPEC = bytes([0xB7, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0x95, 0, 0, 0, 0, 0, 0, 0])  # r0 = -1; exit


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
def datapath(pin_dir):
    opened = EbpfDatapath(pin_dir, 4096)
    yield opened
    opened.detach()
    opened.close()


def tc_state() -> str:
    return run("tc", "qdisc", "show") + "".join(
        run("tc", "filter", "show", "dev", device, side)
        for device in ("nic0", "nic1")
        for side in ("egress", "ingress")
    )


def our_filters(device: str) -> int:
    filters = json.loads(run("tc", "-j", "filter", "show", "dev", device, "egress"))
    return sum("fabricpilot" in str(entry.get("options", {}).get("bpf_name", "")) for entry in filters)


def test_looking_changes_nothing(pin_dir, nic):
    before = tc_state()
    looked = open_datapath(DatapathSection(pin_dir=str(pin_dir)))
    assert (looked.attached(), looked.settings(), looked.counters(), len(looked.flows())) == ([], None, {}, 0)
    looked.detach()
    looked.close()
    assert tc_state() == before
    assert not pin_dir.exists()


def test_attach_twice_is_one_filter_and_detach_leaves_no_trace(pin_dir, nic):
    before = tc_state()
    datapath = EbpfDatapath(pin_dir, 4096)
    for _ in range(2):
        datapath.attach("nic0")
        datapath.attach("nic1")
        assert datapath.attached() == ["nic0", "nic1"]
        assert our_filters("nic0") == our_filters("nic1") == 1
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


def test_detach_leaves_what_others_have(datapath, nic):
    run("tc", "qdisc", "add", "dev", "nic0", "clsact")
    other = bpf.prog_load(bpf.PROG_TYPE_SCHED_CLS, RETURN_UNSPEC)
    bpf.obj_pin(other, datapath.pin_dir.with_name("other"))
    os.close(other)
    pinned = str(datapath.pin_dir.with_name("other"))
    run("tc", "filter", "add", "dev", "nic0", "egress", "prio", "1", "bpf", "da", "object-pinned", pinned)
    before = tc_state()
    datapath.attach("nic0")
    datapath.attach("nic1")
    run("tc", "filter", "add", "dev", "nic1", "ingress", "prio", "1", "bpf", "da", "object-pinned", pinned)
    datapath.detach()
    assert our_filters("nic0") == our_filters("nic1") == 0
    assert "clsact" in run("tc", "qdisc", "show", "dev", "nic1")  # ours, but somebody uses it now
    run("tc", "qdisc", "del", "dev", "nic1", "clsact")
    assert tc_state() == before
    datapath.pin_dir.with_name("other").unlink()


def test_a_foreign_filter_at_our_preference_is_named_and_kept(datapath, nic):
    run("tc", "qdisc", "add", "dev", "nic0", "clsact")
    run("tc", "filter", "add", "dev", "nic0", "egress", "prio", "53", "u32", "match", "u32", "0", "0")
    before = tc_state()
    with pytest.raises(KernelError, match="preference 53 of nic0 is taken"):
        datapath.attach("nic0")
    assert tc_state() == before
    assert datapath.attached() == []
    datapath.detach()
    assert tc_state() == before


def test_ingress_qdisc_in_the_way(datapath, nic):
    run("tc", "qdisc", "add", "dev", "nic0", "ingress")
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


def test_an_interface_that_vanishes_is_no_longer_attached(datapath, nic):
    datapath.attach("nic0")
    run("ip", "link", "del", "nic0")
    assert datapath.attached() == []
    run("ip", "link", "add", "nic0", "type", "veth", "peer", "name", "nic1")
    datapath.attach("nic0")
    assert datapath.attached() == ["nic0"]


def test_filter_removed_by_somebody_is_seen_and_put_back(datapath, nic):
    datapath.attach("nic0")
    run("tc", "qdisc", "del", "dev", "nic0", "clsact")
    assert datapath.attached() == []
    datapath.attach("nic0")
    assert our_filters("nic0") == 1
    datapath.detach()
    assert "clsact" not in tc_state()


AGENT = """
import sys
from pathlib import Path
from fabricpilot.levels import Thresholds
from hostagent.datapath.base import Settings
from hostagent.datapath.ebpf import EbpfDatapath
datapath = EbpfDatapath(Path(sys.argv[1]), 4096)
datapath.attach("nic0")
datapath.apply(Settings(Thresholds((1000, 5000, 20000)), (32, 24, 16, 8), (11, 12, 13, 14)))
print("bcc" in sys.modules, flush=True)
sys.stdin.read()
"""


def test_killed_agent_leaves_everything_and_the_next_one_adopts_it(pin_dir, nic):
    agent = start_agent(AGENT, str(pin_dir))
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
    assert our_filters("nic0") == 1
    assert len(next_agent.flows()) == 1
    next_agent.detach()
    next_agent.close()
    assert "clsact" not in tc_state()


def test_another_table_size_is_a_fresh_start_and_is_counted(pin_dir, nic, caplog):
    first = EbpfDatapath(pin_dir, 4096)
    first.attach("nic0")
    first.apply(SETTINGS)
    second = EbpfDatapath(pin_dir, 8192)
    assert second.adopted  # it reads the same
    assert second.attached() == ["nic0"]
    with caplog.at_level(logging.WARNING):
        second.attach("nic0")
    assert "begun afresh: counters, flows" in caplog.text
    assert second.settings() == SETTINGS
    assert (second.counters()["fresh_starts"], second.counters()["upgrades"]) == (1, 1)
    assert bpf.map_sizes(second._pins.maps["flows"])[2] == 8192
    assert second.attached() == ["nic0"]
    assert our_filters("nic0") == 1
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


@pytest.mark.parametrize("step", ["loading", "before the old one goes", "before the rename"])
def test_an_agent_killed_while_it_replaces_leaves_a_way_on(pin_dir, nic, step):
    first = EbpfDatapath(pin_dir, 4096)
    first.attach("nic0")
    first.close()
    second = start_agent(DIES_WHILE_REPLACING, str(pin_dir), step)
    second.communicate(timeout=30)
    assert second.returncode == -signal.SIGKILL
    assert our_filters("nic0") == 1  # tagging goes on, by the old program or the new one
    third = EbpfDatapath(pin_dir, 8192)
    third.attach("nic0")
    assert third.attached() == ["nic0"]
    assert our_filters("nic0") == 1
    third.detach()
    third.close()
    assert {path.name for path in pin_dir.parent.iterdir()} <= {"maps.debug", "progs.debug"}
    assert "clsact" not in tc_state()


@pytest.mark.parametrize("failing", ["load", "complete", "clsact", "filter"])
def test_whatever_fails_nothing_is_half_attached(pin_dir, nic, monkeypatch, failing):
    before = tc_state()
    datapath = EbpfDatapath(pin_dir, 4096)

    def refuse(*_):
        raise KernelError("refused")

    where = {
        "load": (ebpf.upgrade, "load"),
        "complete": (ebpf.pinned, "complete"),
        "clsact": (ebpf.tc_filter, "add_clsact"),
        "filter": (ebpf.tc_filter, "set_filter"),
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
    datapath.attach("nic0")  # and it can be tried again
    assert datapath.attached() == ["nic0"]
    datapath.detach()
    datapath.close()


def test_lost_pins_do_not_leave_a_filter_for_ever(datapath, nic):
    datapath.attach("nic0")
    datapath.close()
    ebpf.pinned.remove_directory(datapath.pin_dir)
    again = EbpfDatapath(datapath.pin_dir, 4096)
    assert again.attached() == []
    assert our_filters("nic0") == 1
    again.detach()
    assert our_filters("nic0") == 0
    again.close()


def test_another_data_path_is_never_disturbed(datapath, nic):
    """A benchmark, or a second agent with other pins, leaves the filters of the first one alone."""
    datapath.attach("nic0")
    before = tc_state()
    other = EbpfDatapath(datapath.pin_dir.with_name("other"), 4096)
    with pytest.raises(KernelError, match="preference 53 of nic0 is taken by another filter, 'fabricpilot:"):
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
