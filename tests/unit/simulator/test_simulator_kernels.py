"""Both kernels against a slow reference, and against each other."""

import sys
from bisect import bisect_left, bisect_right
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fabricpilot.errors import UsageError
from simulator.engine import Simulation, simulate
from simulator.physics import IDEAL
from simulator.results import FlowResults
from simulator.schemes import BACKLOG, FIRST_COME, REMAINING, SHORTEST, SIZE, WRITTEN, Scheme, fine_thresholds, scheme
from simulator.topology import Topology, leaf_spine, star
from simulator.workloads.arrivals import poisson
from simulator.workloads.distribution import SizeDistribution
from simulator.workloads.placement import all_to_all, to_one
from simulator.workloads.trace import Trace

sys.path.insert(0, str(Path(__file__).parent))
from reference import least_attained_first, max_min, replay

THRESHOLDS = (20_000.0, 100_000.0, 1_000_000.0)
BUFFER = 600_000.0
SCHEMES = {
    "fair": Scheme("fair"),
    "mlfq": Scheme("mlfq", thresholds=THRESHOLDS),
    "qsjf": Scheme("qsjf", basis=SIZE, thresholds=THRESHOLDS),
    "remaining": Scheme("remaining", basis=REMAINING, thresholds=THRESHOLDS),
    "backlog": Scheme("backlog", basis=BACKLOG, thresholds=THRESHOLDS, send_buffer_bytes=BUFFER),
    "written": Scheme("written", basis=WRITTEN, thresholds=THRESHOLDS, send_buffer_bytes=BUFFER),
}


def level_of(scheme: Scheme, attained: float, remaining: float) -> int:
    """The rules in words of `simulator.rank`, written independently."""
    reached = lambda value: bisect_right(scheme.thresholds, value)  # noqa: E731
    if scheme.name in ("fair", "mlfq"):
        return reached(attained)
    if scheme.name == "qsjf":
        return reached(attained + remaining)
    if scheme.name == "written":
        return reached(min(attained + remaining, attained + BUFFER))
    if scheme.name == "backlog" and remaining > BUFFER:
        return reached(max(attained, BUFFER))
    return bisect_left(scheme.thresholds, remaining)


def traffic(hosts: int, flows: int, one: bool, seed: int = 1, load: float = 0.8) -> Trace:
    rng = np.random.default_rng(seed)
    web = SizeDistribution.load("websearch_bytes_hpcc")
    trace = poisson(web, load * (1 if one else hosts), 1e9, rng, count=flows, overload=True)
    return to_one(trace, hosts, rng) if one else all_to_all(trace, hosts, rng)


