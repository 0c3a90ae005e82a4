"""sRLA that goes on learning in central: proposals with bounded noise, and an update for every observation.

Where it sits: in the learner's process; the guard tries what `propose` says on some hosts, and `learn` is told what
came of thresholds, the challenger's and the others' alike. A transition is the state the last proposal was made in, the
action that the thresholds in force are in that state, and the reward:

    reward = 100 (log m(base) - log m - usual),   cut at +-cap

m is the measured objective, m(base) what the exact model gives for the base's thresholds and the very sizes and load
reported, which takes out of m what the traffic did to it. `usual` is the group's running mean of the same difference:
what model and network differ by in any case. So nothing has to be run twice, as the simulator can.

Noise anneals with the group's observations and never exceeds `noise_bound`; every call takes a bounded time.
"""

import logging
import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from central.policy.base import Decision, GroupSummary, LearnStats, Outcome
from central.srla import ddpg, weights
from central.srla.encoding import Encoding, Singles, mask_of
from central.srla.policy import alike
from central.thresholds import exact
from central.thresholds.optimum import usable_load
from central.training import checkpoint
from fabricpilot.config import PolicySection
from fabricpilot.errors import UsageError
from fabricpilot.levels import Thresholds
from simulator.arrays import Floats
from simulator.workloads.distribution import SizeDistribution

log = logging.getLogger(__name__)

_GROUPS = 4096  # remembered; the one longest silent is forgotten


@dataclass(frozen=True)
class Settings:
    """Every parameter of learning in central.

    Attributes:
        actor_rate: Adam's step; a tenth of the training's, because observations are few and noisy.
        critic_rate: the same of the critic.
        anchor: pull towards the base, stronger than in training.
        noise_start: standard deviation of a group's first proposals, in units of the action.
        noise_end: after `anneal` observations.
        noise_bound: no proposal is farther from what the actor says.
        anneal: observations of a group until its noise is `noise_end`.
        cap: bound of a reward.
        memory: share of a group's running mean that every observation replaces.
        patience: transitions before the first update.
        updates: per observation.
        batch: transitions per update.
        replay: transitions kept.
    """

    actor_rate: float = 3e-5
    critic_rate: float = 1e-4
    anchor: float = 0.3
    noise_start: float = 0.05
    noise_end: float = 0.01
    noise_bound: float = 0.1
    anneal: int = 200
    cap: float = 10.0
    memory: float = 0.05
    patience: int = 64
    updates: int = 2
    batch: int = 64
    replay: int = 20_000


@dataclass
class _Group:
    """What is remembered of a group: the state its hosts were last given thresholds in, and what is usual there."""

    state: Singles | None = None
    base: Floats | None = None
    seen: int = 0
    usual: float = 0.0


