"""The operator's scripts: the same tree as the agent's, idempotent, strict about their input, and right about DSCP."""

import json
import socket
import subprocess
import time
from pathlib import Path

import pytest
from pyroute2 import IPRoute, netns

from fabricpilot.config import QueuesSection
from fabricpilot.levels import default_dscp
from hostagent.qdisc import install, installed, plan_queues, supported_kinds
from hostagent.qdisc.plan import KERNEL_OPTION

SCRIPTS = Path(__file__).parents[2] / "tc_scripts"
RATE = "100mbit"


class Port:
    """A namespace with a veth `nic` (10.8.0.1) whose other end has an address too, so that packets leave."""

    def __init__(self, name):
        self.name = name

    def script(self, script, *words):
        command = ["ip", "netns", "exec", self.name, SCRIPTS / script, *" ".join(words).split()]
        return subprocess.run(command, capture_output=True, text=True, timeout=30)

    def good(self, script, *words):
        done = self.script(script, *words)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    def tc(self, words):
        return subprocess.run(
            ["tc", "-n", self.name, *words.split()], check=True, capture_output=True, text=True
        ).stdout

    def state(self):
        qdiscs = json.loads(self.tc("-j qdisc show dev nic"))
        for qdisc in qdiscs:
            qdisc.get("options", {}).pop("direct_packets_stat", None)
        filters = [json.loads(self.tc(f"-j filter show dev nic parent {q['handle']}")) for q in qdiscs]
        # fq_codel shows a class for each flow it holds just now.
        classes = [line for line in self.tc("class show dev nic").splitlines() if "class fq_codel" not in line]
        return sorted(qdiscs, key=str), sorted(classes), filters

    def wait(self, condition, limit_s=5):
        end = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)

    def sent(self):
        """Packets so far by level; bands are the children of fab:."""
        found = {}
        for qdisc in json.loads(self.tc("-s -j qdisc show dev nic")):
            parent = qdisc.get("parent", "")
            if parent.startswith("fab:"):
                found[int(parent[4:], 16) - 1] = qdisc["packets"]
        return [found[level] for level in sorted(found)]


@pytest.fixture
def port(make_netns):
    name, other = make_netns("port"), make_netns("peer")
    with IPRoute(netns=name) as ipr:
        ipr.link("add", ifname="nic", kind="veth", peer={"ifname": "nic", "net_ns_fd": other})
    for namespace, last in ((name, 1), (other, 2)):
        ip(namespace, f"link set nic address 02:00:00:00:00:0{last} up")
        ip(namespace, f"addr add 10.8.0.{last}/24 dev nic")
        ip(namespace, f"addr add fd08::{last}/64 dev nic nodad")
    return Port(name)


def ip(namespace, words):
    subprocess.run(["ip", "-n", namespace, *words.split()], check=True, capture_output=True)


def introduce(port):
    """The peer's address is known, so that nothing but what a test sends leaves."""
    for address in ("10.8.0.2", "fd08::2"):
        ip(port.name, f"neigh replace {address} lladdr 02:00:00:00:00:02 dev nic nud permanent")


def need(port, *kinds):
    with IPRoute(netns=port.name) as ipr:
        have = supported_kinds(ipr)
    for kind in kinds:
        if kind not in have:
            pytest.skip(f"this kernel lacks {KERNEL_OPTION[kind]}")


@pytest.mark.parametrize("levels", [2, 4, 8])
@pytest.mark.parametrize("kind", ["auto", "prio", "htb"])
def test_host_builds_the_agents_tree(port, tmp_path, kind, levels):
    need(port, *([] if kind == "auto" else [kind]))
    before = port.state()
    words = f"nic --kind {kind} --levels {levels} --rate {RATE}"
    printed = port.good("host", words, "--dry-run")
    assert port.state() == before
    port.good("host", words)
    by_script = port.state()
    port.good("host", words)
    assert port.state() == by_script

    with IPRoute(netns=port.name) as ipr:
        plan = plan_queues("nic", QueuesSection(kind=kind, link_rate=RATE), levels, ipr)
        assert tuple(printed.splitlines()) == plan.commands("nic")
        # The agent adopts what the script built,
        install(plan, "nic", ipr, tmp_path)
        assert installed("nic", ipr, tmp_path) == plan
        assert port.state() == by_script
        # and builds the same where there is nothing.
        port.good("teardown", "nic")
        assert port.state() == before
        install(plan, "nic", ipr, tmp_path)
        assert port.state() == by_script
    port.good("teardown", "nic")
    port.good("teardown", "nic")
    assert port.state() == before


