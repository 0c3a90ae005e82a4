"""Deep deterministic policy gradient, whole in this file (Lillicrap et al., ICLR 2016; AuTO's choice for sRLA).

An actor maps a state to an action in [-1, 1]^n, a critic maps state and action to the return. One update:
  1. a batch from the replay; target y = r + gamma * Q'(s', mu'(s')) by the target networks, y = r where nothing follows
  2. the critic descends on (Q(s, a) - y)^2, weighed by importance when the replay is prioritised
  3. every `policy_delay` updates the actor ascends on Q(s, mu(s)) - anchor * |mu(s)|^2
  4. the target networks follow: target += tau * (network - target)
With gamma = 0 (our default: thresholds set now do not change what traffic comes next) y is the reward itself.
Deterministic by the seed on one thread; `state` and `restore` are exact.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Singles = npt.NDArray[np.float32]

_LEAST_PRIORITY = 1e-3  # what was predicted exactly is still drawn now and then
_LEAST_DEVIATION = 0.05  # of a feature in [0, 1]: what hardly varies is not blown up


@dataclass(frozen=True)
class Settings:
    """Every hyper-parameter of the algorithm.

    Attributes:
        actor_layers: hidden units per layer of the actor.
        state_layers: of the critic, on the state alone, before the action enters (the paper: 600, 600).
        joint_layers: of the critic, on those and the action (the paper: one layer).
        relative_critic: the critic is 0 at action 0 by construction, as relative rewards with gamma 0 are.
        actor_rate: Adam's step of the actor; 0 freezes it.
        critic_rate: of the critic.
        gamma: discount of what follows; 0 makes every step its own problem.
        tau: share by which target networks follow per update.
        batch: transitions per update.
        replay: transitions kept, the oldest leave.
        prioritised: exponent of the replay's priorities (Schaul et al., 2016); 0 draws uniformly.
        importance: exponent that corrects for it.
        policy_delay: critic updates per actor update.
        actor_waits: critic updates before the actor's first, so that it does not follow a critic that knows nothing.
        anchor: pull of the actor towards action 0, in reward per squared unit: keeps it at the base where the critic
            sees next to nothing to gain.
        noise_start: standard deviation of the exploration noise at first, in units of the action.
        noise_end: at last.
        noise_bound: noise is cut at this, so that no trial goes farther from what the actor says.
        gradient_norm: longest gradient of an update.
    """

    actor_layers: tuple[int, ...] = (128, 128)
    state_layers: tuple[int, ...] = ()
    joint_layers: tuple[int, ...] = (128, 128)
    relative_critic: bool = True
    actor_rate: float = 3e-4
    critic_rate: float = 1e-3
    gamma: float = 0.0
    tau: float = 0.005
    batch: int = 256
    replay: int = 200_000
    prioritised: float = 0.0
    importance: float = 0.5
    policy_delay: int = 2
    actor_waits: int = 500
    anchor: float = 0.002
    noise_start: float = 0.4
    noise_end: float = 0.1
    noise_bound: float = 0.8
    gradient_norm: float = 1.0


# AuTO's networks for 700 features: actor 600-600, critic 600-600 on the state, then a layer with the action.
PAPER = Settings(
    actor_layers=(600, 600),
    state_layers=(600, 600),
    joint_layers=(600,),
    relative_critic=False,
    gamma=0.9,
    anchor=0.0,
)


@dataclass(frozen=True)
class Batch:
    """Transitions as rows."""

    state: Tensor
    action: Tensor
    mask: Tensor  # 1 where the action's element means something
    reward: Tensor  # (B,)
    following: Tensor  # the next state
    goes_on: Tensor  # (B,), 0 where nothing follows
    weight: Tensor  # (B,), importance
    rows: npt.NDArray[np.int64]  # in the replay


class Scaled(nn.Module):
    """Features made comparable: (x - mean) / deviation, with statistics fixed once; part of the weights."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(features))
        self.deviation = nn.Buffer(torch.ones(features))

    def fit(self, states: Tensor) -> None:
        """Take the statistics from these states."""
        self.mean.copy_(states.mean(0))
        self.deviation.copy_(states.std(0, unbiased=False).clamp_min(_LEAST_DEVIATION))

    def forward(self, state: Tensor) -> Tensor:
        """Shape kept; what is far outside of all seen is cut."""
        return ((state - self.mean) / self.deviation).clamp(-8, 8)