def expected(trace: Trace, topology: Topology, scheme: Scheme) -> np.ndarray:
    paths = topology.paths(trace.source, trace.destination, topology.hashed_route(np.arange(len(trace))))
    return replay(
        trace.start_s,
        trace.size_bytes,
        [[int(link) for link in path if link >= 0] for path in paths],
        topology.link_bps / 8,
        lambda attained, remaining: level_of(scheme, attained, remaining),
        scheme.thresholds,
        scheme.send_buffer_bytes or float("inf"),
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_one_bottleneck_agrees_with_the_reference(name: str) -> None:
    trace, topology = traffic(6, 400, one=True), star(6, 1e9)
    found = simulate(trace, SCHEMES[name], topology, IDEAL)
    np.testing.assert_allclose(found.fct_s, expected(trace, topology, SCHEMES[name]), rtol=1e-6)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(
    "topology",
    [star(5, 1e9), leaf_spine(3, 2, 2, 1e9, 2.0), star(5, 1e9).with_host_rate(2, 2.5e8)],
    ids=["star", "leaf-spine", "heterogeneous"],
)
def test_fabric_agrees_with_the_reference(topology: Topology, name: str) -> None:
    trace = traffic(topology.hosts, 250, one=False, load=0.5)
    simulation = Simulation(SCHEMES[name], topology, IDEAL)
    simulation.add(trace)
    found = simulation.run().in_order_of_start()
    np.testing.assert_allclose(found.fct_s, expected(trace, topology, SCHEMES[name]), rtol=1e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_kernels_agree_on_one_bottleneck(name: str) -> None:
    trace, topology = traffic(8, 5000, one=True), star(8, 1e9)
    fast = simulate(trace, SCHEMES[name], topology, IDEAL)
    simulation = Simulation(SCHEMES[name], topology, IDEAL)
    simulation.add(trace)
    np.testing.assert_allclose(simulation.run().in_order_of_start().fct_s, fast.fct_s, rtol=1e-6)


def test_shortest_first_agrees_with_the_reference() -> None:
    trace, topology = traffic(6, 500, one=True), star(6, 1e9)
    found = simulate(trace, Scheme("srpt", order=SHORTEST), topology, IDEAL)
    paths = [[0]] * len(trace)
    wanted = replay(
        trace.start_s, trace.size_bytes, paths, np.array([1e9 / 8]), lambda attained, remaining: 0, shortest=True
    )
    np.testing.assert_allclose(found.fct_s, wanted, rtol=1e-6)


def test_fine_levels_are_least_attained_first() -> None:
    trace, topology = traffic(6, 20_000, one=True, load=0.7), star(6, 1e9)
    exact = least_attained_first(trace.start_s, trace.size_bytes, 1e9 / 8)
    found, fair = (simulate(trace, scheme(name), topology, IDEAL).fct_s for name in ("las", "fair"))
    assert exact.mean() < 0.95 * fair.mean()
    assert found.mean() == pytest.approx(exact.mean(), rel=0.01)
    middle = np.abs(found / exact - 1)
    assert np.median(middle) < 0.02


def test_processor_sharing_has_the_mean_of_theory() -> None:
    # M/G/1 processor sharing: E[T] = E[S] / (1 - load), whatever the sizes (Kleinrock, Queueing Systems 2)
    trace = traffic(4, 200_000, one=True, load=0.6)
    found = simulate(trace, Scheme("fair"), star(4, 1e9), IDEAL)
    assert found.fct_s.mean() == pytest.approx(trace.size_bytes.mean() * 8e-9 / (1 - 0.6), rel=0.03)


def test_a_run_in_steps_is_the_same_run() -> None:
    topology = star(6, 1e9)
    for one in (True, False):
        trace = traffic(6, 2000, one)
        whole = Simulation(SCHEMES["backlog"], topology, receiver=0 if one else None)
        whole.add(trace)
        steps = Simulation(SCHEMES["backlog"], topology, receiver=0 if one else None)
        parts = []
        half = len(trace) // 2
        for part in (slice(0, half), slice(half, None)):
            steps.add(Trace(*(getattr(trace, f)[part] for f in ("start_s", "size_bytes", "source", "destination"))))
            parts.append(steps.run_until(float(trace.start_s[part][-1])))
        parts.append(steps.run())
        np.testing.assert_allclose(
            FlowResults.joined(parts).in_order_of_start().fct_s, whole.run().in_order_of_start().fct_s, rtol=1e-2
        )


def test_room_for_flows_grows() -> None:
    trace = Trace.of(np.linspace(0, 1e-6, 5000), np.full(5000, 10_000), np.arange(5000) % 3 + 1, np.zeros(5000))
    for receiver in (0, None):
        simulation = Simulation(Scheme("fair"), star(4, 1e9), IDEAL, receiver=receiver)
        simulation.add(trace)
        results = simulation.run()
        assert len(results) == 5000
        assert simulation.peak_flows == 5000
        assert results.fct_s.max() == pytest.approx(5000 * 10_000 * 8e-9, rel=2e-3)


@pytest.mark.parametrize(("seed", "name"), list(enumerate([*SCHEMES, "fine"])))
def test_sharing_is_max_min_after_any_history(seed: int, name: str) -> None:
    """Rates seen in the middle of a run are those of progressive filling."""
    topology = leaf_spine(3, 2, 3, 1e9, 3.0)
    trace = traffic(topology.hosts, 300, one=False, seed=seed, load=0.6)
    ranks = SCHEMES.get(name) or Scheme("fine", basis=REMAINING, thresholds=fine_thresholds())
    simulation = Simulation(ranks, topology, IDEAL)
    simulation.add(trace)
    for time_s in np.linspace(0.1, 0.9, 5) * trace.start_s[-1]:
        simulation.run_until(float(time_s))
        active = simulation.active()
        before, step_s = active.attained_bytes, 1e-9
        paths = topology.paths(active.host, active.destination, active.route)
        wanted = max_min([[int(x) for x in p if x >= 0] for p in paths], active.level.tolist(), topology.link_bps / 8)
        simulation.run_until(float(time_s) + step_s)
        after = dict(zip(simulation.active().flow.tolist(), simulation.active().attained_bytes.tolist(), strict=True))
        got = [(after.get(f, b) - b) / step_s for f, b in zip(active.flow.tolist(), before.tolist(), strict=True)]
        np.testing.assert_allclose(got, wanted, atol=1e3)


def test_verdicts_fix_level_and_route() -> None:
    topology = leaf_spine(2, 2, 1, 1e9, 2.0)  # uplinks of 250 Mbit/s: two flows of one route share it
    scheme = replace(SCHEMES["mlfq"])
    trace = Trace.of([0.0, 0.0], [1_000_000, 1_000_000], [0, 0], [1, 1])
    alone_s = 1_000_000 * 8 / 2.5e8
    for route, longest_s in ((0, 2 * alone_s), (1, alone_s)):
        simulation = Simulation(scheme, topology, IDEAL)
        simulation.add(trace, np.array([0, 0]))
        simulation.run_until(0.0)
        simulation.set_verdict(1, route=route)
        assert simulation.run().fct_s.max() == pytest.approx(longest_s, rel=1e-3)
    simulation = Simulation(scheme, topology, IDEAL)
    simulation.add(trace, np.array([0, 0]))
    simulation.run_until(0.0)
    simulation.set_verdict(0, level=3)
    simulation.set_verdict(1, level=0)
    np.testing.assert_allclose(simulation.run().in_order_of_start().fct_s, [2 * alone_s, alone_s], rtol=1e-3)


def in_steps(trace: Trace, simulation: Simulation, rates_bps: dict[int, float]) -> np.ndarray:
    """Completion times when the flows in `rates_bps` are capped as soon as they have started."""
    simulation.add(trace)
    parts = []
    for flow, rate_bps in rates_bps.items():
        parts.append(simulation.run_until(float(trace.start_s[flow])))
        simulation.set_verdict(flow, rate_bps=rate_bps)
    return FlowResults.joined([*parts, simulation.run()]).in_order_of_start().fct_s


@pytest.mark.parametrize("name", ["fair", "mlfq", "backlog"])
@pytest.mark.parametrize("kind", ["one bottleneck", "star", "leaf-spine"])
def test_a_cap_is_a_link_of_the_flow_alone(kind: str, name: str) -> None:
    one = kind == "one bottleneck"
    topology = leaf_spine(3, 2, 2, 1e9, 2.0) if kind == "leaf-spine" else star(5, 1e9)
    trace = traffic(topology.hosts, 200, one=one, load=0.5, seed=3)
    rates_bps = {flow: 1e9 / (2 + flow % 5) for flow in range(20, 200, 3)}  # before the first, the star's own kernel
    found = in_steps(trace, Simulation(SCHEMES[name], topology, IDEAL, receiver=0 if one else None), rates_bps)
    paths = topology.paths(trace.source, trace.destination, topology.hashed_route(np.arange(len(trace))))
    links = [[int(link) for link in path if link >= 0] for path in paths]
    for number, flow in enumerate(rates_bps):
        links[flow].append(topology.links + number)
    capacity = np.concatenate([topology.link_bps, list(rates_bps.values())]) / 8
    wanted = replay(
        trace.start_s,
        trace.size_bytes,
        links,
        capacity,
        lambda attained, remaining: level_of(SCHEMES[name], attained, remaining),
        SCHEMES[name].thresholds,
        SCHEMES[name].send_buffer_bytes or float("inf"),
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_what_a_cap_leaves_goes_to_the_levels_below() -> None:
    trace = Trace.of([0.0, 0.0], [10_000_000, 10_000_000], [1, 2], [0, 0])
    for receiver in (0, None):
        simulation = Simulation(SCHEMES["mlfq"], star(3, 1e9), IDEAL, receiver=receiver)
        simulation.add(trace)
        simulation.run_until(0.0)
        simulation.set_verdict(0, level=0, rate_bps=2.5e8)
        simulation.set_verdict(1, level=3)
        simulation.run_until(0.08)  # 80 Mbit at 750 Mbit/s: not done before 0.1067 s
        simulation.set_verdict(0, rate_bps=np.inf)
        ended = simulation.run().in_order_of_start().fct_s
        # 20 Mbit of the first are sent; then it has the whole link for 60 Mbit, and the other its last 20 behind it.
        np.testing.assert_allclose(ended, [0.14, 0.16], rtol=1e-9)


@pytest.mark.parametrize("receiver", [0, None])
def test_caps_that_never_bind_change_nothing(receiver: int | None) -> None:
    trace = traffic(6, 2000, one=True)
    plain = Simulation(SCHEMES["mlfq"], star(6, 1e9), receiver=receiver)
    capped = Simulation(SCHEMES["mlfq"], star(6, 1e9), receiver=receiver)
    plain.add(trace)
    found = in_steps(trace, capped, dict.fromkeys(range(0, 2000, 100), 2e9))
    np.testing.assert_allclose(found, plain.run().in_order_of_start().fct_s, rtol=2e-2)
    assert capped.events == pytest.approx(plain.events, abs=5)
    assert capped.peak_flows == plain.peak_flows


def test_caps_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="above 0"):
        Simulation(SCHEMES["mlfq"], star(3, 1e9)).set_verdict(0, rate_bps=0.0)
    with pytest.raises(UsageError, match="does not share"):
        Simulation(Scheme("fcfs", order=FIRST_COME), star(3, 1e9), receiver=0).set_verdict(0, rate_bps=1e8)


def test_decisions_take_effect_late() -> None:
    from fabricpilot.levels import Thresholds

    trace = Trace.of([0.0, 0.0], [10_000_000, 1_000_000], [1, 2], [0, 0])
    scheme = Scheme("mlfq", thresholds=(20_000_000.0,))  # both stay on top: equal sharing

    def small_flow(delay_s: float) -> float:
        simulation = Simulation(scheme, star(3, 1e9), IDEAL, receiver=0, control_delay_s=delay_s)
        simulation.add(trace)
        simulation.run_until(0.001)
        simulation.set_thresholds(Thresholds.of([10_000]), hosts=[1])  # from then on host 1's flow is below
        return float(simulation.run().in_order_of_start().fct_s[1])

    # 8 Mbit; half the rate until the decision is in force, all of it afterwards.
    assert small_flow(0.0) == pytest.approx(0.001 + (8e6 - 0.5e6) / 1e9, rel=1e-6)
    assert small_flow(0.004) == pytest.approx(0.005 + (8e6 - 2.5e6) / 1e9, rel=1e-6)
