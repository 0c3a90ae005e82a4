"""Training: the same run from the same seed on any workers, resumed exactly, by the command, with logs."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gymnasium.utils.env_checker import check_env

from central.srla import ddpg, weights
from central.srla.encoding import Encoding
from central.srla.environment import Settings as World
from central.srla.environment import ThresholdTrials
from central.srla.training import Settings, SrlaTrainer
from central.training import loop, records, settings, workers
from central.training.cli import train
from fabricpilot.errors import FabricpilotError, UsageError
from simulator.workloads.situations import HELD_OUT, Range, draw

WORLD = World(Range(rates_gbps=(10.0,)), flows=200, reported=(200, 400), situations=2)
TINY = Settings(
    base="split",
    rounds=8,
    environments=4,
    warm=3,
    updates=2,
    check_every=4,
    check=2,
    check_flows=200,
    agent=ddpg.Settings(actor_layers=(16,), joint_layers=(16,), batch=8, replay=64, actor_waits=2),
    environment=WORLD,
)
CONFIG = """
base = "split"
rounds = 4
environments = 2
warm = 2
updates = 1
check = 1
check_flows = 100
[agent]
actor_layers = [8]
joint_layers = [8]
replay = 32
[environment]
flows = 100
reported = [100, 200]
situations = 1
"""


def finished(trainer):
    while trainer.done < trainer.total:
        trainer.advance()
    found = [value.clone() for value in trainer.agent.actor.state_dict().values()]
    trainer.close()
    return found


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_same_seed_same_run_whatever_the_workers():
    alone = finished(SrlaTrainer(TINY, seed=3))
    assert same(alone, finished(SrlaTrainer(TINY, seed=3, count=2)))
    assert not same(alone, finished(SrlaTrainer(TINY, seed=4)))


def test_a_resumed_run_is_the_same_run(tmp_path):
    whole = SrlaTrainer(TINY, seed=3)
    first = SrlaTrainer(TINY, seed=3)
    for _ in range(5):
        first.advance()
    from central.training import checkpoint

    checkpoint.save(tmp_path / "c.npz", first.state())
    first.close()
    second = SrlaTrainer(TINY, seed=99)
    second.restore(checkpoint.load(tmp_path / "c.npz"))
    assert second.done == 5
    assert same(finished(whole), finished(second))


def test_papers_agent_trains_on_the_ratio():
    agent = replace(ddpg.PAPER, actor_layers=(16,), state_layers=(16,), joint_layers=(8,), batch=8, replay=64)
    world = replace(WORLD, reward="ratio")
    run = replace(TINY, kind="paper", base="middle", agent=replace(agent, actor_waits=0), environment=world)
    trainer = SrlaTrainer(run, seed=1)
    told = [trainer.advance() for _ in range(6)]
    assert "value" in told[-1]
    assert all(-1 <= step["reward"] <= 2 for step in told)
    trainer.close()


def test_the_command_trains_resumes_and_writes_weights(tmp_path):
    config, out = tmp_path / "config.toml", tmp_path / "run"
    config.write_text(CONFIG)
    arguments = ["srla", "--config", str(config), "--seed", "2", "--out", str(out)]
    done = CliRunner().invoke(train, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    agent, encoding, record = weights.load(out / "weights.npz")
    assert record["seed"] == 2
    assert encoding.base == "split"
    assert agent.act(np.zeros((1, agent.features), np.float32), np.ones((1, 7), np.float32)).shape == (1, 7)
    assert any((out / "logs").iterdir())
    with pytest.raises(UsageError, match="--resume"):
        CliRunner().invoke(train, arguments, catch_exceptions=False)
    again = CliRunner().invoke(train, [*arguments, "--resume"], catch_exceptions=False)
    assert again.exit_code == 0
    other = [*arguments[:3], "--seed", "5", "--out", str(out), "--resume"]
    with pytest.raises(UsageError, match="another run"):
        CliRunner().invoke(train, other, catch_exceptions=False)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("roundz = 3", "roundz"),
        ("[agent]\nlearning = 1", "agent: 'learning'"),
        ('rounds = "many"', "rounds"),
        ("rounds = [", "cannot read"),
    ],
)
def test_wrong_configurations_are_told(tmp_path, text, told):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=told):
        settings.read(Settings, path)


def test_settings_come_back_from_their_record():
    assert settings.read(Settings, None, settings.as_record(TINY)) == TINY


class Counter:
    """A trainer that counts, to try the loop on."""

    total = 5

    def __init__(self, fail_at=None):
        self.done, self.closed, self.fail_at = 0, False, fail_at

    def advance(self):
        if self.done == self.fail_at:
            raise FabricpilotError("out of order")
        self.done += 1
        return {"done": float(self.done)}

    def state(self):
        return {"done": self.done}

    def restore(self, state):
        self.done = state["done"]

    def export(self, path, record):
        path.write_text(json.dumps(record))

    def close(self):
        self.closed = True


def test_the_loop_ends_its_workers_when_training_fails(tmp_path):
    trainer = Counter(fail_at=3)
    with pytest.raises(FabricpilotError, match="out of order"):
        loop.run(trainer, tmp_path, {})
    assert trainer.closed


def test_logs_are_csv_without_tensorboard(tmp_path):
    first = records.CsvRecords(tmp_path / "metrics.csv")
    first.add(1, {"gain": 0.5})
    first.close()
    second = records.CsvRecords(tmp_path / "metrics.csv")
    second.add(2, {"gain": 1.0, "noise": 0.25})
    second.close()
    rows = list(csv.reader((tmp_path / "metrics.csv").open()))
    assert rows == [["step", "name", "value"], ["1", "gain", "0.5"], ["2", "gain", "1"], ["2", "noise", "0.25"]]


def test_workers_answer_in_order_and_tell_failures():
    team = workers.start(int, 2)  # the numbers 0 and 1
    try:
        team.begin("__add__", [(10,), (20,)])
        assert team.collect() == [10, 21]
        team.begin("__floordiv__", [(1,), (0,)])
        with pytest.raises(FabricpilotError, match="worker-1 failed"):
            team.collect()
        team.begin("__add__", [(1,), (1,)])
        assert team.collect() == [1, 2]
    finally:
        team.close()
    with pytest.raises(UsageError, match="0 workers"):
        workers.start(int, 0)


def test_environment_is_a_gymnasium_environment():
    check_env(ThresholdTrials(WORLD, Encoding(base="split"), 1), skip_render_check=True)


def test_relative_reward_of_the_base_is_zero_and_of_worse_is_negative():
    world = replace(WORLD, flows=5000, reported=(5000, 5000), range=replace(WORLD.range, load=(0.8, 0.8), bursty=0.0))
    trials = ThresholdTrials(world, Encoding(base="exact", reach=3.0), 5)
    trials.reset()
    assert trials.step(np.zeros(7, np.float32))[1] == 0.0
    assert trials.step(np.full(7, 1.0, np.float32))[1] < 0


def test_held_out_distributions_are_never_drawn():
    random = np.random.default_rng(0)
    drawn = " ".join(draw(Range(), random).sizes.name for _ in range(200))
    assert not any(name in drawn for name in HELD_OUT)


def test_td3_trains_on_the_same_environment_and_leaves_weights_like_ours(tmp_path):
    pytest.importorskip("stable_baselines3", reason="needs the extra sb3")
    config = tmp_path / "config.toml"
    config.write_text(CONFIG + "\n[environment.range]\nlevels = [3, 3]\n")
    arguments = ["srla", "--algorithm", "td3", "--config", str(config), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(train, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    agent, _, record = weights.load(tmp_path / "run" / "weights.npz")
    assert record["algorithm"] == "td3"
    assert np.abs(agent.act(np.ones((1, agent.features), np.float32), np.ones((1, 7), np.float32))).max() > 0
    with pytest.raises(UsageError, match="cannot be resumed"):
        CliRunner().invoke(train, [*arguments, "--resume"], catch_exceptions=False)


def test_the_actor_of_td3_is_copied_exactly():
    pytest.importorskip("stable_baselines3", reason="needs the extra sb3")
    from central.srla.comparison import Td3Trainer

    trainer = Td3Trainer(replace(TINY, rounds=2, check_every=2), seed=1)
    trainer.advance()
    states = np.random.default_rng(0).random((5, trainer.agent.features), np.float32)
    theirs, _ = trainer._model.predict(states, deterministic=True)
    np.testing.assert_allclose(trainer.agent.act(states, np.ones((5, 7), np.float32)), theirs, atol=1e-6)
    trainer.close()


def test_shipped_configurations_are_read():
    folder = weights.FOLDER.parent / "configs"
    found = {path.stem: settings.read(Settings, path) for path in folder.glob("*.toml")}
    assert set(found) >= {"srla", "auto", "scratch"}
    assert found["auto"].agent == replace(
        ddpg.PAPER,
        **{
            name: getattr(found["auto"].agent, name)
            for name in ("actor_rate", "batch", "replay", "noise_start", "noise_end", "actor_waits")
        },
    )


@pytest.mark.scale
def test_ray_runs_the_same_run():
    pytest.importorskip("ray", reason="needs the extra scale")
    alone = finished(SrlaTrainer(TINY, seed=3))
    assert same(alone, finished(SrlaTrainer(TINY, seed=3, count=2, ray_address="local")))
