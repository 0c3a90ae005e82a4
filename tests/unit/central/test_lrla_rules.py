"""Rules for long flows: who counts where, and which route and priority follows."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from central.lrla.bench import lrla
from central.lrla.flow_set import UNKNOWN_ROUTE, route_loads
from central.lrla.laboratory import EARLY, Lab, run
from central.lrla.rules import RULES, Ecmp, LeastLoaded, assign, priorities
from central.lrla.synthetic import random_flows
from fabricpilot.errors import UsageError


def flows(n=8, **changed):
    """n flows from rack 0 to rack 1 over two routes, all new."""
    made = random_flows(n, np.random.default_rng(0), routes=2)
    columns = {
        "source_rack": np.zeros(n, np.int64),
        "destination_rack": np.ones(n, np.int64),
        "route": np.full(n, UNKNOWN_ROUTE),
        "migration": np.zeros(n, np.bool_),
    }
    return replace(made, **(columns | changed))


def test_flows_of_unknown_route_count_in_equal_parts():
    up, down = route_loads(flows(3, route=np.array([0, 1, UNKNOWN_ROUTE])))
    assert up[0].tolist() == down[1].tolist() == [1.5, 1.5]
    assert up[1:].sum() == 0


def test_flows_inside_a_rack_count_nowhere_and_get_no_route():
    inside = flows(4, destination_rack=np.zeros(4, np.int64))
    assert route_loads(inside)[0].sum() == 0
    assert assign(inside, np.arange(4)).tolist() == [UNKNOWN_ROUTE] * 4


@pytest.mark.parametrize("n", [8, 1000])
def test_new_flows_are_spread_evenly(n):
    chosen = assign(flows(n), np.arange(n))
    assert np.bincount(chosen).tolist() == [n // 2, n // 2]


def test_a_flow_takes_the_route_whose_busier_end_is_less_busy():
    # Route 0 has two flows down to rack 1 from elsewhere, route 1 one flow up from rack 0: route 1 is better.
    others = flows(
        4, source_rack=np.array([2, 3, 0, 0]), destination_rack=np.array([1, 1, 4, 1]), route=np.array([0, 0, 1, -1])
    )
    assert assign(others, np.array([3])).tolist() == [1]


def test_a_flow_stays_unless_another_route_is_better_by_a_flow():
    assert assign(flows(3, route=np.array([0, 0, 1])), np.array([0])).tolist() == [0]
    assert assign(flows(4, route=np.array([0, 0, 0, 1])), np.array([0])).tolist() == [1]


def test_only_usable_routes_are_given():
    usable = np.tile([False, True], (8, 1))
    assert assign(flows(usable=usable), np.arange(8)).tolist() == [1] * 8
    assert assign(flows(usable=~np.ones((8, 2), np.bool_)), np.arange(8)).tolist() == [UNKNOWN_ROUTE] * 8


def test_priorities_follow_what_remains_within_bounds():
    left = np.array([np.nan, 5e6, 3e6, 1e6, 1e6, 1e6])
    some = flows(
        6,
        known_bytes=left,
        migration=np.array([False] * 5 + [True]),
        priorities=np.array([4, 4, 4, 4, 2, 4]),
    )
    assert priorities(some, np.arange(6), (2e6, 4e6)).tolist() == [0, 0, 1, 2, 1, 0]


def test_priorities_follow_what_was_sent():
    sent = flows(5, attained_bytes=np.array([1e6, 3e6, 9e6, 10e6, 1e6]), migration=np.array([False] * 4 + [True]))
    assert priorities(sent, np.arange(5), sent_bytes=(10e6, 2e6)).tolist() == [2, 1, 1, 0, 0]


def test_told_early_all_are_better_off():
    lab = Lab(traffic_s=3.0, warm_up_s=0.0)
    plain, early = run(lab, RULES["ecmp"], 3), run(replace(lab, thresholds=EARLY), RULES["young-first"], 3)
    assert plain.long_flows == early.long_flows > 0  # which are long does not depend on when central is told
    assert early.long_fct_us < plain.long_fct_us
    assert early.all_fct_us < plain.all_fct_us


def test_ecmp_decides_nothing():
    choice = Ecmp().decide(flows(), np.arange(8))
    assert set(choice.priority.tolist()) == {0}
    assert set(choice.route.tolist()) == {UNKNOWN_ROUTE}


def test_rules_in_the_laboratory_balance_and_shorten():
    lab = Lab(traffic_s=3.0, warm_up_s=0.0)
    ecmp, balanced = (run(lab, RULES[name], seed=3) for name in ("ecmp", "shortest-first"))
    assert ecmp.long_flows == balanced.long_flows > 0
    assert balanced.spread < ecmp.spread
    assert balanced.long_fct_us < ecmp.long_fct_us
    assert run(lab, LeastLoaded(), seed=3) == run(lab, LeastLoaded(), seed=3)


def test_the_benchmark_compares_on_the_same_traffic():
    told = CliRunner().invoke(
        lrla, ["--seeds", "2", "--traffic-s", "2.4", "--routes", "2", "--scheme", "least-loaded,young-first", "--json"]
    )
    (found,) = json.loads(told.stdout)["routes"].values()
    assert list(found) == ["ecmp", "least-loaded", "young-first"]
    assert len({scheme["long_flows"] for scheme in found.values()}) == 1
    assert found["ecmp"]["long_below"] == found["least-loaded"]["short_below"] == 0
    refused = CliRunner().invoke(lrla, ["--scheme", "none"])
    assert isinstance(refused.exception, UsageError)
    assert "young-first" in str(refused.exception)
