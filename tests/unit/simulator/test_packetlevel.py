"""Our model against ns-3, packet by packet. Slow, and only where the optional wheel `ns3` is installed."""

import time

import numpy as np
import pytest

from simulator.engine import simulate
from simulator.packetlevel import run_dctcp, same_physics
from simulator.topology import star
from simulator.workloads.arrivals import poisson
from simulator.workloads.distribution import SizeDistribution
from simulator.workloads.placement import to_one


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mean_agrees_with_ns3_and_is_hundreds_of_times_faster() -> None:
    pytest.importorskip("ns", reason="the optional wheel ns3")
    rng = np.random.default_rng(1)
    web = SizeDistribution.load("websearch_dctcp_bytes_trafficgenerator")
    trace = to_one(poisson(web, 0.6, 1e9, rng, count=200), 8, rng)
    packets = run_dctcp(trace, 1e9, 20e-6)
    physics, fair = same_physics(1e9, 20e-6)
    simulate(trace, fair, star(8, 1e9), physics)  # compiles
    began_s = time.process_time()
    found = simulate(trace, fair, star(8, 1e9), physics)
    cpu_s = time.process_time() - began_s
    ended = np.isfinite(packets.fct_s)
    assert ended.all()
    error = found.fct_s / packets.fct_s - 1
    mean, median = found.fct_s.mean() / packets.fct_s.mean() - 1, np.median(np.abs(error))
    print(f"mean {mean:+.1%}, median of single flows {median:.1%}, CPU {packets.cpu_s:.1f} s and {cpu_s * 1e3:.2f} ms")
    assert found.fct_s.mean() == pytest.approx(packets.fct_s.mean(), rel=0.1)
    assert np.median(np.abs(error)) < 0.25
    assert packets.cpu_s / cpu_s > 100