@pytest.mark.parametrize("levels", range(2, 9))
def test_switch_uses_the_default_dscp(port, levels):
    need(port, "htb", "u32")
    printed = port.good("switch", f"nic --rate {RATE} --levels {levels} --dry-run").splitlines()
    for level, code in enumerate(default_dscp(levels)):
        value = f"{code << 2:#04x}"
        assert any(f"match ip dsfield {value} 0xfc flowid fab:{level + 1}" in line for line in printed)
        assert any(f"match ip6 priority {value} 0xfc flowid fab:{level + 1}" in line for line in printed)


def send(port, dscp, family=socket.AF_INET, count=5):
    netns.pushns(port.name)
    try:
        sock = socket.socket(family, socket.SOCK_DGRAM)
    finally:
        netns.popns()
    with sock:
        if family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, dscp << 2 | 1)  # an ECN bit, which is not the DSCP's
            to = ("10.8.0.2", 9)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, dscp << 2 | 1)
            to = ("fd08::2", 9)
        for _ in range(count):
            sock.sendto(b"x" * 100, to)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("levels", [2, 4, 8])
def test_switch_puts_each_dscp_into_its_band(port, levels, family):
    need(port, "htb", "u32")
    introduce(port)
    port.good("switch", f"nic --rate {RATE} --levels {levels}")
    ours = default_dscp(levels)
    for dscp in (*ours, 46, 1):  # expedited forwarding and an unused one are none of ours
        before = port.sent()
        send(port, dscp, family)
        gained = [after - was for after, was in zip(port.sent(), before, strict=True)]
        level = ours.index(dscp) if dscp in ours else levels - 1
        # The kernel itself may send a solicitation or a multicast report meanwhile.
        assert [band for band, packets in enumerate(gained) if packets >= 5] == [level]


def test_control_traffic_is_first(port):
    need(port, "htb", "u32")
    port.good("switch", f"nic --rate {RATE}")
    time.sleep(1.2)  # the link is up for all of the kernel, IPv6 too
    before = port.sent()
    send(port, 46)  # finds its neighbour first, by ARP
    send(port, 46, socket.AF_INET6)  # by ICMPv6
    send(port, 48)  # network control
    gained = [after - was for after, was in zip(port.sent(), before, strict=True)]
    assert gained[0] >= 5 + 2  # 48, ARP and ICMPv6 at once; what waits for a neighbour leaves when it answers
    port.wait(lambda: port.sent()[3] - before[3] == 10)
    assert gained[1:3] == [0, 0]


def test_fifo_has_the_same_rate_and_buffer(port):
    need(port, "htb")
    words = f"nic --rate {RATE} --buffer 300KB"
    port.good("switch", words)
    strict = json.loads(port.tc("-j qdisc show dev nic"))
    rates = {line.split("rate ")[1].split()[0] for line in port.tc("class show dev nic").splitlines() if "root" in line}
    port.good("switch", words, "--fifo")
    fifo = json.loads(port.tc("-j qdisc show dev nic"))
    limits = [sum(q["options"]["limit"] for q in qdiscs if q["kind"] == "bfifo") for qdiscs in (strict, fifo)]
    assert limits == [300_000, 300_000]
    assert len([q for q in fifo if q["kind"] == "bfifo"]) == 1
    assert {
        line.split("rate ")[1].split()[0] for line in port.tc("class show dev nic").splitlines() if "root" in line
    } == rates
    send(port, 0)
    assert port.sent()[0] >= 5


