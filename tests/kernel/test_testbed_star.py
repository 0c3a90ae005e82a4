"""The star on the real kernel: it comes, carries flows, and goes without a trace, also when something fails."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from agent_kit import wait_for
from pyroute2 import IPRoute, netns

from fabricpilot.errors import FabricpilotError, KernelError, UsageError
from fabricpilot.levels import Thresholds
from testbed.capture.oracle import InForce, check
from testbed.capture.packets import read_packets
from testbed.capture.ring import RingCapture
from testbed.daemons import Daemons
from testbed.flows.recorded import RecordedTrace
from testbed.flows.replay import replay
from testbed.netns import star as star_module
from testbed.netns.enter import argv_in, call_in
from testbed.netns.programs import Programs
from testbed.netns.registry import Run, clean
from testbed.netns.star import BOTTLENECK_PORT, DATA_PORT, StarPlan
from testbed.netns.switch_port import parse_counters, port_counters, shape
from testbed.netns.tcp import base_rtt_us, tcp_counters


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run.create(tmp_path / "runs")
    yield made
    made.remove()


def ours(run: Run) -> list[str]:
    return [name for name in netns.listnetns() if run.name in name]


def test_star_comes_and_goes_without_a_trace(run: Run) -> None:
    links_before = Path("/proc/net/dev").read_text().count("\n")
    StarPlan(run, 3).build()
    assert len(ours(run)) == 3 + 4  # senders; receiver, switch, management switch, controller
    assert Path("/proc/net/dev").read_text().count("\n") == links_before  # no link on the machine itself
    run.remove()
    assert ours(run) == []
    assert not run.dir.exists()


def test_hosts_reach_the_receiver_and_the_controller_by_separate_networks(run: Run) -> None:
    star = StarPlan(run, 2)
    star.build()
    sender = star.sender_hosts[0]

    def reach(namespace: str, family: int, address: str, source: str = sender.namespace) -> bool:
        def connect() -> bool:
            with socket.create_connection((address, 7), 5) as connection:
                return bool(connection.getpeername()[1] == 7)

        with call_in(namespace, lambda: socket.create_server((address, 7), family=family)):
            return call_in(source, connect)

    assert reach(star.receiver.namespace, socket.AF_INET, star.receiver.address)
    assert reach(star.receiver.namespace, socket.AF_INET6, star.receiver.address6)
    assert reach(star.controller, socket.AF_INET, star.controller_address)
    with pytest.raises(OSError, match="Network is unreachable"):  # the controller has no way into the data network
        reach(star.receiver.namespace, socket.AF_INET, star.receiver.address, source=star.controller)
    with IPRoute(netns=sender.namespace) as link:
        port = link.get_links(ifname=DATA_PORT)[0]
        assert port.get_attr("IFLA_GSO_MAX_SEGS") == 1
        assert port.get_attr("IFLA_ADDRESS") == sender.mac


def test_failure_half_way_leaves_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(star_module, "SYSCTLS", {"net.ipv4.no_such_thing": "1"})
    with pytest.raises(KernelError, match=r"sysctl net\.ipv4\.no_such_thing"):
        StarPlan(run, 2).build()
    assert ours(run)
    run.remove()
    assert ours(run) == []


def test_number_of_senders_is_bounded(run: Run) -> None:
    for senders in (0, 65):
        with pytest.raises(UsageError, match="the star has 1 to 64"):
            StarPlan(run, senders)
    with pytest.raises(UsageError, match="3 receivers"):
        StarPlan(run, 2, receivers=3)


def test_flows_go_to_their_senders_receiver_only(run: Run, tmp_path: Path) -> None:
    star = StarPlan(run, 2, receivers=2)
    star.build()
    programs = Programs(run, tmp_path / "logs")
    shape(programs, star, 100_000_000, 64_000, None)
    trace = RecordedTrace(np.array([0, 0, 0]), np.array([100_000, 200_000, 300_000]), np.array([0, 1, 1]))
    assert replay(star, programs, trace, tmp_path, drain_s=10).lost == 0
    shown = ["tc", "-s", "qdisc", "show", "dev"]
    sent = [parse_counters(programs.run_in(star.switch, [*shown, port, "root"])).sent_bytes for port in ("rx", "rx1")]
    assert sent == [pytest.approx(100_000, rel=0.1), pytest.approx(500_000, rel=0.1)]
    assert port_counters(programs, star).sent_bytes >= sum(sent)


def test_small_trace_runs_to_its_end(run: Run, tmp_path: Path) -> None:
    star = StarPlan(run, 2)
    star.build()
    n = 60
    sizes = np.where(np.arange(n) % 10, 3_000, 1_000_000).astype(np.int64)
    trace = RecordedTrace(np.arange(n) * 10_000_000, sizes, np.arange(n) % 2)
    programs = Programs(run, tmp_path / "logs")
    ended: list[int] = []
    results = replay(star, programs, trace, tmp_path, drain_s=5, progress=lambda flows, _: ended.append(flows))
    assert results.lost == 0
    assert (results.fct_ns > results.late_ns).all()
    assert ended[-1] == n
    assert not any(program.alive for program in programs.started)
    results.save(tmp_path / "flows.csv")
    assert len((tmp_path / "flows.csv").read_text().splitlines()) == n + 1


def test_flows_without_an_end_by_the_deadline_are_lost(run: Run, tmp_path: Path) -> None:
    star = StarPlan(run, 1)
    star.build()
    with IPRoute(netns=star.switch) as link:  # an unplugged receiver
        link.link("set", index=link.link_lookup(ifname="rx")[0], state="down")
    trace = RecordedTrace(np.zeros(3, np.int64), np.full(3, 1000), np.zeros(3, np.int64))
    began = time.monotonic()
    results = replay(star, Programs(run, tmp_path / "logs"), trace, tmp_path, drain_s=0.5)
    assert results.lost == 3
    assert time.monotonic() - began < 60  # TCP itself would try for minutes


def test_clean_removes_ours_and_nothing_else(make_netns: Callable[[str], str], tmp_path: Path) -> None:
    other = make_netns("other")
    run = Run.create(tmp_path)
    StarPlan(run, 1).build()
    (run.dir / "owner").write_text("[1, 1]")  # as if its maker had died
    mount = run.dir / "bpf"
    mount.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", str(mount)], check=True)
    bystander = subprocess.Popen(argv_in(other, ["sleep", "60"]))
    daemon = Programs(run, tmp_path / "logs").start("daemon", star_module.StarPlan(run, 1).controller, ["sleep", "60"])
    try:
        removed = clean(base_dir=tmp_path)[0]
        assert removed.processes == [daemon.pid]
        assert removed.mounts == [str(mount)]
        assert len(removed.namespaces) == 5
        assert daemon.popen.wait(5) == -signal.SIGTERM
        assert ours(run) == []
        assert str(run.dir) not in Path("/proc/self/mountinfo").read_text()
        assert bystander.poll() is None
        assert other in netns.listnetns()
    finally:
        bystander.kill()
        bystander.wait()


def test_needs_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(KernelError, match="needs root"):
        Run.create(tmp_path)
    with pytest.raises(KernelError, match="needs root"):
        clean(base_dir=tmp_path)


def test_programs_end_with_their_children(run: Run, tmp_path: Path) -> None:
    star = StarPlan(run, 1)
    star.build()
    child = tmp_path / "child"
    script = 'sleep 60 & echo $! > "$0"; wait'
    program = Programs(run, tmp_path / "logs").start("parent", star.controller, ["sh", "-c", script, str(child)])
    wait_for(lambda: child.exists() and child.read_text())
    status = Path(f"/proc/{child.read_text().strip()}/stat")
    program.stop()
    wait_for(lambda: not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z")


def test_capture_sees_every_packet_of_a_flow(run: Run, tmp_path: Path) -> None:
    star = StarPlan(run, 2)
    star.build()
    ring = RingCapture(star.switch, (BOTTLENECK_PORT, "br0"), 20_000)
    sizes = np.array([100_000, 3_000_000], np.int64)
    trace = RecordedTrace(np.array([0, 1_000_000]), sizes, np.array([0, 1]))
    assert replay(star, Programs(run, tmp_path / "logs"), trace, tmp_path, drain_s=5).lost == 0
    ring.stop()
    count = ring.save(tmp_path / "capture.pcap")
    ring.close()
    assert ring.missed == 0
    packets = list(read_packets(tmp_path / "capture.pcap"))
    assert 0 < len(packets) <= count
    payload = {host.address: 0 for host in star.sender_hosts}
    for packet in packets:
        payload[packet.flow.source] += packet.payload_bytes  # a packet of the receiver would be a KeyError
        assert packet.payload_bytes <= 1448  # one packet is one wire packet
    assert all(sent >= size for sent, size in zip(payload.values(), sizes, strict=True))  # more where it was sent twice
    # Nobody tags here, so all packets carry DSCP 0: the oracle must call every one of them wrong.
    history = {host.address: [InForce(0, 0, Thresholds((20_000, 40_000, 60_000)))] for host in star.sender_hosts}
    verdict = check(packets, history, (32, 24, 16, 8))
    assert (verdict.flows, verdict.checked, verdict.correct) == (2, len(packets), 0)
    assert verdict.incomplete_flows == 0


def test_port_counters_and_rtt_come_from_the_star(run: Run, tmp_path: Path) -> None:
    star = StarPlan(run, 1)
    star.build()
    programs = Programs(run, tmp_path / "logs")
    for dscp in (None, (32, 24, 16, 8)):
        shape(programs, star, 100_000_000, 64_000, dscp)
        assert port_counters(programs, star).dropped == 0
    assert 1 < base_rtt_us(star) < 100_000
    before = tcp_counters(star)
    assert tcp_counters(star).since(before).retransmitted_segments == 0


def test_a_daemon_that_cannot_start_is_told_with_its_own_words(run: Run, tmp_path: Path) -> None:
    star = StarPlan(run, 1)
    star.build()
    programs = Programs(run, tmp_path / "logs")
    daemons = Daemons(star, programs, 100_000_000, 5.0)
    with IPRoute(netns=star.sender_hosts[0].namespace) as link:  # the NIC it is to schedule has gone
        link.link("del", index=link.link_lookup(ifname=DATA_PORT)[0])
    with pytest.raises(FabricpilotError, match=r"agent-s0 ended: .*interface 'eth0' does not exist"):
        daemons.start()
    daemons.stop()
    assert not any(program.alive for program in programs.started)
