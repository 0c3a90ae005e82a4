"""What sRLA sees and what its actions mean: every action a valid vector, for every K."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from central.policy.base import GroupSummary, Outcome
from central.srla.encoding import ACTIONS, Encoding, mask_of
from central.thresholds import exact
from fabricpilot.histogram import LogHistogram
from fabricpilot.levels import MAX_LEVELS, MIN_LEVELS, Thresholds
from fabricpilot.wire import FlowSummary
from simulator.envs.observations import COMPACT, LEVELS_AT, level_mask, mean_bytes
from simulator.workloads.distribution import SizeDistribution

WEB = SizeDistribution.load("websearch_dctcp_bytes_trafficgenerator")


def summary(levels=4, factor=1, load=0.8, **more):
    sizes = LogHistogram.of(WEB.sample(np.random.default_rng(1), 5000) * factor)
    return GroupSummary("web", levels, 8, 5000.0, load, sizes, **({"thresholds": None} | more))


@given(
    base=st.lists(st.floats(1, 1e12), min_size=1, max_size=ACTIONS),
    action=st.lists(st.floats(-3, 3), min_size=ACTIONS, max_size=ACTIONS),
    reach=st.floats(0.01, 6),
)
@settings(max_examples=300, deadline=None)
def test_every_action_is_an_ascending_vector_for_every_k(base, action, reach):
    values = np.full(ACTIONS, np.inf)
    values[: len(base)] = sorted(base)
    found = Encoding(reach=reach).thresholds_at(values, action)  # Thresholds itself refuses what does not ascend
    assert found.levels == len(base) + 1


@pytest.mark.parametrize("levels", range(MIN_LEVELS, MAX_LEVELS + 1))
@pytest.mark.parametrize("base", ["exact", "split", "between", "middle"])
def test_one_network_serves_every_k(levels, base):
    encoding = Encoding(base=base)
    given_base = encoding.base_for(summary(levels))
    assert np.isfinite(given_base).sum() == levels - 1
    state = encoding.state_of(summary(levels), given_base)
    assert state.shape == (encoding.features,) == (COMPACT + ACTIONS,)
    assert state.min() >= 0
    assert state.max() <= 1
    np.testing.assert_array_equal(state[LEVELS_AT], mask_of(levels))
    assert level_mask(levels).sum() == levels - 1


def test_between_lies_between_equal_splits_of_flows_and_of_bytes():
    # 100 flows of 1 KB and one of 1 MB: half the flows end by 1 KB, half the bytes belong to the flow of 1 MB.
    sizes = LogHistogram.of(np.repeat([2.0**10, 2.0**20], [100, 1]))
    told = replace(summary(2), sizes=sizes)
    flows, both = (Encoding(base=base).base_for(told)[0] for base in ("split", "between"))
    assert flows == pytest.approx(2**10, rel=0.1)
    assert both == pytest.approx(2**15, rel=0.1)


@pytest.mark.parametrize("levels", [2, 4, 8])
def test_action_zero_is_the_base_and_actions_can_be_found_again(levels):
    encoding = Encoding(base="exact", reach=1.0)
    base = encoding.base_for(summary(levels))
    best = exact.optimise(SizeDistribution.from_histogram(summary().sizes, "web"), 0.8, levels).thresholds
    assert encoding.thresholds_at(base, np.zeros(ACTIONS)) == best
    moved = Thresholds.of([round(t * 1.2) for t in best.bytes])
    found = encoding.action_at(base, moved)
    np.testing.assert_allclose(found[: levels - 1], np.log(1.2), atol=1e-3)
    np.testing.assert_allclose(encoding.thresholds_at(base, found).bytes, moved.bytes, rtol=1e-4)


def test_middle_spans_1_kb_to_100_mb():
    encoding = Encoding(base="middle")
    base = encoding.base_for(summary(3))
    assert encoding.thresholds_at(base, [1, -1, 0, 0, 0, 0, 0]).bytes == (1000, 100_000_000)


def test_what_matters_does_not_change_when_all_sizes_grow_alike():
    encoding = Encoding(base="exact")
    one, other = summary(), summary(factor=256)
    first, second = (encoding.state_of(s, encoding.base_for(s)) for s in (one, other))
    same = [*range(LEVELS_AT.stop), *range(COMPACT, COMPACT + ACTIONS)]  # not: the mean size itself
    np.testing.assert_allclose(first[same], second[same], atol=0.01)
    assert mean_bytes(other.sizes) == pytest.approx(256 * mean_bytes(one.sizes), rel=1e-6)


def test_shares_of_flows_and_bytes_each_sum_to_one():
    state = Encoding().state_of(summary(), Encoding(base="middle").base_for(summary()))
    assert state[:32].sum() == pytest.approx(1, abs=1e-5)
    assert state[32:64].sum() == pytest.approx(1, abs=1e-5)


def test_what_flows_experienced_is_seen():
    outcome = Outcome(100.0, (0.2,) * 5, (2.0, 4.0, 1.0, 0.0, 8.0), 0.1, 2.0, 1024.0)
    told = summary(thresholds=Thresholds.of([10, 20, 30]), outcome=outcome, link_rate_bps=1e9)
    state = Encoding().state_of(told, Encoding(base="middle").base_for(told))
    np.testing.assert_allclose(state[82:90], [0.1, 0.2, 0.0, 0.0, 0.3, 0.1, 1.0, 1.0], atol=1e-6)


def test_an_address_that_is_none_costs_its_flow_the_address_only():
    encoding = Encoding("paper", "middle")
    flows = [FlowSummary("10.0.0.1", "10.0.0.2", 1, 2, 6, 1000, 100, 0), FlowSummary("x", "", 1, 2, 6, 1000, 100, 0)]
    told = summary(sample=tuple(flows))
    state = encoding.state_of(told, encoding.base_for(told)).reshape(100, 7)
    assert np.isfinite(state).all()
    assert (state != 0).any(axis=1).sum() == 2


def test_papers_encoding_is_100_flows_of_7_numbers():
    encoding = Encoding("paper", "middle")
    flows = tuple(FlowSummary("10.0.0.1", "fd00::7", 40_000, 80, 6, 2**15, 1000 * i, 0) for i in range(1, 121))
    told = summary(sample=flows)
    rows = encoding.state_of(told, encoding.base_for(told)).reshape(100, 7)
    np.testing.assert_allclose(rows[0, 2:5], [40_000 / 65_536, 80 / 65_536, 6 / 255], rtol=1e-6)
    np.testing.assert_allclose(rows[:, 6], 0.5)  # 2^15 of 2^30
    assert (np.diff(rows[:, 5]) > 0).all()  # the latest 100, in order
    assert rows[0, 5] == pytest.approx((np.log10(0.021) + 6) / 8, rel=1e-5)
    assert rows[0, 1] == pytest.approx(7 / 2**32)
    assert not encoding.state_of(summary(), encoding.base_for(summary())).any()  # no flows: zeros
