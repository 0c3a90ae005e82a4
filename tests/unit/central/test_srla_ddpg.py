"""DDPG: its equations by hand, a task it must solve, the same run from the same seed, and exact checkpoints."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from central.srla.ddpg import Batch, Ddpg, Replay, Settings, soft_update
from central.training import checkpoint
from fabricpilot.errors import UsageError

torch.set_num_threads(1)  # small networks: threads only wait for each other

SMALL = Settings(actor_layers=(32,), joint_layers=(32, 32), batch=64, replay=4096, actor_waits=0)


def filled(agent, n=256, seed=0):
    """The agent with `n` transitions whose reward is best where the action is half the state."""
    random = np.random.default_rng(seed)
    state = random.uniform(-1, 1, (n, agent.features)).astype(np.float32)
    action = random.uniform(-1, 1, (n, agent.actions)).astype(np.float32)
    reward = -((action - state[:, : agent.actions] / 2) ** 2).sum(1)
    ones = np.ones(n, np.float32)
    agent.replay.add(state, action, np.ones_like(action), reward, np.roll(state, 1, 0), ones)
    return agent


def batch_of(state, action, reward=(0.0,), goes_on=(1.0,), weight=None):
    rows = len(state)
    columns = [torch.tensor(values, dtype=torch.float32) for values in (state, action)]
    mask = torch.ones_like(columns[1])
    weights = torch.ones(rows) if weight is None else torch.tensor(weight)
    return Batch(
        *columns, mask, torch.tensor(reward), columns[0].clone(), torch.tensor(goes_on), weights, np.arange(rows)
    )


class Linear(nn.Module):
    """Q(s, a) = 2 s + 3 a for numbers s and a."""

    def forward(self, state, action):
        return (2 * state + 3 * action)[:, 0]


def test_target_is_reward_plus_the_discounted_value_of_what_follows():
    agent = Ddpg(replace(SMALL, gamma=0.5), 1, 1, seed=0)
    agent.critic_target = Linear()
    agent.actor_target = lambda state, mask: torch.full_like(state, 0.25)
    found = agent.target(batch_of([[1.0], [1.0]], [[0.0], [0.0]], (10.0, 10.0), (1.0, 0.0)))
    assert found.tolist() == [10 + 0.5 * (2 * 1 + 3 * 0.25), 10.0]


def test_without_discount_the_target_is_the_reward():
    agent = Ddpg(SMALL, 1, 1, seed=0)
    assert agent.target(batch_of([[1.0]], [[0.5]], (7.0,))).tolist() == [7.0]


def test_critic_loss_is_the_weighed_squared_error():
    agent = Ddpg(SMALL, 1, 1, seed=0)
    agent.critic = Linear()
    loss, error = agent.critic_loss(batch_of([[1.0], [2.0]], [[1.0], [0.0]], (4.0, 6.0), (1.0, 1.0), (1.0, 0.5)))
    assert error.tolist() == [1.0, -2.0]  # 5 - 4 and 4 - 6
    assert float(loss) == (1 * 1 + 0.5 * 4) / 2


def test_gradient_of_the_actor_by_hand():
    agent = Ddpg(replace(SMALL, actor_layers=(), anchor=0.1), 1, 1, seed=0)
    with torch.no_grad():
        agent.actor.out.weight.fill_(0.5)
        agent.actor.out.bias.fill_(0.1)
    agent.critic = Linear()
    loss = agent.actor_loss(batch_of([[0.8]], [[0.0]]))
    loss.backward()
    mu = np.tanh(0.5 * 0.8 + 0.1)
    assert loss.item() == pytest.approx(0.1 * mu**2 - (2 * 0.8 + 3 * mu))
    by_output = (2 * 0.1 * mu - 3) * (1 - mu**2)  # through the tanh
    assert float(agent.actor.out.weight.grad) == pytest.approx(by_output * 0.8, rel=1e-5)
    assert float(agent.actor.out.bias.grad) == pytest.approx(by_output, rel=1e-5)


def test_a_relative_critic_is_zero_at_the_base():
    agent = filled(Ddpg(SMALL, 3, 2, seed=0))
    for _ in range(5):
        agent.update()
    states = np.random.default_rng(1).normal(size=(9, 3)).astype(np.float32)
    assert not agent.value(states, np.zeros((9, 2), np.float32)).any()
    assert agent.value(states, np.ones((9, 2), np.float32)).any()


def test_soft_update_by_hand():
    target, network = nn.Linear(1, 1), nn.Linear(1, 1)
    for module, weight, bias in ((target, 1.0, 0.0), (network, 3.0, 4.0)):
        nn.init.constant_(module.weight, weight)
        nn.init.constant_(module.bias, bias)
    soft_update(target, network, 0.25)
    assert (target.weight.item(), target.bias.item()) == (1.5, 1.0)
    assert network.weight.item() == 3.0


def test_targets_follow_after_an_update():
    agent = filled(Ddpg(replace(SMALL, tau=0.1, policy_delay=1), 3, 2, seed=0))
    before = agent.critic_target.out.weight.detach().clone()
    agent.update()
    expected = before + 0.1 * (agent.critic.out.weight - before)
    torch.testing.assert_close(agent.critic_target.out.weight, expected)


def test_solves_a_task_with_a_known_answer():
    settings = replace(SMALL, actor_rate=3e-3, critic_rate=3e-3, anchor=0.0, relative_critic=False)
    agent = filled(Ddpg(settings, 3, 2, seed=1), 128)
    random = np.random.default_rng(2)
    for _ in range(60):
        states = random.uniform(-1, 1, (16, 3)).astype(np.float32)
        mask = np.ones((16, 2), np.float32)
        actions = agent.explore(states, mask, 0.5)
        reward = -((actions - states[:, :2] / 2) ** 2).sum(1)
        agent.replay.add(states, actions, mask, reward, states, np.zeros(16, np.float32))
        for _ in range(10):
            agent.update()
    states = random.uniform(-1, 1, (200, 3)).astype(np.float32)
    off = np.abs(agent.act(states, np.ones((200, 2), np.float32)) - states[:, :2] / 2)
    assert off.mean() < 0.08  # an actor that does nothing is 0.25 off


def test_same_seed_same_run_and_another_seed_another():
    runs = []
    for seed in (3, 3, 4):
        agent = filled(Ddpg(SMALL, 3, 2, seed))
        for _ in range(20):
            agent.update()
        runs.append(agent.explore(np.ones((1, 3), np.float32), np.ones((1, 2), np.float32), 0.3))
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


@pytest.mark.parametrize("prioritised", [0.0, 0.7])
def test_a_checkpoint_goes_on_exactly(tmp_path, prioritised):
    settings = replace(SMALL, prioritised=prioritised, gamma=0.5)
    agent = filled(Ddpg(settings, 3, 2, seed=5))
    agent.fit_scales(agent.replay.state[:100])
    for _ in range(7):
        agent.update()
    checkpoint.save(tmp_path / "agent.npz", agent.state())
    again = Ddpg(settings, 3, 2, seed=99)
    again.restore(checkpoint.load(tmp_path / "agent.npz"))
    for one in (agent, again):
        filled(one, 32, seed=6)
        for _ in range(5):
            one.update()
    for name in ("actor", "critic", "actor_target", "critic_target"):
        for mine, theirs in zip(
            getattr(agent, name).state_dict().values(), getattr(again, name).state_dict().values(), strict=True
        ):
            assert torch.equal(mine, theirs), name
    np.testing.assert_array_equal(agent.replay.priority, again.replay.priority)
    assert agent.random.random() == again.random.random()


def test_noise_anneals_and_is_bounded():
    agent = Ddpg(replace(SMALL, noise_start=0.4, noise_end=0.1, noise_bound=0.2), 3, 2, seed=0)
    assert [agent.sigma(share) for share in (-1, 0, 0.5, 1, 2)] == pytest.approx([0.4, 0.4, 0.25, 0.1, 0.1])
    states, mask = np.zeros((2000, 3), np.float32), np.ones((2000, 2), np.float32)
    mask[:, 1] = 0
    off = agent.explore(states, mask, 0.4) - agent.act(states, mask)
    assert np.abs(off).max() == pytest.approx(0.2, abs=1e-6)
    assert not off[:, 1].any()


def test_priorities_decide_how_often_and_how_much():
    replay = Replay(4, 1, 1)
    column = np.arange(4, dtype=np.float32)[:, None]
    replay.add(column, column, np.ones_like(column), column[:, 0], column, np.ones(4, np.float32))
    replay.priority[:] = [1, 1, 1, 5]
    drawn = replay.draw(8000, np.random.default_rng(0), prioritised=1.0, importance=1.0)
    assert np.mean(drawn.rows == 3) == pytest.approx(5 / 8, abs=0.02)
    # Weight (n P)^-1, over the largest: (4 * 5/8)^-1 = 0.4 against (4 * 1/8)^-1 = 2.
    assert float(drawn.weight[int(np.flatnonzero(drawn.rows == 3)[0])]) == pytest.approx(0.2)
    assert float(drawn.weight[int(np.flatnonzero(drawn.rows == 0)[0])]) == pytest.approx(1.0)


def test_the_oldest_transitions_leave():
    replay = Replay(3, 1, 1)
    for value in range(5):
        row = np.full((1, 1), value, np.float32)
        replay.add(row, row, row, row[0], row, row[0])
    assert sorted(replay.state[:, 0]) == [2, 3, 4]
    assert len(replay) == 3


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not an archive", b"\x93NUMPY"])
def test_what_is_no_checkpoint_is_told(tmp_path, content):
    path = tmp_path / "broken.npz"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="no checkpoint"):
        checkpoint.load(path)


def test_checkpoints_keep_every_kind_of_value(tmp_path):
    tree = {
        "a": [1, 2.5, None, True, "text", 2**100],
        3: np.arange(4, dtype=np.int16),
        "t": {"x": torch.tensor([1.5, float("inf")])},
    }
    checkpoint.save(tmp_path / "deep" / "tree.npz", tree)
    found = checkpoint.load(tmp_path / "deep" / "tree.npz")
    assert found["a"] == tree["a"]
    assert found[3].dtype == np.int16
    np.testing.assert_array_equal(found[3], tree[3])
    assert torch.equal(found["t"]["x"], tree["t"]["x"])
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["tree.npz"]
    with pytest.raises(TypeError, match="set"):
        checkpoint.save(tmp_path / "no.npz", {"x": {1, 2}})
