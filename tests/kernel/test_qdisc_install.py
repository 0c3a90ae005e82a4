"""Queues on a real NIC (a veth): built, recognised, changed, taken away; what somebody else configured survives."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from pyroute2 import IPRoute

from fabricpilot.config import QueuesSection
from fabricpilot.errors import FabricpilotError, KernelError, UsageError
from hostagent.qdisc import install, installed, plan_queues, restore, restore_preview, snapshot, supported_kinds
from hostagent.qdisc.link import add_scratch_link, remove_abandoned_links, remove_link
from hostagent.qdisc.objects import TcObject, same_tree
from hostagent.qdisc.plan import KERNEL_OPTION
from hostagent.qdisc.rtnetlink import read_objects

install_module = sys.modules[install.__module__]

KINDS = ["prio", "htb", "pfifo_fast"]
RATE = "100Mbit"


class Host:
    """A namespace with a veth `nic`, and an agent's rtnetlink socket in it."""

    def __init__(self, name, ipr, run_dir):
        self.name, self.ipr, self.run_dir = name, ipr, run_dir

    def tc(self, *words):
        command = ["tc", "-n", self.name, *" ".join(words).split()]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def state(self):
        """Everything tc shows of the NIC, without what only counts."""
        qdiscs = json.loads(self.tc("-j qdisc show dev nic"))
        for qdisc in qdiscs:
            qdisc.get("options", {}).pop("direct_packets_stat", None)
        # fq_codel shows a class for each flow it holds just now.
        classes = sorted(line for line in self.tc("class show dev nic").splitlines() if "class fq_codel" not in line)
        filters = [json.loads(self.tc(f"-j filter show dev nic parent {q['handle']}")) for q in qdiscs]
        return sorted(qdiscs, key=str), classes, filters

    def plan(self, kind="auto", levels=4, rate=RATE, replace_foreign=False):
        section = QueuesSection(kind=kind, link_rate=rate, replace_foreign=replace_foreign)
        return plan_queues("nic", section, levels, self.ipr)

    def install(self, plan):
        install(plan, "nic", self.ipr, self.run_dir)

    def installed(self):
        return installed("nic", self.ipr, self.run_dir)

    def restore(self):
        return restore("nic", self.ipr, self.run_dir)

    def records(self):
        """What an agent has written down about interfaces."""
        return list(self.run_dir.glob("qdisc-*"))

    def links(self):
        return sorted(link.get_attr("IFLA_IFNAME") for link in self.ipr.get_links())

    def need(self, *kinds):
        for kind in kinds:
            if kind not in supported_kinds(self.ipr):
                pytest.skip(f"this kernel lacks {KERNEL_OPTION[kind]}")


@pytest.fixture
def host(make_netns, tmp_path):
    name = make_netns("host")
    with IPRoute(netns=name) as ipr:
        ipr.link("add", ifname="nic", kind="veth", peer="peer")
        for interface in ("nic", "peer"):
            ipr.link("set", index=ipr.link_lookup(ifname=interface)[0], state="up")
        yield Host(name, ipr, tmp_path / "run")


def test_looking_leaves_no_trace(host):
    before = host.links(), host.state()
    kinds = supported_kinds(host.ipr)
    assert kinds >= {"pfifo_fast"}
    host.plan()
    assert (host.links(), host.state()) == before
    assert not host.run_dir.exists()