class Actor(nn.Module):
    """mu(s): action (B, n) in [-1, 1], 0 where the mask is 0. Untrained it is almost 0 everywhere."""

    def __init__(self, features: int, actions: int, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.scaled = Scaled(features)
        self.body = _stack(features, layers)
        self.out = nn.Linear(layers[-1] if layers else features, actions)
        nn.init.uniform_(self.out.weight, -3e-3, 3e-3)
        nn.init.zeros_(self.out.bias)

    def forward(self, state: Tensor, mask: Tensor) -> Tensor:
        """The actions for states (B, features)."""
        return torch.tanh(self.out(self.body(self.scaled(state)))) * mask


class Critic(nn.Module):
    """Q(s, a): the return expected, (B,).

    `relative`: Q(s, a) = f(s, a) - f(s, 0), for rewards that compare with the base: what is known to be 0 there need
    not be learned, state by state, from noise.
    """

    def __init__(
        self,
        features: int,
        actions: int,
        state_layers: tuple[int, ...],
        joint_layers: tuple[int, ...],
        relative: bool = False,
    ) -> None:
        super().__init__()
        self.scaled = Scaled(features)
        self.state = _stack(features, state_layers)
        self.joint = _stack((state_layers[-1] if state_layers else features) + actions, joint_layers)
        self.out = nn.Linear(joint_layers[-1], 1)
        self.relative = relative
        nn.init.uniform_(self.out.weight, -3e-3, 3e-3)
        nn.init.zeros_(self.out.bias)

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        """Returns of state-action pairs."""
        seen = self.state(self.scaled(state))
        value: Tensor = self.out(self.joint(torch.cat((seen, action), dim=1)))[:, 0]
        if self.relative:
            value = value - self.out(self.joint(torch.cat((seen, torch.zeros_like(action)), dim=1)))[:, 0]
        return value


def _stack(inputs: int, layers: tuple[int, ...]) -> nn.Sequential:
    parts: list[nn.Module] = []
    for width in layers:
        parts += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*parts)


def soft_update(target: nn.Module, network: nn.Module, tau: float) -> None:
    """Target += tau * (network - target), for every parameter and buffer."""
    with torch.no_grad():
        for mine, theirs in zip(target.state_dict().values(), network.state_dict().values(), strict=True):
            mine += tau * (theirs - mine)


