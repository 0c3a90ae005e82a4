"""AuTO's own agent for long flows: what it sees, what it may not choose, its reward by hand, and that it learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lrla_kit import assert_goes_on_exactly

from central.lrla.auto import auto
from central.lrla.flow_set import UNKNOWN_ROUTE
from central.lrla.laboratory import Lab, run
from central.lrla.learned import LearnedScheme
from central.lrla.paper import (
    ACTIVE,
    INPUTS,
    NO_PLACE,
    Baseline,
    HostEyes,
    PaperNetwork,
    active_features,
    encode,
    ended_features,
    places,
    rewards,
)
from central.lrla.reinforce import Rollout, Sampler, Settings, gradient, paper_weights, step
from central.lrla.synthetic import random_flows
from central.lrla.weights import PAPER
from central.training import checkpoint
from fabricpilot.errors import UsageError
from simulator.results import FlowResults

TINY = Settings(network="paper", iterations=2, runs=2, traffic_s=0.5)


def some_flows(n, seed=2, **changed):
    return replace(random_flows(n, np.random.default_rng(seed), hosts=8, racks=4), **changed)


def some_ended(hosts, sizes=1e7, fct_s=0.1):
    n = len(hosts)
    host, full = np.array(hosts, np.int64), np.ones(n)
    return FlowResults(np.arange(n), full * sizes, 0 * full, full * fct_s, full * 0.01, host, (host + 1) % 8)


def test_a_state_by_hand():
    flows = some_flows(1, source=np.array([1]), destination=np.array([3]), priority=np.array([1]))
    active = active_features(flows, np.array([0]))
    np.testing.assert_allclose(active, [[2 / 8, 4 / 8, 0, 0, 1, 1 / 3]])
    ended = ended_features(some_ended([1], sizes=2**15 - 1, fct_s=0.1), 8)
    np.testing.assert_allclose(ended, [[2 / 8, 3 / 8, 0, 0, 1, 2 / 5, 15 / 30]])
    state = encode(active, ended)
    assert state.shape == (INPUTS,) == (136,)
    assert state[:6].tolist() == active[0].tolist()
    assert state[66:73].tolist() == ended[0].tolist()
    assert not state[6:66].any()
    assert not state[73:].any()


def test_features_stay_between_0_and_1():
    flows = some_flows(500)
    ended = ended_features(some_ended(list(range(8)), sizes=1e15, fct_s=1e9), 8)
    for features in (active_features(flows, np.arange(500)), ended, ended_features(some_ended([0], 0.0, 0.0), 8)):
        assert features.min() >= 0
        assert features.max() <= 1


def test_the_oldest_eleven_have_places_and_the_others_no_choice():
    flows = some_flows(
        14,
        source=np.zeros(14, np.int64),
        destination=np.full(14, 7),
        source_rack=np.zeros(14, np.int64),
        destination_rack=np.full(14, 3),
        migration=np.zeros(14, np.bool_),
        age_s=np.arange(14.0),
    )
    assert places(flows, 0).tolist() == list(range(13, 2, -1))
    seen = HostEyes().see(flows, np.arange(14))
    assert seen.states.shape == (1, 136)
    assert seen.place.tolist() == [NO_PLACE] * 3 + list(range(ACTIVE - 1, -1, -1))
    assert seen.usable.any(dim=1).tolist() == [False] * 3 + [True] * 11
    assert seen.allowed.sum(dim=1).tolist() == [1] * 3 + [4] * 11


def test_only_the_last_ten_that_ended_at_the_host_are_seen():
    flows, eyes = some_flows(1, source=np.array([1])), HostEyes()
    for number in range(12):
        eyes.watch(some_ended([1, 2], fct_s=0.01 * (number + 1)))
    state = eyes.see(flows, np.array([0])).states[0].numpy()
    expected = ended_features(FlowResults.joined([some_ended([1], fct_s=0.01 * (n + 1)) for n in range(2, 12)]), 8)
    np.testing.assert_allclose(state[66:].reshape(10, 7), expected, rtol=1e-6)


@pytest.mark.parametrize("routes", [1, 2, 4, 7])
def test_what_is_masked_is_never_chosen(routes):
    torch.manual_seed(1)
    flows = random_flows(200, np.random.default_rng(1), hosts=8, racks=4, routes=routes)
    flows = replace(flows, priorities=np.full(200, 3), usable=np.tile(np.arange(routes) != 1, (200, 1)))
    choice = Sampler(PaperNetwork(), torch.Generator().manual_seed(1)).decide(flows, np.arange(200))
    assert choice.priority.max() == 2
    assert set(choice.priority[flows.migration].tolist()) == {0}
    assert set(choice.route[~flows.crosses].tolist()) == {UNKNOWN_ROUTE}
    assert set(choice.route.tolist()) <= {UNKNOWN_ROUTE, 0, 2, 3}


def test_a_reward_by_hand():
    # One host, steps of two ticks: what ended in the two ticks after a decision over the two up to it.
    gains = np.array([[2.0], [2.0], [1.0], [5.0], [90.0], [0.0], [0.0]])
    found = rewards(gains, np.array([1, 2, 3, 4, 6]), 2, cap=10.0)
    # Tick 1: 1 + 5 over 2 + 2. Tick 2: 95 over 3, capped. Tick 3: 90 over 6, capped. Then nothing ends: 0. At the end
    # nothing has ended before either: 1.
    assert found[:, 0].tolist() == [1.5, 10.0, 10.0, 0.0, 1.0]


def test_the_baseline_is_a_running_mean_per_host():
    baseline = Baseline(2)
    baseline.add(np.array([[1.0, 0.0], [2.0, 0.0]]))
    baseline.add(np.array([[6.0, 3.0]]))
    assert baseline.mean.tolist() == [3.0, 1.0]


def test_weights_are_the_senders_rewards_less_their_mean():
    gains = np.array([[1.0, 2.0], [3.0, 1.0], [0.0, 0.0]])
    runs = [Rollout(np.zeros((3, 2)), gains, [0, 1], [np.array([0, 1, 1]), np.array([1])], [])]
    settings = replace(TINY, paper=replace(TINY.paper, step_s=0.1, cap=2.0))
    # Rewards at tick 0: min(3 / 1, 2) and 1 / 2; at tick 1: 0 and 0. Means 1 and 0.25.
    ((first, second),) = paper_weights(runs, settings, 0.1, Baseline(2))
    assert first.tolist() == [1.0, 0.25, 0.25]
    assert second.tolist() == [-0.25]


def test_a_toy_task_is_learned():
    """The first priority is to be given to all flows: every flow that has it is a point."""
    torch.manual_seed(0)
    network, chances = PaperNetwork((32,)), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    flows = some_flows(16, migration=np.zeros(16, np.bool_))
    for _ in range(60):
        sampler = Sampler(network, chances)
        good = (sampler.decide(flows, np.arange(16)).priority == 3).astype(np.float64)
        step(network, optimiser, [gradient(network, sampler.decisions, [good - good.mean()], 0.0)], 1.0)
    chosen = Sampler(network, chances).decide(flows, np.arange(16)).priority
    assert (chosen == 3).sum() >= 14


def test_same_seed_same_run_and_a_checkpoint_goes_on_exactly(tmp_path):
    assert_goes_on_exactly(TINY, tmp_path)


def test_the_shipped_weights_say_how_they_were_made_and_run():
    assert PAPER.stat().st_size < 1_000_000
    record = checkpoint.load(PAPER)["record"]
    assert record["settings"]["network"] == "paper"
    assert {"seed", "seconds"} <= set(record)
    outcomes = [run(Lab(traffic_s=0.6, warm_up_s=0.0), auto(), 3) for _ in range(2)]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].long_flows > 0


def test_weights_of_the_other_network_are_refused():
    with pytest.raises(UsageError, match="sets"):
        LearnedScheme.load(PAPER)
    with pytest.raises(UsageError, match="paper"):
        auto(PAPER.with_name("lrla.npz"))
