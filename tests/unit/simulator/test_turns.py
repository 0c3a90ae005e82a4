"""Flows of the last level one at a time: order, what comes between, and where it cannot be."""

from dataclasses import replace

import numpy as np
import pytest

from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds
from simulator.engine import Simulation, simulate
from simulator.physics import IDEAL
from simulator.schemes import Scheme, scheme
from simulator.topology import leaf_spine, star
from simulator.workloads.trace import Trace

LINK = star(4, 8.0)  # one byte per second
TURNS = Scheme("x", thresholds=(10.0,), queue_bytes=0.0, turns=True)


def trace(starts, sizes):
    n = len(starts)
    return Trace(np.array(starts, float), np.array(sizes, np.int64), np.arange(n) % 3 + 1, np.zeros(n, np.int64))


def ends(flows, ranked=TURNS):
    return (simulate(flows, ranked, LINK, IDEAL).fct_s + flows.start_s).tolist()


def test_beyond_the_threshold_one_flow_after_the_other_the_oldest_first():
    # Ten bytes of each first, shared: until 20 s. Then the rest of the first, 20 bytes, then that of the second.
    assert ends(trace([0, 0], [30, 30])) == pytest.approx([40, 60])
    assert ends(trace([0, 0], [30, 30]), replace(TURNS, turns=False)) == pytest.approx([60, 60])


def test_shorter_flows_come_between():
    assert ends(trace([0, 0, 25], [30, 30, 5])) == pytest.approx([45, 65, 30])


def test_all_in_turn_is_first_come_first_served():
    flows = trace([0, 1, 2, 50], [30, 5, 7, 3])
    first = Scheme("x", thresholds=(1.0,), queue_bytes=0.0, turns=True)
    assert ends(flows, first)[0] == pytest.approx(32, abs=1)  # but for everyone's first byte
    assert ends(flows, first)[3] == pytest.approx(ends(flows, scheme("fcfs"))[3])


def test_new_thresholds_move_flows_between_turns_and_sharing():
    simulation = Simulation(TURNS, LINK, IDEAL, receiver=0)
    simulation.add(trace([0, 0], [30, 30]))
    simulation.run_until(30.0)  # 20 sent by the first, 10 by the second
    assert sorted(simulation.active().attained_bytes.tolist()) == pytest.approx([10, 20])
    simulation.set_thresholds(Thresholds((25,)))  # now they share up to 25
    simulation.run_until(40.0)
    assert sorted(simulation.active().attained_bytes.tolist()) == pytest.approx([15, 25])
    assert sorted(simulation.run().fct_s.tolist()) == pytest.approx([55, 60])


def test_a_fabric_has_no_turns():
    with pytest.raises(UsageError, match="one bottleneck"):
        Simulation(TURNS, leaf_spine(2, 2, 2, 1e9, 1.0))
