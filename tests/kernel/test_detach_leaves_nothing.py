"""`detach` leaves no trace, whatever came before it: an agent killed at any step, or a detach killed at any step.

A child works in the namespace and kills itself (SIGKILL) right before its n-th change of anything outside itself: a
pin, a map entry, a folder or file, a filter, a qdisc, a temporary interface, an nftables transaction, a sysctl. For
n = 1, 2, ... until it gets through. With both data paths of the kernel.
"""

import dataclasses
import json
import os
import signal
import traceback
from pathlib import Path

import pytest
from datapath_kit import bpf_file_system, bpf_objects, in_netns, our_programs, run, start_agent, wait_until_freed
from msgspec.structs import replace
from pyroute2 import IPRoute

from fabricpilot.config import AgentConfig, DatapathSection, load
from fabricpilot.levels import Thresholds
from hostagent.datapath import bpf_syscall as bpf
from hostagent.datapath import nft_library, nftables, open_datapath, tc_filter
from hostagent.datapath.tcx_link import has_tcx
from hostagent.lifecycle import bring_up, take_down
from hostagent.qdisc import rtnetlink, snapshot, support

FLOW_ENTRIES = 4096
MOST_STEPS = 200
OTHER = Thresholds((111, 222, 333))


class Host:
    """A namespace, entered, whose NIC somebody has given a shaper, and another NIC a clsact."""

    def __init__(self, backend: str, hook: str, queues: str, directory: Path, pins: Path, loaded: set[tuple[str, int]]):
        self.pins = pins
        self.loaded = loaded  # what this process keeps in the kernel
        self.run_dir = directory / "run"
        self.config = load(
            AgentConfig,
            None,
            {
                "host.interfaces": ["nic0", "nic1"],
                "host.run_dir": str(self.run_dir),
                "datapath.backend": backend,
                "datapath.hook": hook,
                "datapath.pin_dir": str(pins / "fabricpilot"),
                "datapath.flow_entries": FLOW_ENTRIES,
                "queues.kind": queues,
                "queues.link_rate": "100Mbit",
                "queues.replace_foreign": True,
            },
            {},
        )
        run("ip", "link", "add", "nic0", "type", "veth", "peer", "name", "nic1")
        for nic in ("nic0", "nic1"):
            run("ip", "link", "set", nic, "up")
        shaper = "rate 50mbit burst 20kb limit 100kb"
        run("tc", "qdisc", "replace", "dev", "nic0", "root", "handle", "8:", "tbf", *shaper.split(" "))
        run("tc", "qdisc", "add", "dev", "nic1", "clsact")

    def state(self) -> list[str]:
        """Everything that an agent touches, without what only counts."""
        links = json.loads(run("ip", "-j", "-d", "link"))
        shown = [f"{link['ifname']} {link['flags']} {link.get('qdisc')} {link['mtu']}" for link in links]
        for link in links:
            name = link["ifname"]
            shown += [run("tc", "class", "show", "dev", name), str(bpf.tcx_egress(link["ifindex"]))]
            shown += [run("tc", "filter", "show", "dev", name, *where) for where in ((), ("egress",), ("ingress",))]
        shown += sorted(run("tc", "qdisc", "show").replace("refcnt 3", "refcnt 2").splitlines())
        shown += sorted(str(path) for path in self.pins.rglob("*"))
        if self.config.datapath.backend == "nftables":
            sysctls = run("sysctl", "net.netfilter").splitlines()  # conntrack's entries are the host's: they fade
            shown += [line for line in sysctls if "nf_conntrack_count" not in line]
            shown += [run("nft", "--stateless", "list", "ruleset")]
        return shown + sorted(str(path) for path in self.run_dir.glob("qdisc-*"))

    def surroundings(self) -> list[str]:
        """What an agent has no business with, or must have put back."""
        settings = []
        for path in sorted(Path("/proc/sys/net").rglob("*")):
            try:
                settings.append(f"{path} {path.read_text()}" if path.is_file() else "")
            except OSError:  # some may only be written
                continue
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        ours = (str(self.pins), "/sys/")  # other tests may run on this machine
        mounts = [line for line in mounts if " - bpf " in line and line.split()[4].startswith(ours)]
        return [run("nft", "list", "ruleset"), *settings, *mounts]

    def upgrade(self) -> None:
        """An agent that needs another program."""
        self.attach(replace(self.config.datapath, flow_entries=2 * FLOW_ENTRIES))

    def attach(self, datapath: DatapathSection | None = None) -> None:
        with IPRoute() as ipr:
            scheduled = bring_up(replace(self.config, datapath=datapath or self.config.datapath), ipr)
            scheduled.roster.watch.close()
            if scheduled.flow_control is not None:
                scheduled.flow_control.close()
            scheduled.datapath.close()

    def apply(self) -> None:
        """Other thresholds, as central sends them."""
        datapath = open_datapath(self.config.datapath)
        datapath.apply(dataclasses.replace(datapath.settings(), thresholds=OTHER))
        datapath.close()

    def thresholds(self) -> Thresholds:
        """Those in force."""
        datapath = open_datapath(self.config.datapath)
        settings = datapath.settings()
        datapath.close()
        return settings.thresholds

    def detach(self) -> None:
        with IPRoute() as ipr:
            take_down(self.config, ipr)

    def assert_scheduled(self) -> None:
        if self.config.datapath.backend == "nftables":
            assert all(f'"{nic}"' in run("nft", "list", "table", "inet", "fabricpilot") for nic in ("nic0", "nic1"))
        for nic in ("nic0", "nic1"):
            if self.config.queues.kind != "none":
                assert " fab: root" in run("tc", "qdisc", "show", "dev", nic)
            if self.config.datapath.backend == "ebpf":
                assert [way for way, _ in our_programs(nic)] == [self.config.datapath.hook]


