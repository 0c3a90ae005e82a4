"""Long and large runs: memory stays bounded, results stay sane."""

import resource

import numpy as np
import pytest

from simulator.engine import Simulation
from simulator.schemes import scheme
from simulator.statistics import FlowStatistics
from simulator.topology import leaf_spine, star
from simulator.workloads.distribution import SizeDistribution
from simulator.workloads.placement import Phase, schedule

WEB = SizeDistribution.load("websearch_dctcp_bytes_trafficgenerator")

pytestmark = [pytest.mark.scale, pytest.mark.timeout(3600)]


def test_minutes_on_32_hosts_in_bounded_memory() -> None:
    simulation, statistics = Simulation(scheme("mlfq"), star(32, 1e9)), FlowStatistics()
    peaks = []
    for part in schedule([Phase(WEB, 0.8, 240.0)], 1e9, 32, np.random.default_rng(1), part_s=30.0):
        simulation.add(part)
        statistics.add(simulation.run_until(float(part.start_s[-1])))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    statistics.add(simulation.run())
    found = statistics.summary().overall
    assert found.flows == pytest.approx(240 * 32 * 0.8e9 / 8 / WEB.mean_bytes, rel=0.02)
    assert 1 < found.mean_slowdown < 20
    assert peaks[-1] - peaks[1] < 50_000  # KiB: half a minute's flows, not all of them


def test_two_thousand_hosts() -> None:
    topology = leaf_spine(64, 16, 32, 10e9, 2.0)
    simulation, statistics = Simulation(scheme("backlog"), topology), FlowStatistics()
    for part in schedule([Phase(WEB, 0.3, 0.2)], 10e9, topology.hosts, np.random.default_rng(1), part_s=0.1):
        simulation.add(part)
        statistics.add(simulation.run_until(float(part.start_s[-1])))
    statistics.add(simulation.run())
    assert topology.hosts == 2048
    assert statistics.summary().overall.flows > 50_000
    assert simulation.state_bytes < 50e6
