"""The schemes behind the one interface: what they decide, and when they leave things alone."""

from dataclasses import replace

import numpy as np
import pytest

from central.policy import policy_of
from central.policy.base import GroupSummary
from central.policy.fixed import FixedPolicy, log_spaced
from central.policy.optimiser import OptimiserPolicy
from central.policy.schemes import SCHEMES
from central.policy.simulated import scheme as brought
from central.thresholds.exact import evaluate
from fabricpilot.config import CentralConfig, PolicySection, load
from fabricpilot.errors import UsageError
from fabricpilot.histogram import LogHistogram
from fabricpilot.levels import Thresholds
from fabricpilot.published import published
from simulator.brought import all_names
from simulator.schemes import ATTAINED, WRITTEN
from simulator.workloads.distribution import SizeDistribution
from testbed.schemes import check_names, runnable


def summary(workload="websearch_bytes_hpcc", **fields):
    sizes = LogHistogram.of(SizeDistribution.load(workload).sample(np.random.default_rng(1), 20_000))
    given = {"group": "web", "levels": 4, "hosts": 3, "flows": 20_000.0, "load": 0.7, "sizes": sizes}
    return GroupSummary(**(given | {"thresholds": None} | fields))


def test_the_optimiser_settles():
    policy = OptimiserPolicy()
    first = policy.decide(summary())
    assert first.thresholds is not None
    again = policy.decide(summary(thresholds=first.thresholds))
    assert again.thresholds is None
    assert again.gain < 0.01
    assert "worth a change" in again.reason


def test_the_optimiser_moves_for_a_clear_gain():
    bad = Thresholds((100, 200, 300))
    told = summary(thresholds=bad)
    decision = OptimiserPolicy().decide(told)
    sizes = SizeDistribution.from_histogram(told.sizes, "web")
    before, after = (evaluate(sizes, 0.7, thresholds) for thresholds in (bad, decision.thresholds))
    assert decision.gain == pytest.approx(1 - after / before, rel=1e-6)
    assert decision.gain > 0.01
    assert "better for 20000 flows at load 0.70" in decision.reason


def test_a_full_link_changes_nothing():
    bad = Thresholds((10, 20, 30))
    assert OptimiserPolicy().decide(summary(thresholds=bad, load=0.94)).thresholds is not None
    held = OptimiserPolicy().decide(summary(thresholds=bad, load=0.95))
    assert held.thresholds is None
    assert "full" in held.reason
    assert OptimiserPolicy().decide(summary(load=0.95)).thresholds is not None  # better than none at all


def test_the_optimiser_counts_what_send_buffers_show():
    blind, seeing = summary(), summary(visible_bytes=2e6)
    chosen = OptimiserPolicy().decide(seeing).thresholds
    sizes = SizeDistribution.from_histogram(seeing.sizes, "web")
    values = [evaluate(sizes, 0.7, t, visible_bytes=2e6) for t in (chosen, OptimiserPolicy().decide(blind).thresholds)]
    assert values[0] < values[1]


def test_too_few_flows_decide_nothing():
    decision = OptimiserPolicy(min_flows=200).decide(summary(flows=199.0))
    assert decision.thresholds is None
    assert decision.reason == "199 finished flows in the window, 200 are needed"


@pytest.mark.parametrize("levels", [2, 3, 8])
def test_every_k(levels):
    assert OptimiserPolicy().decide(summary(levels=levels)).thresholds.levels == levels


def test_fixed_thresholds_are_sent_once():
    policy = FixedPolicy(Thresholds((1, 2, 3)))
    assert policy.decide(summary()).thresholds == Thresholds((1, 2, 3))
    assert policy.decide(summary(thresholds=Thresholds((1, 2, 3)))).thresholds is None
    wrong = policy.decide(summary(levels=8))
    assert wrong.thresholds is None
    assert "4 levels, not 8" in wrong.reason