class Replay:
    """The latest transitions as arrays; draws uniformly, or by priority |error|^prioritised."""

    _FIELDS = ("state", "action", "mask", "reward", "following", "goes_on", "priority")

    def __init__(self, size: int, features: int, actions: int) -> None:
        self.state = np.zeros((size, features), np.float32)
        self.following = np.zeros((size, features), np.float32)
        self.action = np.zeros((size, actions), np.float32)
        self.mask = np.zeros((size, actions), np.float32)
        self.reward = np.zeros(size, np.float32)
        self.goes_on = np.zeros(size, np.float32)
        self.priority = np.ones(size, np.float32)
        self.size, self.added = size, 0

    def __len__(self) -> int:
        return min(self.added, self.size)

    def add(
        self, state: Singles, action: Singles, mask: Singles, reward: Singles, following: Singles, goes_on: Singles
    ) -> None:
        """Rows of transitions; new ones have the highest priority there is, so that each is seen."""
        rows = np.arange(self.added, self.added + len(reward)) % self.size
        highest = self.priority[: len(self)].max(initial=_LEAST_PRIORITY)
        for name, values in zip(self._FIELDS, (state, action, mask, reward, following, goes_on, highest), strict=True):
            getattr(self, name)[rows] = values
        self.added += len(reward)

    def draw(self, batch: int, random: np.random.Generator, prioritised: float, importance: float) -> Batch:
        """`batch` rows with replacement."""
        n = len(self)
        weight = np.ones(batch, np.float32)
        if prioritised > 0:
            share = self.priority[:n].astype(np.float64) ** prioritised
            share /= share.sum()
            rows = np.searchsorted(np.cumsum(share), random.random(batch)).clip(0, n - 1)
            weight = ((n * share[rows]) ** -importance).astype(np.float32)
            weight /= weight.max()
        else:
            rows = random.integers(n, size=batch)
        columns = {name: torch.from_numpy(getattr(self, name)[rows]) for name in self._FIELDS[:6]}
        return Batch(**columns, weight=torch.from_numpy(weight), rows=rows)

    def state_dict(self) -> dict[str, Any]:
        """Only the rows in use."""
        return {"added": self.added} | {name: getattr(self, name)[: len(self)].copy() for name in self._FIELDS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Exactly what `state_dict` gave, from a replay of the same size."""
        self.added = state["added"]
        for name in self._FIELDS:
            getattr(self, name)[: len(self)] = state[name]


class Ddpg:
    """The agent: networks, targets, optimisers, replay and its randomness.

    Args:
        settings: hyper-parameters.
        features: length of a state.
        actions: length of an action.
        seed: of weights, noise and draws.
    """

    def __init__(self, settings: Settings, features: int, actions: int, seed: int) -> None:
        self.settings, self.features, self.actions = settings, features, actions
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor = Actor(features, actions, settings.actor_layers)
            self.critic = Critic(
                features, actions, settings.state_layers, settings.joint_layers, settings.relative_critic
            )
        self.actor_target, self.critic_target = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), lr=settings.actor_rate)
        self.critic_adam = torch.optim.Adam(self.critic.parameters(), lr=settings.critic_rate)
        self.replay = Replay(settings.replay, features, actions)
        self.random = np.random.default_rng(seed)
        self.updates = 0

    def fit_scales(self, states: Singles) -> None:
        """Fix the statistics that features are scaled by; once, before anything is learned."""
        given = torch.from_numpy(states)
        for network in (self.actor, self.critic, self.actor_target, self.critic_target):
            network.scaled.fit(given)

    def act(self, states: Singles, masks: Singles) -> Singles:
        """mu(s), without noise; shape (n, actions)."""
        with torch.no_grad():
            chosen: Singles = self.actor(torch.from_numpy(states), torch.from_numpy(masks)).numpy()
        return chosen

    def value(self, states: Singles, actions: Singles) -> Singles:
        """Q(s, a), shape (n,)."""
        with torch.no_grad():
            expected: Singles = self.critic(torch.from_numpy(states), torch.from_numpy(actions)).numpy()
        return expected

    def sigma(self, share_done: float) -> float:
        """Standard deviation of the noise after this share of the training: it falls linearly."""
        start, end = self.settings.noise_start, self.settings.noise_end
        return start + (end - start) * min(max(share_done, 0.0), 1.0)

    def explore(self, states: Singles, masks: Singles, sigma: float) -> Singles:
        """mu(s) plus Gaussian noise, cut at `noise_bound` and at the action's bounds."""
        chosen = self.act(states, masks)
        bound = self.settings.noise_bound
        noise = np.clip(self.random.normal(0, 1, chosen.shape) * sigma, -bound, bound).astype(np.float32)
        return np.clip(chosen + noise * masks, -1, 1)

    def target(self, batch: Batch) -> Tensor:
        """Y = r + gamma * goes_on * Q'(s', mu'(s')), shape (B,)."""
        if self.settings.gamma == 0:
            return batch.reward
        with torch.no_grad():
            then: Tensor = self.critic_target(batch.following, self.actor_target(batch.following, batch.mask))
        return batch.reward + self.settings.gamma * batch.goes_on * then

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Weighed mean of (Q(s, a) - y)^2, and the errors Q - y, shape (B,)."""
        error = self.critic(batch.state, batch.action) - self.target(batch)
        loss: Tensor = (batch.weight * error**2).mean()
        return loss, error.detach()

    def actor_loss(self, batch: Batch) -> Tensor:
        """Mean of anchor * |mu(s)|^2 - Q(s, mu(s))."""
        chosen = self.actor(batch.state, batch.mask)
        value: Tensor = self.critic(batch.state, chosen)
        loss: Tensor = self.settings.anchor * (chosen**2).sum(1).mean() - value.mean()
        return loss

    def update(self) -> dict[str, float]:
        """One update from the replay; what it was like."""
        s = self.settings
        batch = self.replay.draw(min(s.batch, len(self.replay)), self.random, s.prioritised, s.importance)
        loss, error = self.critic_loss(batch)
        _step(self.critic, self.critic_adam, loss, s.gradient_norm)
        self.replay.priority[batch.rows] = error.abs().numpy() + _LEAST_PRIORITY
        told = {"critic_loss": loss.item()}
        self.updates += 1
        if self.updates > s.actor_waits and self.updates % s.policy_delay == 0 and s.actor_rate > 0:
            loss = self.actor_loss(batch)
            _step(self.actor, self.actor_adam, loss, s.gradient_norm)
            told["value"] = -loss.item()
        soft_update(self.critic_target, self.critic, s.tau)
        soft_update(self.actor_target, self.actor, s.tau)
        return told

    _PARTS = ("actor", "critic", "actor_target", "critic_target", "actor_adam", "critic_adam", "replay")

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to go on exactly."""
        parts = {name: getattr(self, name).state_dict() for name in self._PARTS}
        return parts | {"random": self.random.bit_generator.state, "updates": self.updates}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, by an agent of the same shape."""
        for name in self._PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.random.bit_generator.state = state["random"]
        self.updates = state["updates"]


def _step(network: nn.Module, adam: torch.optim.Optimizer, loss: Tensor, longest: float) -> None:
    adam.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(network.parameters(), longest)
    adam.step()
