"""sRLA in central: proposals are bounded, every observation is a transition, and checkpoints go on exactly."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from central.policy.base import GroupSummary, Outcome
from central.srla import weights
from central.srla.online import OnlineSrla, Settings
from central.srla.policy import SrlaPolicy, alike
from central.thresholds import exact
from fabricpilot.config import PolicySection
from fabricpilot.errors import UsageError
from fabricpilot.histogram import LogHistogram
from fabricpilot.levels import Thresholds
from simulator.workloads.distribution import SizeDistribution

WEB = SizeDistribution.load("websearch_dctcp_bytes_trafficgenerator")
SIZES = LogHistogram.of(WEB.sample(np.random.default_rng(1), 5000))
QUICK = Settings(patience=4, batch=8, replay=64)


def summary(thresholds=None, fct_s=0.01, group="web", **more):
    outcome = Outcome(5000.0, (0.2,) * 5, (1.5, 1.6, 2.0, 4.0, 8.0), fct_s, 2.0, 20.0) if thresholds else None
    return GroupSummary(group, 4, 8, 5000.0, 0.8, SIZES, thresholds, 1e10, outcome, **more)


@pytest.fixture
def learner():
    return OnlineSrla(PolicySection(), settings=QUICK)


def lived(learner, rounds, seed=0):
    """Rounds of proposing, using what was proposed, and observing."""
    random = np.random.default_rng(seed)
    used = Thresholds.of([100_000, 1_000_000, 9_000_000])
    told = []
    for _ in range(rounds):
        used = learner.propose(summary(used)).thresholds or used
        told.append(learner.learn(summary(used, fct_s=float(random.uniform(0.008, 0.012)))))
    return used, told


def test_nothing_is_proposed_from_few_flows(learner):
    assert learner.propose(replace(summary(), flows=10.0)).thresholds is None


def test_proposals_stay_near_what_the_actor_says(learner):
    actor = SrlaPolicy.load().thresholds(summary())
    found = set()
    for _ in range(50):
        decision = learner.propose(summary())
        shift = np.log(np.array(decision.thresholds.bytes) / np.array(actor.bytes)) / learner.encoding.span
        assert np.abs(shift).max() <= learner.settings.noise_bound + 1e-3
        found.add(decision.thresholds)
    assert len(found) > 40  # it explores


def test_every_observation_is_a_transition_and_noise_anneals(learner):
    _, told = lived(learner, 12)
    assert [stats.transitions for stats in told] == list(range(1, 13))
    assert told[-1].updates == (12 - QUICK.patience + 1) * QUICK.updates
    assert told[-1].noise < told[0].noise
    assert all(abs(stats.reward) <= QUICK.cap for stats in told)


def test_during_a_trial_both_observations_count(learner):
    used = Thresholds.of([100_000, 1_000_000, 9_000_000])
    tried = learner.propose(summary(used)).thresholds
    learner.learn(summary(tried, fct_s=0.009))
    better = learner.learn(summary(used, fct_s=0.011)).reward
    assert learner.agent.replay.added == 2
    assert not np.array_equal(*learner.agent.replay.action[:2])
    assert better < 0  # slower than the challenger just was


@pytest.mark.parametrize(
    "odd",
    [
        {"outcome": None},
        {"outcome": Outcome(10.0, (0.2,) * 5, (1.0,) * 5, float("nan"), 1.0, 1.0)},
        {"outcome": Outcome(10.0, (0.2,) * 5, (1.0,) * 5, 0.0, 0.0, 1.0)},
        {"thresholds": Thresholds.of([1, 2])},
        {"link_rate_bps": 0.0},
    ],
)
def test_what_says_nothing_teaches_nothing(learner, odd):
    used = Thresholds.of([100_000, 1_000_000, 9_000_000])
    learner.propose(summary(used))
    assert learner.learn(replace(summary(used), **odd)).transitions == 0


def test_nothing_is_learned_before_anything_was_proposed(learner):
    assert learner.learn(summary(Thresholds.of([1, 2, 3]))).transitions == 0


def test_saved_and_loaded_it_goes_on_exactly(learner, tmp_path):
    lived(learner, 10)
    learner.save(tmp_path / "learner.npz")
    again = OnlineSrla(PolicySection(), settings=QUICK, seed=77)
    again.load(tmp_path / "learner.npz")
    assert lived(learner, 8, seed=5) == lived(again, 8, seed=5)
    for mine, theirs in zip(
        learner.agent.actor.state_dict().values(), again.agent.actor.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_another_checkpoint_is_refused_and_changes_nothing(learner, tmp_path):
    weights.save(tmp_path / "weights.npz", learner.agent, learner.encoding, {})
    before = learner.propose(summary()).thresholds.levels
    with pytest.raises(UsageError, match="no checkpoint"):
        learner.load(tmp_path / "weights.npz")
    assert learner.propose(summary()).thresholds.levels == before


def test_weights_that_are_no_numbers_are_replaced_by_the_shipped_ones(learner):
    lived(learner, QUICK.patience + 1)
    with torch.no_grad():
        next(learner.agent.critic.parameters()).fill_(float("nan"))
    _, told = lived(learner, 3)
    assert [stats.transitions for stats in told] == [0, 1, 2]  # nothing of what was learned is left
    assert all(torch.isfinite(part).all() for part in learner.agent.actor.state_dict().values())
    assert all(torch.isfinite(part).all() for part in learner.agent.critic.state_dict().values())
    assert learner.propose(summary()).thresholds is not None


def test_a_checkpoint_with_weights_that_are_no_numbers_is_refused(learner, tmp_path):
    lived(learner, 3)
    with torch.no_grad():
        next(learner.agent.actor.parameters())[0, 0] = float("inf")
    learner.save(tmp_path / "learner.npz")
    again = OnlineSrla(PolicySection(), settings=QUICK)
    with pytest.raises(UsageError, match="not finite"):
        again.load(tmp_path / "learner.npz")
    assert again.propose(summary()).thresholds is not None


def test_it_moves_towards_what_pays():
    """A world in which every threshold 20 % below the base makes flows faster, and 20 % above slower."""
    bold = Settings(
        patience=16,
        batch=32,
        replay=512,
        actor_rate=3e-3,
        critic_rate=3e-3,
        anchor=0.0,
        noise_start=0.3,
        noise_end=0.2,
        updates=8,
    )
    learner = OnlineSrla(PolicySection(), settings=bold)
    base = learner.encoding.base_for(summary())
    used = learner.encoding.thresholds_at(base, np.zeros(7))

    def actor_shift():
        chosen = SrlaPolicy(learner.agent, learner.encoding).thresholds(summary(used))
        return float(learner.encoding.action_at(base, chosen)[:3].mean())

    before = actor_shift()
    for _ in range(35):
        tried = learner.propose(summary(used)).thresholds or used
        shift = learner.encoding.action_at(base, tried)[:3].mean()
        learner.learn(summary(tried, fct_s=0.01 * float(np.exp(0.2 * shift))))
    assert actor_shift() < before - 0.1


def test_trained_weights_are_a_policy():
    policy = SrlaPolicy.load()
    decision = policy.decide(summary())
    best = exact.optimise(SizeDistribution.from_histogram(SIZES, "web"), 0.8, 4).mean
    found = exact.evaluate(SizeDistribution.from_histogram(SIZES, "web"), 0.8, decision.thresholds)
    assert found < 1.05 * best  # near the optimum on a workload that nobody trained it on
    assert policy.decide(summary(decision.thresholds)).thresholds is None or not alike(
        policy.thresholds(summary(decision.thresholds)), decision.thresholds
    )
    assert policy.decide(replace(summary(), flows=1.0)).thresholds is None


def test_weights_are_small_and_say_how_they_were_made():
    for path in weights.FOLDER.glob("*.npz"):
        assert path.stat().st_size < 5_000_000
        _, _, record = weights.load(path)
        assert {"seed", "seconds", "settings"} <= set(record)


def test_no_weights_is_told(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint"):
        SrlaPolicy.load(tmp_path / "none.npz")
