"""Groups divided by what their hosts send: the published workloads apart, alike ones together, stable over time."""

import numpy as np
import pytest
from guard_kit import Loop, SimulatedHost

from central.clustering import JOIN, LEAVE, MAX_PARTS, distance, divide
from fabricpilot.histogram import BINS, LogHistogram
from fabricpilot.levels import Thresholds
from simulator.workloads.distribution import SizeDistribution

WEB, MINING = "websearch_dctcp_bytes_trafficgenerator", "datamining_vl2_bytes_trafficgenerator"
CACHE = "facebook_cache_raw_trafficgenerator"


def sizes(workload, seed, flows=1_000):
    drawn = SizeDistribution.load(workload).sample(np.random.default_rng(seed), flows)
    return LogHistogram.of(drawn).counts.astype(float)


def fleet(seed=0, **of):
    return {f"{kind}{n}": sizes(workload, seed + n) for kind, (workload, count) in of.items() for n in range(count)}


def at(octave):
    """All flows of one size."""
    counts = np.zeros(BINS)
    counts[round(octave * 8)] = 1000.0
    return counts


def test_a_distance_is_in_octaves():
    one, other = (np.cumsum(at(octave)) / 1000 for octave in (10, 13))
    assert distance(one, other) == pytest.approx(3.0)
    assert distance(one, one) == 0.0


def test_kinds_of_traffic_are_told_apart():
    parts = divide(fleet(web=(WEB, 5), mining=(MINING, 4), cache=(CACHE, 3)), {})
    found = {
        kind: {part for name, part in parts.items() if name.startswith(kind)} for kind in ("web", "mining", "cache")
    }
    assert all(len(part) == 1 for part in found.values())
    assert len(set.union(*found.values())) == 3


def test_alike_hosts_stay_together_whatever_the_sample():
    parts = {}
    for seed in range(0, 200, 20):
        parts = divide(fleet(seed, a=(WEB, 10)), parts)
        assert set(parts.values()) == {0}


def test_the_division_is_stable_and_deterministic():
    first = divide(fleet(web=(WEB, 5), mining=(MINING, 5)), {})
    assert divide(dict(reversed(fleet(web=(WEB, 5), mining=(MINING, 5)).items())), {}) == first
    for seed in range(20, 200, 20):
        assert divide(fleet(seed, web=(WEB, 5), mining=(MINING, 5)), first) == first


def test_a_host_that_changes_its_traffic_changes_its_part():
    hosts = fleet(web=(WEB, 4), mining=(MINING, 4))
    before = divide(hosts, {})
    after = divide(hosts | {"web0": sizes(MINING, 77)}, before)
    assert after["web0"] == before["mining0"]
    assert {name for name in hosts if after[name] != before[name]} == {"web0"}


def test_hosts_that_drift_away_and_back_change_their_part_once_each_way():
    parts, moves, counts = {}, dict.fromkeys([f"d{n}" for n in range(4)] + [f"w{n}" for n in range(4)], 0), []
    shares = [*np.linspace(0, 1, 20), *[1.0] * 5, *np.linspace(1, 0, 20), *[0.0] * 5]
    for step, share in enumerate(shares):
        hosts = fleet(100 * step, w=(WEB, 4))
        for n in range(4):
            both = sizes(MINING, 100 * step + 50 + n) * share, sizes(WEB, 100 * step + 60 + n) * (1 - share)
            hosts[f"d{n}"] = sum(both)
        now = divide(hosts, parts)
        moves = {name: moves[name] + (now[name] != parts.get(name, 0)) for name in moves}
        parts = now
        counts.append(len(set(parts.values())))
    assert counts[0] == counts[-1] == 1
    assert set(counts[20:25]) == {2}
    assert all(count <= 3 for count in moves.values())
    assert all(moves[f"w{n}"] == 0 for n in range(4))


def test_a_host_that_tells_nonsense_moves_nobody_else():
    random, parts = np.random.default_rng(5), {}
    for step in range(40):
        nonsense = np.where(random.random(BINS) < 0.02, 2.0**62 * random.random(BINS), 0.0)
        parts = divide(fleet(20 * step, web=(WEB, 5)) | {"liar": nonsense + at(3)}, parts)
        assert {part for name, part in parts.items() if name != "liar"} == {0}


def test_a_host_between_two_parts_does_not_go_to_and_fro():
    before = divide({"a": at(10), "b": at(12)}, {})
    assert before["a"] != before["b"]
    parts = divide({"a": at(10), "b": at(12), "c": at(10.5)}, before)
    assert parts["c"] == parts["a"]
    wandering = divide({"a": at(10), "b": at(12), "c": at(11.3)}, parts)
    assert wandering["c"] == parts["c"]
    assert JOIN < 1.3 < LEAVE


def test_parts_that_come_close_are_one_again():
    before = divide({"a": at(10), "b": at(14)}, {})
    assert before["a"] != before["b"]
    assert set(divide({"a": at(10), "b": at(10.5)}, before).values()) == {min(before.values())}


def test_there_are_never_more_parts_than_allowed():
    hosts = {f"h{n:02}": at(3 + 1.5 * n) for n in range(25)}
    assert len(set(divide(hosts, {}).values())) <= MAX_PARTS


def test_no_hosts():
    assert divide({}, {}) == {}


def test_each_part_gets_thresholds_of_its_own():
    hosts = [SimulatedHost(f"{kind}{n}", n, workload, 0.7, 120) for kind, workload in (("web", WEB), ("mining", MINING))
             for n in range(2)]  # fmt: skip
    loop = Loop(hosts, Thresholds((1, 2, 3)), lambda _summary: None)
    for _ in range(60):
        loop.second()
    groups = [loop.registry.hosts[host.name].group for host in hosts]
    assert groups == ["web"] * 4
    loop.steering.regroup(60.0)
    parts = {host.name: loop.registry.hosts[host.name].group for host in hosts}
    assert parts["web0"] == parts["web1"] != parts["mining0"] == parts["mining1"]
    loop.baseline = Thresholds((4, 5, 6))
    for _ in range(5):
        loop.second()
    assert {host.thresholds for host in hosts} == {loop.baseline}
    assert {key[0] for key in loop.steering.guards} == {"web", *parts.values()}
