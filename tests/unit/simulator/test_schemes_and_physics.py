from dataclasses import replace

import numpy as np
import pytest

from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds
from simulator.engine import Simulation
from simulator.physics import IDEAL, Physics, completion_s, ideal_s, slow_start_s
from simulator.schemes import NAMES, Scheme, equal_split, scheme
from simulator.topology import leaf_spine, star
from simulator.workloads.distribution import SizeDistribution
from simulator.workloads.trace import Trace

WEB = SizeDistribution.load("websearch_dctcp_bytes_trafficgenerator")


def test_equal_split_is_the_published_one() -> None:
    # PIAS's testbed: 24, 72 and 1448 KiB for web search and four queues
    np.testing.assert_allclose(equal_split(WEB, 4).bytes, [24 * 1024, 72 * 1024, 1448 * 1024], rtol=0.04)
    atoms = SizeDistribution("one size", np.array([500.0]), np.array([1.0]))
    assert equal_split(atoms, 4).bytes == (500, 501, 502)


def test_schemes_take_what_they_are_given() -> None:
    given = Thresholds.of([10, 20])
    for name in ("mlfq", "qlas", "qsjf", "backlog", "written"):
        assert scheme(name, thresholds=given).thresholds == (10.0, 20.0)
    for name in NAMES:
        assert scheme(name, distribution=WEB, levels=4).name == name
    with pytest.raises(UsageError, match="distribution"):
        scheme("equal-split")
    with pytest.raises(UsageError, match="send buffer"):
        scheme("backlog", send_buffer_bytes=0)
    with pytest.raises(UsageError, match="levels"):
        scheme("mlfq", levels=9)
    for bad in ((1.5,), (5.0, 5.0), (5.0, 4.0), (0.0,)):
        with pytest.raises(UsageError, match="whole bytes"):
            Scheme("x", thresholds=bad)


def test_a_flow_alone_waits_for_its_window() -> None:
    physics, goodput = Physics(), Physics().goodput(1e9)
    sizes = np.array([1000.0, 5000.0, 30_000.0, 1e6, 1e7])

    def waits(constants: Physics) -> np.ndarray:
        found = ideal_s(constants, sizes, np.full(5, goodput))
        return found - sizes / goodput - constants.base_latency_s

    found = waits(physics)
    assert found[0] == pytest.approx(0, abs=1e-12)
    assert found[1] == pytest.approx(physics.rtt_s - 3 * 1448 / goodput)
    assert (np.diff(found[:4]) > 0).all()
    assert found[4] == pytest.approx(found[3])  # the window has opened
    whole = 3 * 1448.0 * np.array([1, 2.5, 2.5 + 2.25])  # just the first window, two, three
    np.testing.assert_allclose(
        np.ediff1d(slow_start_s(physics, np.sort([*whole, *(whole + 1)]), np.zeros(6), goodput))[1::2], 0, atol=1e-12
    )
    rounds = np.ceil(1e6 / (3 * 1448)) - 1
    assert waits(replace(physics, window_growth=1.0))[3] == pytest.approx(rounds * found[1])


def test_the_ideal_has_no_latency_and_queues_add_some() -> None:
    size, peers = np.array([1e4, 1e5]), np.array([1, 5])
    fluid = size / 1e8 * 4
    goodput = np.full(2, 1e8)
    np.testing.assert_array_equal(completion_s(IDEAL, fluid, size, peers, np.full(2, 5e4), goodput), fluid)
    alone, queued = (completion_s(Physics(), fluid, size, peers, np.full(2, queue), goodput) for queue in (0.0, 5e4))
    assert (queued > alone).all()


def test_nobody_queues_behind_more_than_there_is() -> None:
    size = np.array([200, 300, 200, 100])
    trace = Trace.of([0.0, 1e-9, 2e-9, 1.0], size, [1, 2, 3, 1], [0, 0, 0, 0])
    for receiver in (0, None):  # both kernels
        fct_s = []
        for queue_bytes in (0.0, 17_650.0):
            simulation = Simulation(Scheme("fair", queue_bytes=queue_bytes), star(4, 1e9), receiver=receiver)
            simulation.add(trace)
            fct_s.append(simulation.run().in_order_of_start().fct_s)
        stood_bytes = (fct_s[1] - fct_s[0]) * Physics().goodput(1e9)
        np.testing.assert_allclose(stood_bytes, [0, 200, 500, 0], atol=1.0)


def test_impossible_physics() -> None:
    for bad in ({"rtt_s": -1.0}, {"rtt_s": float("nan")}, {"segment_bytes": 2000}, {"initial_window": 0.0}):
        with pytest.raises(UsageError):
            Physics(**bad)  # type: ignore[arg-type]


def test_paths() -> None:
    fabric = leaf_spine(2, 3, 2, 1e9, 2.0)
    assert fabric.hosts == 4
    assert fabric.links == 8 + 12
    assert fabric.link_bps[8] == pytest.approx(2 * 1e9 / (3 * 2))
    paths = fabric.paths([0, 0], [1, 3], [2, 2])
    assert paths.tolist() == [[0, 5, -1, -1], [0, 8 + 2, 8 + 6 + 3 + 2, 7]]
    assert fabric.route_of(paths).tolist() == [0, 2]
    spread = np.bincount(fabric.hashed_route(np.arange(30_000)))
    np.testing.assert_allclose(spread, 10_000, rtol=0.05)
    for source, destination, route in ((0, 0, 0), (0, 4, 0), (0, 3, 3), (-1, 1, 0)):
        with pytest.raises(UsageError):
            fabric.paths([source], [destination], [route])
    for bad in (lambda: star(1, 1e9), lambda: leaf_spine(2, 0, 2, 1e9), lambda: star(2, float("nan"))):
        with pytest.raises(UsageError):
            bad()