@pytest.fixture
def host(request, make_netns, tmp_path, loaded_once):
    with bpf_file_system(tmp_path / "bpf") as pins, in_netns(make_netns("host")):
        made = Host(*request.param, tmp_path, pins, loaded_once)
        yield made
        made.detach()


CHANGES = (
    *((os, name) for name in ("mkdir", "rename", "replace", "unlink", "rmdir")),
    *((bpf, name) for name in ("obj_pin", "update", "delete", "link_create", "link_update", "link_detach")),
    *((tc_filter, name) for name in ("add_clsact", "set_filter", "remove_filter", "remove_clsact_if_empty")),
    (rtnetlink, "_send"),
    (nft_library.Nft, "run"),
    (nftables, "_write_sysctl"),
    *((module, name) for module in (support, snapshot) for name in ("add_scratch_link", "remove_link")),
)


def killed_at(step: int, act) -> bool:
    """Run `act` in a child that kills itself right before its change number `step`; False if it got through first."""
    child = os.fork()
    if child == 0:
        left = step

        def counted(change):
            def call(*arguments, **options):
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*arguments, **options)

            return call

        try:
            for module, name in CHANGES:
                setattr(module, name, counted(getattr(module, name)))
            act()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


BY_TCX, BY_CLSACT, NFTABLES = ("ebpf", "tcx", "none"), ("ebpf", "clsact", "none"), ("nftables", "auto", "none")


def cases(hosts: dict[str, tuple[str, str, str]], *acts: str) -> list:
    return [pytest.param(host, act, id=f"{name}-{act}") for name, host in hosts.items() for act in acts]