def test_the_buffer_can_be_shared_unequally(port):
    need(port, "htb", "u32")
    port.good("switch", f"nic --rate {RATE} --buffer 600KB --share 1,1,1,3")
    qdiscs = json.loads(port.tc("-j qdisc show dev nic"))
    assert sorted(q["options"]["limit"] for q in qdiscs if q["kind"] == "bfifo") == [100_000] * 3 + [300_000]


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        ("switch", "", "give the port's rate"),
        ("switch", "--rate 1gbit", "name a network interface"),
        ("switch", "eth9 --rate 1gbit", "no network interface 'eth9'"),
        ("switch", "nic --rate", "--rate needs a value"),
        ("switch", "nic --rate fast", "rate 'fast'"),
        ("switch", "nic --rate 1kbit", "at least 1mbit"),
        ("switch", "nic --rate 1gbit --levels 9", "2 to 8"),
        ("switch", "nic --rate 1gbit --dscp 1,2,3", "3 code points"),
        ("switch", "nic --rate 1gbit --dscp 1,1,2,3", "given twice"),
        ("switch", "nic --rate 1gbit --dscp 1,2,3,64", "0 to 63"),
        ("switch", "nic --rate 1gbit --dscp 1,2,3,08", "0 to 63"),
        ("switch", "nic --rate 1gbit --buffer 1KB", "too small"),
        ("switch", "nic --rate 1gbit --buffer lots", "size 'lots'"),
        ("switch", "nic --rate 1gbit --share 1,2", "2 weights"),
        ("switch", "nic --rate 1gbit --share 1,2,0,3", "share '0'"),
        ("switch", "nic --rate 1gbit --speed", "unknown option '--speed'"),
        ("switch", "nic eth0 --rate 1gbit", "one interface"),
        ("host", "", "name a network interface"),
        ("host", "eth9", "no network interface 'eth9'"),
        ("host", "nic --kind magic", "kind 'magic'"),
        ("host", "nic --leaf magic", "leaf 'magic'"),
        ("host", "nic --levels 1", "2 to 8"),
        ("host", "nic --rate 9999999999999999", "rate '9999999999999999'"),
        ("show", "eth9", "no network interface 'eth9'"),
        ("teardown", "--force", "unknown option"),
    ],
)
def test_wrong_input_is_one_line(port, script, words, says):
    before = port.state()
    done = port.script(script, words)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert port.state() == before


@pytest.mark.parametrize("script", ["host", "switch"])
def test_a_foreign_qdisc_is_refused(port, script):
    need(port, "htb", "u32")
    port.tc("qdisc replace dev nic root handle 7: bfifo limit 123456")
    before = port.state()
    done = port.script(script, f"nic --rate {RATE}")
    assert done.returncode == 2
    assert "--replace" in done.stderr
    assert port.state() == before
    assert port.good("teardown", "nic") == ""
    assert port.state() == before
    port.good(script, f"nic --rate {RATE} --replace")
    assert port.state() != before


def test_a_tree_that_cannot_be_finished_goes_away(port, make_netns):
    need(port, "htb", "u32")
    before = port.state()
    shim = f"""
        tc() {{ case "$*" in *"flowid fab:4") return 1 ;; *) command tc "$@" ;; esac; }}
        set -- nic --rate {RATE}
        . ./switch
    """
    done = subprocess.run(
        ["ip", "netns", "exec", port.name, "dash", "-c", shim, "./switch"],
        cwd=SCRIPTS,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "nothing of ours is left" in done.stderr
    assert port.state() == before


def test_show_counts_what_went_through(port):
    need(port, "htb", "u32")
    nothing = port.script("show", "nic")
    assert nothing.returncode == 1
    assert "no bands of ours" in nothing.stderr
    introduce(port)
    port.good("switch", f"nic --rate {RATE}")
    send(port, 16)
    rows = [line.split() for line in port.good("show", "nic").splitlines()]
    assert rows[0] == ["nic:", "htb", "at", "100Mbit"]
    level_2 = next(row for row in rows if row[0] == "2")
    assert level_2[1:5] == ["bfifo", str(5 * 142), "5", "0"]


@pytest.mark.parametrize("script", ["host", "switch", "show", "teardown"])
def test_help_needs_nothing(script):
    done = subprocess.run([SCRIPTS / script, "--help"], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {script} INTERFACE")
    assert done.stderr == ""
