"""The learned planner: tables stay true along a walk, masks hold, training learns, the environments are sound."""

import warnings
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from central.planner.generator import SHAPES, generate
from central.planner.learned import distill, pairs, ppo, weights
from central.planner.learned.envs import KINDS, Kind, RescheduleEnv, register_envs
from central.planner.learned.network import Policy, batch_of
from central.planner.learned.observe import Observer
from central.planner.learned.rollout import Cut, Tokens, roll, sample
from central.planner.learned.solver import Options, learned
from central.planner.model.objective import parse_objective
from central.planner.model.problem import Deadline, Limits, Problem
from central.planner.planning import make_plan, plan_by
from central.planner.solvers import portfolio
from central.planner.solvers.gains import shift_gain
from central.planner.solvers.greedy import Walk
from fabricpilot.errors import UsageError


def problem_of(name="tiny", mnl=6, objective="fr", **limits):
    return Problem(generate(SHAPES[name], 1), parse_objective(objective), Limits(mnl, **limits))


@pytest.mark.parametrize("objective", ["fr", "mixed", "multi"])
def test_tables_after_moves_are_those_of_a_new_observer(objective):
    walk = Walk(problem_of(objective=objective))
    observer = Observer(walk, net=False)
    random = np.random.default_rng(0)
    for _ in range(6):
        seen = observer.observe()
        vm = int(random.choice(np.flatnonzero(seen.vm_mask)))
        places, _, legal = observer.places(vm)
        if legal.any():
            source = int(walk.state.vm_place[vm])
            place = places.start + int(random.choice(np.flatnonzero(legal)))
            assert walk.may(vm, place)
            walk.go(vm, place)
            observer.moved(vm, source, place)
    fresh = Observer(walk, net=False)
    for table, expected in zip(
        observer.pairs.both + observer.pairs.turn, fresh.pairs.both + fresh.pairs.turn, strict=True
    ):
        np.testing.assert_array_equal(table, expected)
    np.testing.assert_array_equal(observer.observe().vm, fresh.observe().vm)
    np.testing.assert_array_equal(observer.pm, fresh.pm)
    np.testing.assert_array_equal(observer.tables.fits, walk.tables.fits)
    for group in range(walk.cluster.groups):
        window = slice(walk.cluster.group_places[group].start, walk.cluster.group_places[group].stop)
        for table, sign in ((observer.tables.leave, 1), (walk.tables.arrive, -1)):
            expected = shift_gain(walk.state, walk.valuation, group, sign)
            np.testing.assert_allclose(table[group, window], expected, atol=1e-5)


def test_tokens_of_two_changed_trees_are_those_of_all_trees():
    torch.manual_seed(0)
    policy = Policy().eval()
    walk = Walk(problem_of("small"))
    observer = Observer(walk)
    with torch.no_grad():
        tokens = Tokens(policy, [observer])
        vm = int(np.flatnonzero(observer.observe().vm_mask)[3])
        places, _, legal = observer.places(vm)
        place = places.start + int(np.flatnonzero(legal)[-1])
        source = int(walk.state.vm_place[vm])
        walk.go(vm, place)
        observer.moved(vm, source, place)
        tokens.refresh([(0, observer, int(pm)) for pm in sorted(set(walk.cluster.place_pm[[source, place]]))])
        whole = Tokens(policy, [observer])
    torch.testing.assert_close(tokens.vm, whole.vm, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tokens.pm, whole.pm, atol=1e-5, rtol=1e-4)


def test_padding_changes_nothing():
    torch.manual_seed(0)
    policy = Policy().eval()
    walks = [Walk(problem_of(name)) for name in ("tiny", "small")]
    seen = [Observer(walk).observe() for walk in walks]
    with torch.no_grad():
        alone, together = batch_of(seen[:1]), batch_of(seen)
        score_alone = policy.score(alone, *policy.encode_all(alone))[0][0]
        score_both = policy.score(together, *policy.encode_all(together))[0][0]
    torch.testing.assert_close(score_alone, score_both[: len(score_alone)], atol=1e-4, rtol=1e-4)
    assert (score_both[len(score_alone) :] < -1e8).all()


def test_pairs_are_what_two_moves_gain():
    walk = Walk(problem_of("small"))
    pairs = Observer(walk).pairs
    before = walk.value()
    for kind, (groups, places) in enumerate(zip(pairs.groups, pairs.places, strict=True)):
        for a, b, at in np.argwhere(pairs.both[kind] > 0)[:5].tolist():
            place = places.start + at
            one = walk.occupancy.at[int(groups[a]), place][0]
            two = walk.occupancy.at[int(groups[b]), place][-1]
            state = walk.state.copy()
            for vm in (one, two):
                for node in walk.cluster.nodes_of(place):
                    state.free_cores[node] += walk.cluster.group_cores[walk.cluster.vm_group[vm], 0]
            value = walk.valuation.value(walk.cluster, state.free_cores, state.free_mem_mb)
            assert value - before == pytest.approx(float(pairs.both[kind][a, b, at]))
    assert (pairs.both[0] > 0).any()
    assert (pairs.turn[0] > 0).any()


def test_no_walk_goes_in_circles():
    policy = Policy().eval()
    walk = Walk(problem_of("tiny", mnl=40))
    roll(policy, [walk], torch.Generator().manual_seed(0), Cut())
    come, gone = set(), set()
    for vm, source, target in walk.state.history:
        group = int(walk.cluster.vm_group[vm])
        assert (group, source) not in come
        assert (group, target) not in gone
        come.add((group, target))
        gone.add((group, source))