# What it does to queues is always the same, so one way is tried with them; the others have a turn with -m slow.
@pytest.mark.parametrize("then", ["detach", pytest.param("run, detach", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("host", "what"),
    [
        *cases({"tcx and queues": ("ebpf", "tcx", "auto")}, "attach", "detach"),
        *cases({"tcx": BY_TCX}, "upgrade", "apply"),
        *cases({"clsact": BY_CLSACT}, "attach", "upgrade", "detach"),
        *cases({"nftables": NFTABLES}, "attach", "apply", "detach"),
        *(
            pytest.param(*case.values, id=case.id, marks=pytest.mark.slow)
            for case in cases(
                {"clsact and queues": ("ebpf", "clsact", "auto"), "nftables and queues": ("nftables", "auto", "auto")},
                "attach",
                "detach",
            )
        ),
    ],
    indirect=["host"],
)
def test_killed_at_every_step(host, what, then):
    if host.config.datapath.hook == "tcx" and not has_tcx():
        pytest.skip("this kernel lacks tcx (CONFIG_NET_XGRESS, Linux 6.6)")
    before, surroundings = host.state(), host.surroundings()
    objects = set()
    # Upgrades are mostly pins of maps, one like the other.
    stride = 4 if (what, then) == ("upgrade", "detach") else 1
    for step in range(1, MOST_STEPS, stride):
        if what != "attach":
            host.attach()
        if what == "apply":
            whole = {OTHER, host.thresholds()}
        killed = killed_at(step, getattr(host, what))
        if what == "apply":
            assert host.thresholds() in whole
        if what == "upgrade":
            host.assert_scheduled()  # all along, and never twice
        objects |= bpf_objects(host.pins / "fabricpilot", host.pins / "fabricpilot-new")
        if then != "detach":
            host.attach()
            host.assert_scheduled()
        host.detach()
        assert host.state() == before, f"killed before change {step} of {what}"
        if not killed:
            break
    print(f"{step - 1} changes")
    assert (1 if what == "apply" else 3) <= step - 1 < MOST_STEPS - 1 - stride
    assert host.surroundings() == surroundings
    wait_until_freed(objects - host.loaded)


OWN_MOUNT = """
import ctypes, os, sys
from pathlib import Path
from pyroute2 import IPRoute
from fabricpilot.config import AgentConfig, load
from hostagent.lifecycle import bring_up, take_down
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x00020000) == 0  # CLONE_NEWNS
assert libc.mount(b"none", b"/", None, 0x44000, None) == 0  # MS_REC | MS_PRIVATE
while Path("/sys/fs/bpf").is_mount():
    assert libc.umount2(b"/sys/fs/bpf", 2) == 0
def mounts():
    return [l for l in Path("/proc/self/mountinfo").read_text().splitlines() if "/sys/fs/bpf" in l]
settings = {"host.interfaces": ["nic0"], "host.run_dir": sys.argv[1], "queues.kind": "none",
            "datapath.flow_entries": 4096, "datapath.pin_dir": "/sys/fs/bpf/of/ours"}
config = load(AgentConfig, None, settings, {})
with IPRoute() as ipr:
    take_down(config, ipr)  # looks, and mounts nothing
    assert not mounts()
    for others in (False, True):
        scheduled = bring_up(config, ipr)
        scheduled.datapath.close()
        assert mounts()[0].endswith(" - bpf fabricpilot rw"), mounts()
        if others:
            Path("/sys/fs/bpf/theirs").mkdir()
        take_down(config, ipr)
        assert bool(mounts()) == others
        assert not Path("/sys/fs/bpf/of").exists()
    Path("/sys/fs/bpf/theirs").rmdir()
    take_down(config, ipr)  # nothing was left but the mount
    assert not mounts()
    assert libc.mount(b"bpf", b"/sys/fs/bpf", b"bpf", 0, None) == 0
    bring_up(config, ipr).datapath.close()
    take_down(config, ipr)
    assert mounts()  # somebody else's
print("done", flush=True)
"""


def test_the_bpf_file_system_that_an_agent_mounted_goes_once_nobody_uses_it(make_netns, tmp_path):
    with in_netns(make_netns("host")):
        run("ip", "link", "add", "nic0", "type", "veth", "peer", "name", "nic1")
        child = start_agent(OWN_MOUNT, str(tmp_path / "run"))
        said, _ = child.communicate(timeout=60)
        assert (child.returncode, said) == (0, "done\n")
