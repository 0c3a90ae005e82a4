"""Long flows in turn: who has it, who waits, and that the simulator's turns are what verdicts make of it."""

from dataclasses import replace

import numpy as np
import pytest

from central.lrla.flow_set import UNKNOWN_ROUTE
from central.lrla.process import Round, Scheduler
from central.lrla.synthetic import random_flows
from central.lrla.table import HostFlows
from central.lrla.turns import InTurn
from fabricpilot.config import LongFlowsSection
from fabricpilot.levels import Thresholds
from fabricpilot.wire import FlowSummary, decode_from_central
from simulator.engine import Simulation, simulate
from simulator.schemes import WRITTEN, Scheme
from simulator.topology import star
from simulator.workloads.arrivals import poisson
from simulator.workloads.distribution import SizeDistribution
from simulator.workloads.placement import to_one

RULE = InTurn(1e9)


def flows(n, **changed):
    """n flows from different hosts to one, the first the oldest, none with a turn."""
    made = random_flows(n, np.random.default_rng(0), routes=2)
    columns = {
        "source": np.arange(1, n + 1),
        "destination": np.zeros(n, np.int64),
        "hosts": 64,
        "age_s": np.arange(n, 0, -1.0),
        "attained_bytes": np.full(n, 1e7),
        "priority": np.zeros(n, np.int64),
        "migration": np.zeros(n, np.bool_),
        "priorities": np.full(n, 4),
    }
    return replace(made, **(columns | {name: np.asarray(value) for name, value in changed.items()}))


def turns(of):
    return np.flatnonzero(RULE.decide(of, np.arange(len(of))).priority).tolist()


def test_the_oldest_has_the_turn_and_keeps_it():
    assert turns(flows(4)) == [0]
    assert turns(flows(4, priority=[0, 0, 1, 0])) == [2]
    assert RULE.changed(flows(4, priority=[0, 0, 1, 0])).tolist() == []
    assert RULE.changed(flows(4, priority=[0, 0, 1, 1])).tolist() == [3]


def test_every_receiver_serves_one_and_a_sender_sends_one():
    assert turns(flows(4, destination=[0, 9, 0, 9])) == [0, 1]
    assert turns(flows(4, destination=[0, 9, 8, 7], source=[1, 1, 2, 2])) == [0, 2]


def test_a_flow_that_waits_for_its_sender_does_not_hold_up_its_receiver():
    assert turns(flows(3, destination=[0, 9, 9], source=[1, 1, 2])) == [0, 2]


def test_after_its_bytes_a_flow_gives_way_also_to_younger_ones():
    assert turns(flows(3, attained_bytes=[1.2e9, 1e7, 2e7], priority=[1, 0, 0])) == [1]
    assert turns(flows(3, attained_bytes=[1.2e9, 1.1e9, 2.5e9])) == [0]


def test_migrations_and_hosts_without_a_level_for_it_have_no_turn():
    assert turns(flows(3, migration=[True, False, False])) == [1]
    assert turns(flows(3, priorities=[2, 2, 2])) == []


def test_routes_are_those_of_the_least_loaded():
    some = replace(
        flows(4),
        source_rack=np.zeros(4, np.int64),
        destination_rack=np.ones(4, np.int64),
        route=np.full(4, UNKNOWN_ROUTE),
    )
    assert sorted(RULE.decide(some, np.arange(4)).route.tolist()) == [0, 0, 1, 1]


def test_when_the_flow_ends_the_next_one_is_told_at_once():
    scheduler = Scheduler(LongFlowsSection(scheme="in-turn"))

    def flow(number, age_s):
        return FlowSummary(f"10.0.1.{number}", "10.0.2.1", 1000, 80, 6, 10**7, round(age_s * 1e6), 3)

    def told(number, age_s, *, ended=False):
        some = [flow(number, age_s)]
        return HostFlows(f"host{number}", 4, 10**9, [], False, [] if ended else some, some if ended else [], [])

    def levels(answer):
        return {host: [v.level for v in decode_from_central(frame).verdicts] for host, frame in answer.frames}

    first = scheduler.answer(Round(0.0, [told(1, 3.0), told(2, 2.0), told(3, 1.0)]))
    assert levels(first) == {"host1": [2], "host2": [3], "host3": [3]}
    assert levels(scheduler.answer(Round(0.01, [told(1, 3.01, ended=True)]))) == {"host2": [2]}
    assert levels(scheduler.answer(Round(0.02, []))) == {}


def test_the_simulators_turns_are_what_late_verdicts_make():
    """The engine serves the last level one at a time without delay; verdicts come every 10 ms and 5 ms late."""
    sizes = SizeDistribution.load("websearch_dctcp_bytes_trafficgenerator")
    thresholds = Thresholds((160_000, 4_000_000, 4_000_001))
    rng = np.random.default_rng(3)
    trace = to_one(poisson(sizes, 0.8, 1e9, rng, duration_s=30.0), 16, rng)
    ranked = Scheme("x", WRITTEN, thresholds=tuple(map(float, thresholds.bytes)), send_buffer_bytes=4e6)
    wanted, shared = (simulate(trace, replace(ranked, turns=on), star(16, 1e9)) for on in (True, False))
    found = by_verdicts(Simulation(ranked, star(16, 1e9), receiver=0, control_delay_s=0.005), trace)
    assert len(found) == len(wanted)
    assert found.mean() == pytest.approx(wanted.fct_s.mean(), rel=0.04)
    assert found.mean() < 0.9 * shared.fct_s.mean()


def by_verdicts(simulation, trace, tick_s=0.01):
    """Completion times with the rule deciding every tick about all flows of the last level."""
    simulation.add(trace)
    turn, fct, now_s = np.zeros(len(trace), np.int64), [], 0.0
    while sum(map(len, fct)) < len(trace):
        now_s += tick_s
        fct.append(simulation.run_until(now_s).fct_s)
        active = simulation.active()
        long = (active.level == 3) | (turn[active.flow] > 0)
        if not long.any():
            continue
        which = active.flow[long]
        seen = flows(
            len(which),
            source=active.host[long],
            age_s=now_s - active.start_s[long],
            attained_bytes=active.attained_bytes[long],
            priority=turn[which],
        )
        for row in RULE.changed(seen):
            turn[which[row]] = 1 - turn[which[row]]
            simulation.set_verdict(int(which[row]), 3 - int(turn[which[row]]))
    return np.concatenate(fct)