def test_the_configuration_names_the_scheme():
    assert policy_of(PolicySection(scheme="mlfq", thresholds=[5, 6])) == FixedPolicy(Thresholds((5, 6)))
    assert policy_of(PolicySection(min_flows=7, min_gain=0.5)) == OptimiserPolicy("fct", 7, 0.5)
    with pytest.raises(UsageError, match="'srpt' has no thresholds for central to choose; give one of: mlfq"):
        policy_of(PolicySection(scheme="srpt"))
    with pytest.raises(UsageError, match="'magic' is unknown; choose from: fair, fifo"):
        policy_of(PolicySection(scheme="magic"))


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.policy is not None])
def test_every_scheme_that_chooses_settles_on_thresholds(name):
    told = summary()
    policy = policy_of(PolicySection(scheme=name))
    assert policy.name in (name, "optimiser")
    first = policy.decide(told)
    assert first.thresholds.levels == 4
    again = policy.decide(replace(told, thresholds=first.thresholds))
    assert again.thresholds is None
    assert again.reason


def test_one_table_of_names_for_all():
    """`simulate --scheme`, `[policy] scheme` and `testbed run` take the same names; who refuses one says why."""
    assert set(all_names()) == set(SCHEMES)
    assert set(runnable()) == {name for name in SCHEMES if not SCHEMES[name].refusal}
    for name, scheme in SCHEMES.items():
        assert (scheme.rank is None) == (scheme.policy is None), "levels need somebody who sets them"
        assert (scheme.rank is None) == (scheme.port != "bands")
        if scheme.refusal:
            with pytest.raises(UsageError, match=f"'{name}' cannot run on a network: "):
                check_names([name])
        else:
            check_names([name])


def test_published_thresholds_wait_for_the_load_and_then_stay():
    policy = policy_of(PolicySection(scheme="pias-published"))
    assert policy.decide(summary(levels=8, flows=10.0)).thresholds is None
    first = policy.decide(summary(levels=8, load=0.52)).thresholds
    assert first == published("websearch", 8, 0.5).thresholds
    assert policy.decide(summary(levels=8, load=0.9, thresholds=first)).reason == "in force"
    other = policy_of(PolicySection(scheme="pias-mismatched")).decide(summary(levels=8, load=0.52))
    assert other.thresholds == published("datamining", 8, 0.5).thresholds


def test_equal_split_follows_the_sizes_and_not_their_noise():
    policy = policy_of(PolicySection(scheme="equal-split"))
    first = policy.decide(summary()).thresholds
    web = SizeDistribution.load("websearch_bytes_hpcc")
    np.testing.assert_allclose(web.cdf_at(np.array(first.bytes)), [0.25, 0.5, 0.75], atol=0.02)
    assert policy.decide(summary(thresholds=first)).thresholds is None
    moved = policy.decide(summary("datamining_vl2_bytes_trafficgenerator", thresholds=first))
    assert moved.thresholds not in (None, first)


def test_least_attained_service_has_thresholds_at_equal_ratios():
    ratios = np.diff(np.log(log_spaced(8).bytes))
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-3)


def test_the_simulator_ranks_as_the_agents_do():
    web = SizeDistribution.load("websearch_bytes_hpcc")
    attained, written = (brought(name, web, 0.7, 4, 4e6, "websearch") for name in ("optimiser", "fabricpilot-backlog"))
    assert attained.thresholds == written.thresholds
    assert (attained.basis, written.basis) == (ATTAINED, WRITTEN)
    assert written.send_buffer_bytes == 4e6
    with pytest.raises(UsageError, match="no optimised thresholds are published"):
        brought("pias-mismatched", web, 0.7, 3, 4e6, "websearch")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("policy.thresholds", "3,2,1", "ascend"),
        ("policy.min_gain", "2", "0 to 1"),
        ("policy.shared_rate", "fast", "rate 'fast'"),
        ("policy.workload", "magic", "policy.workload"),
        ("policy.objective", "magic", "policy.objective"),
    ],
)
def test_wrong_configuration(key, value, match):
    with pytest.raises(UsageError, match=match):
        load(CentralConfig, None, {key: value}, {})
