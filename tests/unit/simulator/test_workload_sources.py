"""Placement, mixes and imports of real traffic."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fabricpilot.errors import UsageError
from simulator.workloads.arrivals import poisson
from simulator.workloads.capture import read_pcap
from simulator.workloads.connections import read_connections
from simulator.workloads.distribution import SizeDistribution
from simulator.workloads.placement import HostGroup, Phase, all_to_all, hourly, schedule, spatial_mix, to_one

WEB = SizeDistribution.load("websearch_bytes_hpcc")
MINING = SizeDistribution.load("datamining_vl2_pkts1460_pias_ns2")


def test_placements_cover_all_hosts_and_never_loop() -> None:
    rng = np.random.default_rng(1)
    trace = poisson(WEB, 0.5, 1e9, rng, count=2000)
    one = to_one(trace, 5, rng, receiver=2)
    assert set(one.source.tolist()) == {0, 1, 3, 4}
    assert set(one.destination.tolist()) == {2}
    every = all_to_all(trace, 5, rng)
    assert (every.source != every.destination).all()
    assert len(set(zip(every.source.tolist(), every.destination.tolist(), strict=True))) == 20
    with pytest.raises(UsageError):
        all_to_all(trace, 1, rng)
    with pytest.raises(UsageError):
        to_one(trace, 5, rng, receiver=5)


def test_spatial_mix_gives_every_group_its_own_load_and_sizes() -> None:
    groups = [HostGroup((0, 1), WEB, 0.6), HostGroup((2,), WEB.scaled(0.01), 0.3)]
    trace = spatial_mix(groups, 1e9, 6, np.random.default_rng(1), duration_s=500)
    assert (trace.source != trace.destination).all()
    for host, load in ((0, 0.6), (1, 0.6), (2, 0.3)):
        assert trace.size_bytes[trace.destination == host].sum() * 8 / 500e9 == pytest.approx(load, rel=0.1)
    assert trace.size_bytes[trace.destination == 2].max() < trace.size_bytes[trace.destination == 0].max() / 50
    with pytest.raises(UsageError, match="load"):
        spatial_mix([HostGroup((0,), WEB, 1.1)], 1e9, 6, np.random.default_rng(1), duration_s=1)
    with pytest.raises(UsageError, match="hosts from 0"):
        spatial_mix([HostGroup((7,), WEB, 0.5)], 1e9, 6, np.random.default_rng(1), duration_s=1)


def test_hourly_schedule_changes_every_hour_and_comes_in_order() -> None:
    rng = np.random.default_rng(4)
    phases = hourly([WEB, MINING], [0.6, 0.7, 0.8], 8, rng, hour_s=40.0)
    assert len(phases) == 8
    for before, after in pairwise(phases):
        assert (before.distribution, before.load) != (after.distribution, after.load)
    parts = list(schedule([Phase(WEB, 0.5, 30.0), Phase(WEB, 0.8, 30.0)], 1e9, 4, rng, part_s=10.0))
    starts = np.concatenate([p.start_s for p in parts])
    assert (np.diff(starts) >= 0).all()
    assert starts[-1] < 60
    late = starts >= 30
    assert late.sum() / (~late).sum() == pytest.approx(0.8 / 0.5, rel=0.15)


def test_capture_becomes_flows(tmp_path: Path) -> None:
    from scapy.layers.inet import IP, TCP, UDP
    from scapy.layers.inet6 import IPv6
    from scapy.layers.l2 import Ether
    from scapy.packet import Raw
    from scapy.utils import wrpcap

    def packet(at_s: float, network: object, transport: object, size: int) -> object:
        made = Ether() / network / transport / Raw(b"x" * size)  # type: ignore[operator]
        made.time = at_s
        return made

    there, back = IP(src="10.0.0.1", dst="10.0.0.2"), IP(src="10.0.0.2", dst="10.0.0.1")
    path = tmp_path / "c.pcap"
    wrpcap(
        str(path),
        [
            packet(100.0, there, TCP(sport=1000, dport=80, flags="S"), 0),
            packet(100.1, there, TCP(sport=1000, dport=80), 300),
            packet(100.2, there, TCP(sport=1000, dport=80), 200),
            packet(100.3, back, TCP(sport=80, dport=1000), 1400),
            packet(102.0, there, TCP(sport=1000, dport=80), 50),  # after a silence: a new message
            packet(102.1, IPv6(src="fd00::3", dst="fd00::2"), UDP(sport=53, dport=53), 70),
        ],
    )
    trace = read_pcap(path)
    assert trace.size_bytes.tolist() == [500, 1400, 50, 70]
    np.testing.assert_allclose(trace.start_s, [0, 0.2, 1.9, 2.0], atol=1e-5)
    assert trace.source.tolist() == [0, 1, 0, 2]
    assert trace.destination.tolist() == [1, 0, 1, 3]
    (tmp_path / "not.pcap").write_text("hello")
    with pytest.raises(UsageError, match="capture"):
        read_pcap(tmp_path / "not.pcap")
    with pytest.raises(UsageError, match="capture"):
        read_pcap(tmp_path / "absent.pcap")


def test_conntrack_and_netflow_become_flows(tmp_path: Path) -> None:
    log = tmp_path / "conntrack.txt"
    log.write_text(
        "[1700000000.500000]\t[DESTROY] tcp 6 src=10.0.0.1 dst=10.0.0.2 sport=4000 dport=80 packets=10 bytes=1400 "
        "src=10.0.0.2 dst=10.0.0.1 sport=80 dport=4000 packets=100 bytes=150000 [ASSURED]\n"
        "[1700000001.000000]\t[DESTROY] udp 17 src=10.0.0.3 dst=10.0.0.2 sport=53 dport=53 packets=1 bytes=28 "
        "src=10.0.0.2 dst=10.0.0.3 sport=53 dport=53 packets=1 bytes=128\n"
    )
    trace = read_connections(log, "conntrack")
    assert trace.size_bytes.tolist() == [1000, 146_000, 100]
    np.testing.assert_allclose(trace.start_s, [0, 0, 0.5])
    flows = tmp_path / "nf.csv"
    flows.write_text(
        "ts,te,td,sa,da,sp,dp,pr,ipkt,ibyt\n"
        "2024-01-01 00:00:01,2024-01-01 00:00:02,1.0,10.0.0.1,10.0.0.2,1,2,TCP,10,10400\n"
        "2024-01-01 00:00:03,2024-01-01 00:00:03,0.1,10.0.0.9,10.0.0.2,1,2,UDP,1,128\n"
        "Summary\n"
    )
    trace = read_connections(flows, "netflow")
    assert trace.size_bytes.tolist() == [10_000, 100]
    assert trace.start_s.tolist() == [0, 2]
    for text, form, says in (
        ("", "conntrack", "no flow"),
        ("a,b\n", "netflow", "no column"),
        ("", "syslog", "unknown"),
    ):
        (tmp_path / "bad").write_text(text)
        with pytest.raises(UsageError, match=says):
            read_connections(tmp_path / "bad", form)
    (tmp_path / "bad").write_text("ts,sa,da,ibyt\nyesterday,a,b,5\n")
    with pytest.raises(UsageError, match=r"bad:2"):
        read_connections(tmp_path / "bad", "netflow")
