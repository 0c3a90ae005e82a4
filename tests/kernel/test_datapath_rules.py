"""Operator rules on the real program: the kernel decides as the plain reading of the rules does, for any of them."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from datapath_kit import bpf_file_system, flow_key, in_netns, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fabricpilot.config import Rule
from fabricpilot.levels import Thresholds
from hostagent.datapath.base import Settings
from hostagent.datapath.cgroups import find_cgroup
from hostagent.datapath.ebpf import EbpfDatapath
from hostagent.datapath.rules import KEPT_OUTCOME_DTYPE, Flow, compile_rules, first_match, parse_rules
from hostagent.datapath.steering import Steering

DSCP = (32, 24, 16, 8)
SETTINGS = Settings(Thresholds((1000, 5000, 20000)), DSCP, (11, 12, 13, 14))
FLOW = flow_key()


@pytest.fixture
def sender(kernel_sender):
    kernel_sender.datapath.apply(SETTINGS)
    yield kernel_sender
    Steering(kernel_sender.datapath).clear()


def set_rules(sender, *rules: Rule) -> None:
    parsed = parse_rules(rules, 4, range(32))
    cgroups = [find_cgroup(rule.cgroup) if rule.cgroup else None for rule in parsed]
    Steering(sender.datapath).set_rules(compile_rules(parsed, cgroups), len(parsed))


def kept(sender, key):
    table = sender.datapath.flows()
    row = next(row for row in range(len(table)) if table.keys[row].tobytes() == key.tobytes())
    return table.states["rules"][row : row + 1].view(KEPT_OUTCOME_DTYPE)[0], table.states[row]


def test_a_pinned_flow_stays_on_its_level_whatever_it_sends(sender):
    set_rules(sender, Rule(action="pin", level=2, destination=["10.0.0.2/32"], destination_port=[80]))
    for payload, flags in ((0, {"syn": True}), (100, {}), (0, {}), (3000, {}), (3000, {})):
        left = sender.send(FLOW, payload, **flags)
        assert (left.dscp, left.priority) == (16, 13)
    outcome, state = kept(sender, FLOW)
    assert (outcome["rule"], outcome["level"], state["level"], state["attained_bytes"]) == (1, 3, 2, 6100)
    assert sender.send(flow_key(destination_port=81), 100, syn=True).dscp == 32


def test_a_packet_without_an_entry_heeds_the_rules_too(sender):
    set_rules(sender, Rule(action="pin", level=3, protocol="tcp"))
    assert sender.send(FLOW).dscp == 8  # a pure acknowledgement makes no entry
    assert len(sender.datapath.flows()) == 0


def test_an_excluded_flow_is_left_alone(sender):
    set_rules(sender, Rule(action="exclude", source=["10.0.0.0/24"]))
    left = sender.send(FLOW, 1200, syn=True)
    assert (left.dscp, left.priority) == (0, None)
    counters = sender.datapath.counters()
    assert (counters["excluded"], counters["packets_level_0"], counters["observed"]) == (1, 0, 0)


def test_an_observed_flow_is_levelled_and_left_alone(sender):
    set_rules(sender, Rule(action="observe", protocol="tcp"))
    for _ in range(3):
        left = sender.send(FLOW, 1000, syn=True)
        assert (left.dscp, left.priority) == (0, None)
    counters = sender.datapath.counters()
    assert (counters["observed"], counters["bytes_level_0"], counters["excluded"]) == (3, 3000, 0)


def test_the_first_match_decides_and_schedule_makes_exceptions(sender):
    set_rules(
        sender,
        Rule(source=["10.0.0.1/32"], destination_port=["80-89"]),
        Rule(action="pin", level=3, source=["10.0.0.0/8"]),
    )
    assert sender.send(FLOW, 100, syn=True).dscp == 32
    assert sender.send(flow_key(destination_port=90), 100, syn=True).dscp == 8


def test_rules_that_change_hold_from_the_next_packet_of_known_flows(sender):
    sender.send(FLOW, 100, syn=True)
    for level in (3, 1, 2):
        set_rules(sender, Rule(action="pin", level=level))
        assert sender.send(FLOW, 10).dscp == DSCP[level]
    set_rules(sender)
    assert sender.send(FLOW, 10).dscp == 32
    assert kept(sender, FLOW)[0]["rule"] == 0


def test_dscp_of_an_application_is_matched_and_respected(sender):
    set_rules(sender, Rule(action="exclude", dscp=[10]), Rule(action="pin", level=1, dscp=[0, 8]))
    assert sender.send(flow_key(source_port=1), 10, syn=True, dscp=10).dscp == 10
    assert sender.send(flow_key(source_port=2), 10, syn=True, dscp=8).dscp == 24
    assert sender.send(flow_key(source_port=3), 10, syn=True, dscp=46).dscp == 46
    assert (sender.datapath.counters()["excluded"], sender.datapath.counters()["foreign_dscp"]) == (1, 1)


def test_many_prefixes_and_rules_cost_no_rule_its_turn(sender):
    rules = [Rule(action="pin", level=i % 4, source=[f"10.{i}.{j}.0/24" for j in range(60)]) for i in range(64)]
    set_rules(sender, *rules)
    for i in (0, 1, 31, 32, 62, 63):
        key = flow_key(source=f"10.{i}.{(7 * i) % 60}.9")
        assert sender.send(key, 10, syn=True).dscp == DSCP[i % 4]
        assert kept(sender, key)[0]["rule"] == i + 1


ADDRESSES = ("10.0.0.1", "10.0.0.2", "10.0.1.1", "10.9.0.1", "192.168.0.1")
ADDRESSES_6 = ("2001:db8::1", "2001:db8::2", "2001:db8:1::1", "fd00::1")
NETWORKS = st.lists(
    st.sampled_from(
        [
            *("10.0.0.0/8", "10.0.0.0/24", "10.0.0.1/32", "10.0.0.0/31", "0.0.0.0/0", "::/0"),
            *("2001:db8::/32", "2001:db8::/64", "2001:db8::1/128", "192.168.0.0/16"),
        ]
    ),
    max_size=3,
)
PORTS = st.lists(
    st.one_of(
        st.sampled_from([0, 80, 81, 40000, 65535, "0-65535", "79-81", "80-40000", "1-65534"]),
        st.tuples(st.integers(0, 65535), st.integers(0, 65535)).map(lambda pair: "{}-{}".format(*sorted(pair))),
    ),
    max_size=3,
)
RULES = st.lists(
    st.builds(
        Rule,
        action=st.sampled_from(["schedule", "observe", "exclude"]),
        source=NETWORKS,
        destination=NETWORKS,
        source_port=PORTS,
        destination_port=PORTS,
        protocol=st.sampled_from(["any", "tcp", "udp"]),
        dscp=st.lists(st.sampled_from([0, 8, 10, 46, 63]), max_size=2),
    ),
    min_size=1,
    max_size=12,
)
PORT = st.one_of(st.sampled_from([0, 1, 79, 80, 81, 82, 40000, 65534, 65535]), st.integers(0, 65535))
FLOWS = st.lists(
    st.builds(
        lambda pair, ports, protocol, dscp: Flow(*pair, *ports, protocol, dscp),
        st.one_of(
            *(st.tuples(st.sampled_from(all_), st.sampled_from(all_)) for all_ in (ADDRESSES, ADDRESSES_6)),
        ),
        st.tuples(PORT, PORT),
        st.sampled_from([6, 17]),
        st.sampled_from([0, 8, 10, 46, 63]),
    ),
    min_size=1,
    max_size=12,
)


def test_the_kernel_decides_as_the_rules_read(sender):
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(RULES, FLOWS)
    def check(rules, flows):
        sender.reset()
        sender.datapath.apply(SETTINGS)
        set_rules(sender, *rules)
        parsed = parse_rules(rules, 4)
        for flow in flows:
            key = flow_key(flow.source, flow.destination, flow.source_port, flow.destination_port, flow.protocol)
            known = any(other.tobytes() == key.tobytes() for other in sender.datapath.flows().keys)
            if known:
                continue  # decided at its first packet, which may have had another DSCP
            sender.send(key, 10, syn=True, dscp=flow.dscp)
            wanted = first_match(parsed, [None] * len(parsed), flow)
            assert kept(sender, key)[0]["rule"] == (0 if wanted is None else wanted + 1), flow

    check()


@pytest.fixture
def cgroup():
    """A cgroup with another one in it; both go away."""
    root = next(
        (
            Path(line.split()[1])
            for line in Path("/proc/mounts").read_text().splitlines()
            if line.split()[2] == "cgroup2"
        ),
        None,
    )
    if root is None:
        pytest.skip("needs cgroup v2 mounted (CONFIG_CGROUPS)")
    outer = root / f"fptest-{uuid.uuid4().hex[:8]}"
    inner = outer / "inner"
    inner.mkdir(parents=True)
    yield outer
    inner.rmdir()
    outer.rmdir()


SEND = "import socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', int(sys.argv[1])));"


def test_a_rule_by_cgroup_matches_local_sockets_in_it_and_below(make_netns, tmp_path, cgroup):
    name = make_netns("cg")
    run("ip", "link", "add", "nic0", "type", "veth", "peer", "name", "nic1", netns=name)
    run("ip", "addr", "add", "10.77.0.1/24", "dev", "nic0", netns=name)
    run("ip", "neigh", "add", "10.77.0.2", "lladdr", "02:00:00:00:00:02", "dev", "nic0", netns=name)
    for nic in ("nic0", "nic1"):
        run("ip", "link", "set", nic, "up", netns=name)
    with bpf_file_system(tmp_path / "bpf") as root, in_netns(name):
        datapath = EbpfDatapath(root / "fabricpilot", 4096)
        try:
            datapath.apply(SETTINGS)
            datapath.attach("nic0")
            steering = Steering(datapath)
            parsed = parse_rules([Rule(action="pin", level=2, cgroup=f"/{cgroup.name}")], 4)
            steering.set_rules(compile_rules(parsed, [find_cgroup(f"/{cgroup.name}")]), 1)
            for port, place in ((4001, None), (4002, cgroup), (4003, cgroup / "inner")):
                code = SEND + "s.sendto(b'x' * 100, ('10.77.0.2', 9))"
                move = f"open({str(place / 'cgroup.procs')!r}, 'w').write('0');" if place else ""
                subprocess.run([sys.executable, "-c", move + code, str(port)], check=True, timeout=20)
            table = datapath.flows()
            levels = dict(zip(table.keys["source_port"].tolist(), table.states["level"].tolist(), strict=True))
            assert levels == {4001: 0, 4002: 2, 4003: 2}
        finally:
            datapath.detach()
            datapath.close()


def test_a_cgroup_that_does_not_exist_matches_nothing(sender):
    set_rules(sender, Rule(action="exclude", cgroup=f"/no-such-{os.getpid()}"), Rule(action="pin", level=1))
    assert sender.send(FLOW, 100, syn=True).dscp == 24