def test_an_untrained_policy_makes_no_illegal_move():
    policy = Policy().eval()
    kind = replace(SHAPES["small"], affinity_sets=40, pms_per_rack=5, immovable_share=0.2, outage_pms=2)
    problem = Problem(generate(kind, 2), parse_objective("fr"), Limits(15, per_pm=2, per_tenant=3))
    first = Walk(problem)
    paths = roll(policy, [first, first.fork()], torch.Generator().manual_seed(0), Cut())
    for path in paths:
        fresh = Walk(problem)
        assert len(path.walk.steps) > 5
        for step in path.walk.steps:
            place = fresh.cluster.place_index(step.vm, step.target)
            assert fresh.may(step.vm, place)
            fresh.go(step.vm, place)


def test_cut_keeps_the_likeliest():
    scores = torch.tensor([[0.0, 3.0, 2.0, 1.0, -1e9]])
    drawn = {int(sample(scores, 0.5, torch.Generator().manual_seed(seed), [False])[1][0]) for seed in range(60)}
    assert drawn == {1, 2}
    assert int(sample(scores, 0.0, torch.Generator(), [True])[1][0]) == 1


def test_advantages_by_hand():
    got = ppo.advantages(np.array([1.0, 0.0, 2.0]), np.array([0.5, 1.0, 1.5]), 0.9, 0.8)
    third = 2.0 - 1.5
    second = 0.9 * 1.5 - 1.0 + 0.72 * third
    first = 1.0 + 0.9 * 1.0 - 0.5 + 0.72 * second
    np.testing.assert_allclose(got, [first, second, third])


def identity(random):
    """One PM with 12 free cores of 16 and a 4-core VM on it, one with a hole of 4: the right move is worth a slot."""
    kind = replace(SHAPES["tiny"], pms=4, vms=24)
    return Problem(generate(kind, int(random.integers(3))), parse_objective("fr"), Limits(3))


def test_ppo_learns(tmp_path):
    told = []
    settings = ppo.Settings(iterations=30, walks=8, learning_rate=3e-3, seed=1, passes=2)
    ppo.train(settings, tmp_path / "w.npz", report=told.append, problems=identity)
    gained = [float(line.split("move ")[1].split()[0]) for line in told]
    assert gained[-1] > gained[0] + 0.1


def test_ppo_is_deterministic(tmp_path):
    settings = ppo.Settings(iterations=3, walks=3, seed=1)
    one, two = (ppo.train(settings, tmp_path / "w.npz", problems=identity).state_dict() for _ in range(2))
    for a, b in zip(one.values(), two.values(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_distillation_learns_to_gain(tmp_path):
    settings = distill.Settings(
        updates=20, batch=12, pms=(6, 8), moves_per_pm=(0.3, 0.5), pool=10, fresh=4, learning_rate=3e-3
    )
    told = []
    distill.distill(settings, tmp_path / "w.npz", report=told.append)
    random = np.random.default_rng(9)
    batch = [
        lesson
        for _ in range(4)
        for lesson in distill.lessons(Policy().eval(), distill.random_problem(settings, random), settings, random)
    ]
    torch.manual_seed(0)
    trained, about = weights.load(tmp_path / "w.npz")
    assert about["updates"] == 20
    with torch.no_grad():
        before, after = (
            sum(float(part) for part in distill.loss_of(policy, batch)[:2]) for policy in (Policy(), trained)
        )
    assert after < 0.9 * before


def test_shipped_weights_are_good():
    problem = problem_of("small", mnl=10)
    plan = plan_by(problem, "learned", learned, 30.0, 0)
    assert plan.final.slots >= make_plan(problem, "greedy", 5.0).final.slots
    policy, about = weights.load()
    assert sum(value.numel() for value in policy.parameters()) < 100_000
    assert about["algorithm"]


def test_learned_is_deterministic():
    plans = [learned(problem_of("small"), Deadline(30.0), 3, Options(samples=3)) for _ in range(2)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("name", KINDS)
def test_environments_pass_the_checker(name):
    register_envs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*not within the observation space bounds.*|.*infinity.*")
        env = gym.make(f"fabricpilot/{name}-v0", disable_env_checker=True).unwrapped
        check_env(env, skip_render_check=True)


def test_invalid_action_is_a_flagged_no_op():
    env = RescheduleEnv(Kind(penalty=0.1))
    seen, _ = env.reset(seed=4)
    full = np.flatnonzero(~env.place_mask(0))
    again, reward, _, _, info = env.step(np.array([0, full[0]]))
    assert info["invalid"]
    assert reward == pytest.approx(-0.1)
    np.testing.assert_array_equal(seen["pm"], again["pm"])


def test_two_environments_of_one_seed_agree():
    runs = []
    for _ in range(2):
        env = RescheduleEnv(Kind(sparse=True))
        _, info = env.reset(seed=7)
        rewards = []
        for _ in range(5):
            vm = int(np.flatnonzero(info["vm_mask"])[0])
            place = int(np.flatnonzero(env.place_mask(vm))[0])
            seen, reward, _, _, info = env.step(np.array([vm, place]))
            rewards.append((reward, float(seen["vm"].sum())))
        runs.append(rewards)
    assert runs[0] == runs[1]


def test_too_many_sizes_are_refused(monkeypatch, ticking):
    monkeypatch.setattr(pairs, "MOST_ENTRIES", 100)
    with pytest.raises(UsageError, match="too many for it"):
        learned(problem_of("tiny"), Deadline(30.0), 0)
    monkeypatch.setattr(portfolio, "OTHERS", (("learned", 1.0, 0.0),))
    assert portfolio.beside(problem_of("tiny"), Deadline(0.3, ticking), 0).steps  # which goes on without it
