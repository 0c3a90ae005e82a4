import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds
from simulator.envs import LONG_FLOWS, MLFQ_THRESHOLDS, rewards
from simulator.envs.thresholds import MLFQThresholds, action_of, thresholds_of
from simulator.longflows import paper_reward, throughputs
from simulator.results import FlowResults, p99

CASES: list[tuple[str, dict[str, Any]]] = [
    (MLFQ_THRESHOLDS, {"flows_per_step": 100}),
    (MLFQ_THRESHOLDS, {"flows_per_step": 100, "observation": "paper", "reward": "ratio", "levels": 8}),
    (MLFQ_THRESHOLDS, {"flows_per_step": 100, "scheme_name": "backlog", "control_delay_s": 0.01, "reward": "p99"}),
    (LONG_FLOWS, {}),
    (LONG_FLOWS, {"reward": "ratio", "spines": 3, "control_delay_s": 0.01, "interval_s": 0.02}),
]


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_gymnasium_finds_nothing_to_warn_of(name: str, arguments: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(name, **arguments).unwrapped, skip_render_check=True)


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_two_instances_with_one_seed_are_one(name: str, arguments: dict[str, Any]) -> None:
    first, second = (gym.make(name, **arguments) for _ in range(2))
    one, two = first.reset(seed=3), second.reset(seed=3)
    first.action_space.seed(5)
    np.testing.assert_array_equal(one[0], two[0])
    for _ in range(20):
        action = first.action_space.sample()
        a, b = first.step(action), second.step(action)
        np.testing.assert_array_equal(a[0], b[0])
        assert a[1:4] == b[1:4]
        assert np.isfinite(a[1])
        assert first.observation_space.contains(a[0])


@pytest.mark.parametrize("name", [MLFQ_THRESHOLDS, LONG_FLOWS])
def test_vectorised_and_truncated(name: str) -> None:
    envs = gym.make_vec(name, num_envs=3, vectorization_mode="sync", steps=2)
    observation, info = envs.reset(seed=1)
    assert observation.shape[0] == 3
    assert len(set(info["flows"].tolist())) > 1 or not np.array_equal(observation[0], observation[1])
    envs.step(envs.action_space.sample())
    _, _, terminated, truncated, _ = envs.step(envs.action_space.sample())
    assert truncated.all()
    assert not terminated.any()
    envs.close()


def test_docstrings_have_the_fixed_headings() -> None:
    for name in (MLFQ_THRESHOLDS, LONG_FLOWS):
        text = type(gym.make(name).unwrapped).__doc__ or ""
        headings = [line.strip()[3:] for line in text.splitlines() if line.strip().startswith("## ")]
        assert headings == [
            "Description",
            "Action Space",
            "Observation Space",
            "Rewards",
            "Starting State",
            "Episode End",
            "Arguments",
            "Version History",
        ]


def test_every_action_is_a_valid_vector_and_can_be_found_again() -> None:
    assert thresholds_of([1, 1, -1]).bytes == (1000, 100_000_000, 100_000_001)
    given = Thresholds.of([20_000, 500_000, 3_000_000])
    found = thresholds_of(action_of(given))
    np.testing.assert_allclose(found.bytes, given.bytes, rtol=1e-5)


def test_good_thresholds_are_rewarded() -> None:
    def total(thresholds: Thresholds) -> float:
        env = MLFQThresholds(load=0.8, flows_per_step=1000, levels=4)
        env.reset(seed=1)
        return sum(env.step(action_of(thresholds))[1] for _ in range(10))

    good, useless = Thresholds.of([30_000, 300_000, 2_000_000]), Thresholds.of([99_999_998, 99_999_999, 100_000_000])
    assert total(good) > total(useless) + 0.5


def test_long_flows_are_seen_and_verdicts_change_them() -> None:
    env = gym.make(LONG_FLOWS, load=0.8, interval_s=0.5).unwrapped
    env.reset(seed=1)
    for _ in range(5):
        observation, _, _, _, info = env.step(np.tile([2, 1], 11))
    seen = int(info["occupied"].sum())
    assert seen > 0
    assert (observation[:seen, 0] == 1).all()
    assert (observation[seen:] == 0).all()
    assert env.action_masks().sum() == seen * 6 + (11 - seen) * 2
    env.step(np.tile([2, 1], 11))
    by_number = dict(zip(env._simulation.active().flow.tolist(), env._simulation.active().level.tolist(), strict=True))
    kept = [by_number[f] for f in env._long.flow.tolist() if f in by_number]
    assert 2 in kept


@pytest.mark.parametrize(
    "arguments", [{"load": 1.2}, {"levels": 9}, {"cdf": "none"}, {"reward": "x"}, {"observation": "x"}, {"steps": 0}]
)
def test_bad_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        MLFQThresholds(**arguments)


def _results(fct_s: list[float], ideal_s: list[float]) -> FlowResults:
    n = np.zeros(len(fct_s), np.int64)
    return FlowResults(n, np.full(len(fct_s), 1e6), np.zeros(len(fct_s)), np.array(fct_s), np.array(ideal_s), n, n)


def test_rewards() -> None:
    results = _results([2.0, 4.0], [1.0, 1.0])
    assert rewards.mean_fct(results) == pytest.approx(-np.log(3))
    assert rewards.mean_slowdown(results) == pytest.approx(-np.log(3))
    assert rewards.p99_slowdown(results) == pytest.approx(-np.log(3.98))
    values = np.random.default_rng(1).lognormal(size=777)
    assert p99(values) == pytest.approx(np.percentile(values, 99), rel=1e-12)
    assert p99(values[:1]) == values[0]
    assert throughputs(results, 2).tolist() == [750_000, 0]
    assert paper_reward([2.0, 1.0, 0.0, 4.0], [3.0, 9.0, 1.0, 0.0], 3.0).tolist() == [1.5, 3.0, 1.0, 0.0]
    assert rewards.ratio(3.0, 2.0, 3.0) == 1.5
    assert rewards.ratio(30.0, 2.0, 3.0) == 3.0
    assert rewards.ratio(0.0, 2.0, 3.0) == 1.0
    empty = _results([], [])
    assert [kind(empty) for kind in rewards.KINDS.values()] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", [MLFQ_THRESHOLDS, LONG_FLOWS])
def test_stable_baselines_accepts_it(name: str) -> None:
    checker = pytest.importorskip("stable_baselines3.common.env_checker", reason="the optional stable-baselines3")
    checker.check_env(gym.make(name).unwrapped, warn=True)


@pytest.mark.parametrize("name", [MLFQ_THRESHOLDS, LONG_FLOWS])
def test_torchrl_accepts_it(name: str) -> None:
    torchrl = pytest.importorskip("torchrl.envs", reason="the optional torchrl")
    from torchrl.envs.utils import check_env_specs

    check_env_specs(torchrl.GymWrapper(gym.make(name)))