@pytest.mark.parametrize("levels", [2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_install_and_restore(host, kind, levels):
    host.need(kind)
    before = host.state()
    plan = host.plan(kind, levels)
    assert plan.kind == kind
    assert len(plan.priority) == levels
    host.install(plan)
    built = host.state()
    assert built != before
    assert host.installed() == plan
    host.install(plan)
    assert host.state() == built
    assert restore_preview("nic", host.ipr, host.run_dir) == ("tc qdisc del dev nic root",)
    assert host.restore()
    assert host.state() == before
    assert not host.records()
    assert not host.restore()
    assert host.installed() is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_printed_commands_build_the_same_tree(host, kind):
    host.need(kind)
    plan = host.plan(kind)
    for command in plan.commands("nic"):
        host.tc(command.removeprefix("tc "))
    index = host.ipr.link_lookup(ifname="nic")[0]
    assert same_tree(read_objects(host.ipr, index), plan.objects)
    by_tc = host.state()
    host.tc("qdisc del dev nic root")
    host.install(plan)
    assert host.state() == by_tc


def test_auto_takes_the_best_there_is(host):
    kinds = supported_kinds(host.ipr)
    plan = host.plan()
    assert plan.kind == ("prio" if "prio" in kinds else "htb" if "htb" in kinds else "pfifo_fast")
    if plan.kind != "prio":
        assert KERNEL_OPTION["prio"] in plan.why
    assert "\n" not in plan.why


def test_a_kind_the_kernel_lacks_is_named(host):
    missing = {"prio", "htb"} - supported_kinds(host.ipr)
    if not missing:
        pytest.skip("this kernel has every kind")
    for kind in missing:
        with pytest.raises(KernelError, match=KERNEL_OPTION[kind]):
            host.plan(kind)


def test_none_leaves_everything_alone(host):
    host.tc("qdisc replace dev nic root handle 7: bfifo limit 123456")
    before = host.state()
    plan = host.plan("none")
    assert plan.priority == (0, 0, 0, 0)
    assert plan.commands("nic") == ()
    host.install(plan)
    assert host.state() == before
    assert not host.restore()
    assert host.state() == before


def test_unknown_interface(host):
    with pytest.raises(UsageError, match=r"interface 'eth9' does not exist; there are: .*nic"):
        plan_queues("eth9", QueuesSection(), 4, host.ipr)
    plan = host.plan()
    with pytest.raises(UsageError, match="eth9"):
        install(plan, "eth9", host.ipr, host.run_dir)
    assert not restore("eth9", host.ipr, host.run_dir)


def test_htb_asks_for_a_rate_nobody_knows(host):
    host.need("htb")
    with pytest.raises(UsageError, match=r"queues\.link_rate"):
        host.plan("htb", rate="")


def test_a_new_agent_adopts_and_a_new_rate_changes_in_place(host):
    host.need("htb")
    host.install(host.plan("htb"))
    before = read_objects(host.ipr, host.ipr.link_lookup(ifname="nic")[0])
    faster = host.plan("htb", rate="200Mbit")
    host.install(faster)
    assert host.installed() == faster
    after = host.state()
    assert any("rate 200Mbit" in line for line in after[1])
    assert not same_tree(read_objects(host.ipr, host.ipr.link_lookup(ifname="nic")[0]), before)
    host.restore()
    host.install(faster)
    assert host.state() == after


def test_a_tree_without_a_record_is_adopted_too(host):
    plan = host.plan()
    before = host.state()
    host.install(plan)
    host.records()[0].unlink()
    assert host.installed() is None
    host.install(plan)
    assert host.installed() == plan
    host.restore()
    assert host.state() == before


FOREIGN = {
    "one queue": ["qdisc replace dev nic root handle 7: bfifo limit 123456"],
    "shaper": ["qdisc replace dev nic root handle 8: tbf rate 50mbit burst 20kb limit 100kb"],
    "classes": [
        "qdisc replace dev nic root handle 1: htb default 30 r2q 5",
        "class add dev nic parent 1: classid 1:1 htb rate 90mbit ceil 90mbit burst 15k",
        "class add dev nic parent 1:1 classid 1:20 htb rate 10mbit ceil 90mbit prio 1",
        "class add dev nic parent 1:1 classid 1:30 htb rate 5mbit ceil 50mbit prio 2",
        "class add dev nic parent 1:30 classid 1:31 htb rate 1mbit ceil 2mbit",
        "qdisc add dev nic parent 1:20 handle 20: pfifo limit 77",
        "filter add dev nic parent 1: protocol ip prio 5 u32 match ip dport 22 0xffff flowid 1:20",
        "filter add dev nic parent 1: protocol ip prio 3 u32 match ip src 10.1.2.0/24 flowid 1:31",
        "filter add dev nic parent 1: protocol ipv6 prio 4 u32 match ip6 priority 0x10 0xff flowid 1:20",
    ],
    "hash table": [
        "qdisc replace dev nic root handle 1: htb",
        "class add dev nic parent 1: classid 1:1 htb rate 90mbit",
        "filter add dev nic parent 1: protocol ip prio 5 handle 2: u32 divisor 256",
        "filter add dev nic parent 1: protocol ip prio 5 u32 ht 2:7b: match ip src 10.0.0.123 flowid 1:1",
    ],
}


FOREIGN["other filters"] = [
    "qdisc replace dev nic root handle 1: htb default 1",
    "class add dev nic parent 1: classid 1:1 htb rate 90mbit",
    "filter add dev nic parent 1: protocol ip prio 1 flower ip_proto tcp dst_port 80 classid 1:1",
    "filter add dev nic parent 1: protocol all prio 2 matchall classid 1:1",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_qdisc_is_refused_or_comes_back_exactly(host, name):
    for command in FOREIGN[name]:
        try:
            host.tc(command)
        except subprocess.CalledProcessError as error:
            if "flower" not in command or not re.search("not found|No such file", error.stderr):
                raise
            pytest.skip("this kernel lacks CONFIG_NET_CLS_FLOWER")
    before = host.state()
    with pytest.raises(UsageError, match=r"queues\.replace_foreign"):
        host.plan()
    assert host.state() == before

    plan = host.plan(replace_foreign=True)
    host.install(plan)
    assert host.installed() == plan
    assert len(restore_preview("nic", host.ipr, host.run_dir)) == 2
    # Another agent, another K: the snapshot of the original is kept.
    host.install(host.plan(levels=6, replace_foreign=True))
    assert host.restore()
    assert host.state() == before
    assert host.links() == ["lo", "nic", "peer"]


def test_what_could_not_come_back_is_not_touched(host):
    """A redirect to another interface: the temporary one it is tried on cannot show that it would come back."""
    host.tc("qdisc replace dev nic root handle 1: htb default 1")
    host.tc("class add dev nic parent 1: classid 1:1 htb rate 90mbit")
    match = "protocol ip prio 1 u32 match u32 0 0 flowid 1:1"
    host.tc(f"filter add dev nic parent 1: {match} action mirred egress redirect dev peer")
    before = host.state()
    plan = host.plan(replace_foreign=True)
    with pytest.raises(UsageError, match="cannot be put back exactly"):
        host.install(plan)
    assert host.links() == ["lo", "nic", "peer"]
    assert not host.records()
    assert host.state()[:2] == before[:2]
    assert "Redirect to device peer" in host.tc("filter show dev nic parent 1:")


def test_clsact_is_left_alone(host):
    host.tc("qdisc add dev nic clsact")
    host.tc("filter add dev nic egress protocol ip prio 1 u32 match u32 0 0 classid 1:1")
    egress = "-j filter show dev nic egress"
    before = host.tc(egress)
    assert json.loads(before)
    host.install(host.plan())
    assert host.tc(egress) == before
    host.restore()
    assert host.tc(egress) == before


def test_the_administrator_wins(host):
    host.install(host.plan())
    host.tc("qdisc replace dev nic root handle 7: bfifo limit 123456")
    theirs = host.state()
    assert host.installed() is None
    assert not host.restore()
    assert host.state() == theirs


def test_a_failing_build_puts_back_what_was_there(host):
    for command in FOREIGN["classes"]:
        host.tc(command)
    before = host.state()
    good = host.plan(replace_foreign=True)
    orphan = TcObject("qdisc", "bfifo", 0x99_0000, 0x98_0001, bytes(4))
    with pytest.raises(KernelError, match="the kernel refused"):
        host.install(replace(good, objects=(*good.objects, orphan)))
    assert host.state() == before
    assert not host.records()


def test_an_interface_made_anew_owes_nothing_to_the_old_one(host):
    host.tc("qdisc replace dev nic root handle 7: bfifo limit 123456")
    host.install(host.plan(replace_foreign=True))
    host.ipr.link("del", index=host.ipr.link_lookup(ifname="nic")[0])
    host.ipr.link("add", ifname="nic", kind="veth", peer="peer")
    assert host.installed() is None
    host.install(host.plan())
    assert host.restore()
    assert "bfifo" not in host.tc("qdisc show dev nic")


def test_a_record_belongs_to_the_interface_whatever_its_name(host):
    """Two NICs swap their names, as they do when udev has its say: each gets back what was its own."""
    for name, limit in (("nic", 110592), ("peer", 222208)):
        host.tc(f"qdisc replace dev {name} root handle 7: bfifo limit {limit}")
        install(host.plan(replace_foreign=True), name, host.ipr, host.run_dir)
    index = {name: host.ipr.link_lookup(ifname=name)[0] for name in ("nic", "peer")}
    for before, after in (("nic", "third"), ("peer", "nic"), ("third", "peer")):
        host.ipr.link("set", index=host.ipr.link_lookup(ifname=before)[0], state="down")
        host.ipr.link("set", index=host.ipr.link_lookup(ifname=before)[0], ifname=after)
    assert host.ipr.link_lookup(ifname="nic") == [index["peer"]]
    for name in ("nic", "peer"):
        assert restore(name, host.ipr, host.run_dir)
    assert "limit 217Kb" in host.tc("qdisc show dev nic")
    assert "limit 108Kb" in host.tc("qdisc show dev peer")
    assert not host.records()


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


@pytest.mark.parametrize("what", ["another plan", "put back"])
def test_killed_between_two_objects_loses_nothing_of_the_original(host, monkeypatch, what):
    for command in FOREIGN["classes"]:
        host.tc(command)
    before = host.state()
    host.install(host.plan(replace_foreign=True))

    def act():
        if what == "put back":
            host.restore()
        else:
            host.install(host.plan(levels=6, replace_foreign=True))

    for step in range(1, 100):
        left = step

        def count(*_):
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed

        with monkeypatch.context() as patch:
            for module, name in (
                (install_module, "delete_root"),
                (install_module, "create"),
                (snapshot, "create"),
                (install_module, "drop_record"),
            ):
                original = getattr(module, name)
                patch.setattr(module, name, lambda *given, _do=original: (count(), _do(*given))[1])
            try:
                act()
            except Killed:
                pass
            else:
                break
        host.restore()
        assert host.state() == before, f"step {step}"
        assert not host.records()
        host.install(host.plan(replace_foreign=True))
    assert step > 5
    host.restore()
    assert host.state() == before


def test_a_half_restored_qdisc_that_somebody_replaced_stays_replaced(host, monkeypatch):
    host.tc(*FOREIGN["one queue"])
    host.install(host.plan(replace_foreign=True))
    with monkeypatch.context() as patch:
        patch.setattr(install_module, "replay", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            host.restore()
    host.tc("qdisc replace dev nic root handle 9: bfifo limit 999999")
    theirs = host.state()
    assert not host.restore()
    assert host.state() == theirs
    assert not host.records()


def test_temporary_interfaces_of_a_killed_process_are_removed_others_are_not(host):
    mine = add_scratch_link(host.ipr)
    dead = subprocess.Popen(["true"])
    dead.wait()
    host.ipr.link("add", ifname=f"fptry{dead.pid:07x}ab", kind="veth", peer=f"fptry{dead.pid:07x}abp")
    host.ipr.link("add", ifname="fptrying", kind="veth", peer="peer2")
    assert remove_abandoned_links(host.ipr) == [f"fptry{dead.pid:07x}ab"]
    assert set(host.links()) >= {mine.name, "fptrying", "nic", "lo"}
    assert not any(f"{dead.pid:07x}" in name for name in host.links())
    remove_link(host.ipr, mine)


def test_an_unreadable_record_says_what_to_do(host):
    host.install(host.plan())
    host.records()[0].write_text("{")
    with pytest.raises(FabricpilotError, match="put that right by hand"):
        host.installed()


def test_a_run_directory_that_cannot_be_written_changes_nothing(host, tmp_path):
    before = host.state()
    host.run_dir = tmp_path / "file"
    host.run_dir.write_text("")
    with pytest.raises(FabricpilotError, match=r"host\.run_dir"):
        host.install(host.plan())
    assert host.state() == before