class OnlineSrla:
    """A `central.policy.base.Learner`.

    Args:
        section: the policy's configuration.
        path: trained weights to start from.
        settings: of learning.
        seed: of noise and draws.

    Raises:
        UsageError: no weights at `path`.
    """

    name = "srla"

    def __init__(
        self,
        section: PolicySection,
        path: Path = weights.DEFAULT,
        settings: Settings | None = None,
        seed: int = 1,
    ) -> None:
        torch.set_num_threads(1)  # small networks: threads only wait for each other
        self.settings = s = settings or Settings()
        trained = weights.load(path)[0].settings
        live = replace(
            trained,
            actor_rate=s.actor_rate,
            critic_rate=s.critic_rate,
            anchor=s.anchor,
            noise_bound=s.noise_bound,
            actor_waits=0,  # the critic has been trained
            batch=s.batch,
            replay=s.replay,
        )
        self.agent: ddpg.Ddpg
        self.encoding: Encoding
        self.agent, self.encoding, _ = weights.load(path, settings=live, seed=seed)
        self._section = section
        self._path, self._live, self._seed = path, live, seed
        self._groups: OrderedDict[str, _Group] = OrderedDict()
        self._reward: float | None = None

    def propose(self, summary: GroupSummary) -> Decision:
        """The actor's thresholds with some noise, unless they are as good as in force."""
        if summary.flows < self._section.min_flows:
            return Decision(
                None, f"{summary.flows:.0f} finished flows in the window, {self._section.min_flows} are needed"
            )
        base = self.encoding.base_for(summary)
        state = self.encoding.state_of(summary, base)
        group = self._group(summary)
        group.state, group.base = state, base
        mask, sigma = mask_of(summary.levels), self._sigma(group)
        action = self.agent.explore(state[None], mask[None], sigma)[0]
        chosen = self.encoding.thresholds_at(base, action)
        if alike(chosen, summary.thresholds):
            return Decision(None, "in force, as learned")
        gain = None
        if summary.thresholds is not None and summary.thresholds.levels == summary.levels:
            now = self.encoding.action_at(base, summary.thresholds)
            gain = float(np.diff(self.agent.value(np.stack((state, state)), np.stack((now, action))))[0]) / 100
        return Decision(chosen, f"learned from {self.agent.replay.added} observations, noise {sigma:.2f}", gain)

    def learn(self, summary: GroupSummary) -> LearnStats:
        """One observation: a transition, and a few updates once there are enough."""
        group = self._group(summary)
        done, outcome = summary.thresholds, summary.outcome
        usable = done is not None and done.levels == summary.levels and outcome is not None and _finite(outcome)
        if usable and done is not None and outcome is not None and group.state is not None and group.base is not None:
            reward = self._reward_of(group, summary, outcome)
            if reward is not None:
                self._add(group.state, group.base, done, summary, reward)
        return LearnStats(self.agent.replay.added, self.agent.updates, self._reward, self._sigma(group))

    def save(self, path: Path) -> None:
        """Write everything that `load` needs to go on exactly, atomically."""
        groups = [[name, [g.state, g.base, g.seen, g.usual]] for name, g in self._groups.items()]
        told: dict[str, Any] = {"learner": self.name, "agent": self.agent.state(), "groups": groups}
        checkpoint.save(path, told | {"reward": self._reward})

    def load(self, path: Path) -> None:
        """Go on where `save` left off.

        Raises:
            UsageError: no checkpoint of this learner.
        """
        stored = checkpoint.load(path)
        try:
            if stored["learner"] != self.name:
                raise UsageError(f"{path} is a checkpoint of '{stored['learner']}', not of '{self.name}'")
            fresh = ddpg.Ddpg(self.agent.settings, self.agent.features, self.agent.actions, 0)
            fresh.restore(stored["agent"])
            if not _sound(fresh):
                raise UsageError(f"{path} holds weights that are not finite")
            groups = OrderedDict((name, _Group(*values)) for name, values in stored["groups"])
            self.agent, self._groups, self._reward = fresh, groups, stored["reward"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"{path} is no checkpoint of '{self.name}': {error}") from None

    def _add(self, state: Singles, base: Floats, done: Thresholds, summary: GroupSummary, reward: float) -> None:
        following = self.encoding.state_of(summary, base)
        action, mask = self.encoding.action_at(base, done), mask_of(summary.levels)
        if not all(np.isfinite(part).all() for part in (state, following, action, reward)):
            return
        self.agent.replay.add(
            state[None],
            action[None],
            mask[None],
            np.array([reward], np.float32),
            following[None],
            np.ones(1, np.float32),
        )
        self._reward = reward
        if len(self.agent.replay) >= self.settings.patience:
            for _ in range(self.settings.updates):
                self.agent.update()
            if not _sound(self.agent):
                log.error("the learned weights are no longer finite; learning begins anew from %s", self._path.name)
                self.agent = weights.load(self._path, settings=self._live, seed=self._seed)[0]

    def _reward_of(self, group: _Group, summary: GroupSummary, outcome: Outcome) -> float | None:
        """The reward, and the group's usual difference brought up to date; None where the model has no answer."""
        assert group.base is not None
        base = self.encoding.thresholds_at(group.base, np.zeros(len(group.base)))
        sizes = SizeDistribution.from_histogram(summary.sizes, summary.group)
        objective = self.encoding.objective
        expected = exact.evaluate(sizes, usable_load(summary.load), base, objective)
        measured = outcome.mean_slowdown
        if objective == "fct":
            if summary.link_rate_bps <= 0:
                return None
            measured = outcome.mean_fct_s * summary.link_rate_bps / 8
        difference = 100 * math.log(expected / measured)
        group.usual += max(self.settings.memory, 1 / (group.seen + 1)) * (difference - group.usual)
        group.seen += 1
        return float(np.clip(difference - group.usual, -self.settings.cap, self.settings.cap))

    def _sigma(self, group: _Group) -> float:
        s = self.settings
        return s.noise_start + (s.noise_end - s.noise_start) * min(group.seen / s.anneal, 1.0)

    def _group(self, summary: GroupSummary) -> _Group:
        key = f"{summary.group}/{summary.levels}"
        group = self._groups.setdefault(key, _Group())
        self._groups.move_to_end(key)
        if len(self._groups) > _GROUPS:
            self._groups.popitem(last=False)
        return group


def _sound(agent: ddpg.Ddpg) -> bool:
    """Whether all weights are numbers."""
    networks = (agent.actor, agent.critic, agent.actor_target, agent.critic_target)
    return all(bool(torch.isfinite(part).all()) for network in networks for part in network.state_dict().values())


def _finite(outcome: Outcome) -> bool:
    return all(math.isfinite(value) and value > 0 for value in (outcome.mean_fct_s, outcome.mean_slowdown))
