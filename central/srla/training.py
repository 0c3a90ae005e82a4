"""Training sRLA in the simulator: environments side by side in the workers, one learner here.

A round: the workers begin a step of every environment; meanwhile the learner makes its updates on what it has; then it
takes the step's transitions and chooses the next actions. Every `check_every` rounds the actor is tried without noise
on traffic drawn for that alone, and the weights that did best are the ones exported. The first trial comes before the
first update, so that a run whose learning gains nothing ends where it began: at the base.

    1. scales   features of the first rounds fix how features are scaled
    2. DDPG     exploration noise anneals from the first round to the last
"""

from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from central.srla import weights
from central.srla.ddpg import Ddpg
from central.srla.ddpg import Settings as AgentSettings
from central.srla.encoding import ACTIONS, Base, Encoding, Kind, Singles
from central.srla.environment import Settings as WorldSettings
from central.srla.environment import ThresholdTrials
from central.srla.trial import Trial
from central.training import workers
from central.training.settings import as_record

_TRIAL_SEED = 7919  # added to a run's: its trials see other flows than its environments


@dataclass(frozen=True)
class Settings:
    """Every parameter of a training run; `agent` and `environment` have their own.

    Attributes:
        kind: encoding of states, `compact` or `paper`.
        base: what actions are relative to: `exact`, `split` or `middle`.
        reach: of an action, natural logarithm.
        rounds: of stepping all environments.
        environments: side by side, over all workers.
        warm: rounds of pure noise before the first update.
        updates: gradient updates per round.
        check_every: rounds between two trials without noise.
        check: situations in such a trial.
        check_flows: flows of each of them: more than a step's, since weights are chosen by them.
        agent: DDPG's own.
        environment: the simulated world's.
    """

    kind: Kind = "compact"
    base: Base = "exact"
    reach: float = 2.1
    rounds: int = 3000
    environments: int = 32
    warm: int = 20
    updates: int = 32
    check_every: int = 50
    check: int = 48
    check_flows: int = 10_000
    agent: AgentSettings = field(default_factory=AgentSettings)
    environment: WorldSettings = field(default_factory=WorldSettings)

    @property
    def encoding(self) -> Encoding:
        """How the agent sees and acts."""
        return Encoding(self.kind, self.base, self.reach, self.environment.objective)


def own_trial(settings: Settings, seed: int) -> Trial:
    """The situations by which a run chooses among its weights: always the same flows, drawn for this alone."""
    its = settings.environment
    encoding = settings.encoding
    return Trial.of(its.range, settings.check, settings.check_flows, encoding, its.objective, seed + _TRIAL_SEED)


class Fleet:
    """The environments of one worker: numbers `first`, `first + 1`, ..., each with randomness of its own.

    What an environment does depends on its number and the actions alone, so the number of workers changes nothing.
    """

    def __init__(self, settings: Settings, seed: int, first: int, count: int) -> None:
        torch.set_num_threads(1)
        self._trials = [
            ThresholdTrials(settings.environment, settings.encoding, seed * 1_000_003 + first + i) for i in range(count)
        ]

    def reset(self) -> tuple[Singles, Singles]:
        """First states and masks, shapes (count, features) and (count, 7)."""
        states = [trial.reset()[0] for trial in self._trials]
        return np.stack(states), self._masks()

    def step(self, actions: Singles) -> tuple[Singles, ...]:
        """One step of each.

        Returns:
            Rewards (count,), the states reached, 1 where that goes on; then the states and masks to act on next, which
            are the next situation's where one has ended.
        """
        rewards, reached, goes_on, states = [], [], [], []
        for trial, action in zip(self._trials, actions, strict=True):
            state, reward, _, ended, _ = trial.step(action)
            rewards.append(reward)
            reached.append(state)
            goes_on.append(0.0 if ended else 1.0)
            states.append(trial.reset()[0] if ended else state)
        numbers = (np.array(values, np.float32) for values in (rewards, reached, goes_on, states))
        return (*numbers, self._masks())

    def state(self) -> list[dict[str, Any]]:
        """Of all environments."""
        return [trial.state() for trial in self._trials]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """As `ThresholdTrials.restore`."""
        for trial, its in zip(self._trials, state, strict=True):
            trial.restore(its)

    def _masks(self) -> Singles:
        return np.stack([trial.mask for trial in self._trials])


def make_fleet(settings: Settings, seed: int, shares: tuple[int, ...], index: int) -> Fleet:
    """The fleet of worker `index`; picklable with `partial`."""
    return Fleet(settings, seed, sum(shares[:index]), shares[index])


class SrlaTrainer:
    """A run of sRLA as `central.training.Trainer`.

    Args:
        settings: of the run.
        seed: of everything random.
        count: workers.
        ray_address: where they are; None: on this machine.

    Raises:
        UsageError: as `workers.start`.
    """

    def __init__(self, settings: Settings, seed: int, count: int = 1, ray_address: str | None = None) -> None:
        torch.set_num_threads(1)
        self.settings = settings
        self.agent = Ddpg(settings.agent, settings.encoding.features, ACTIONS, seed)
        self._round = 0
        self._best: dict[str, Any] = {"gain": -np.inf, "round": 0, "actor": None, "critic": None}
        shares = tuple(len(part) for part in np.array_split(np.arange(settings.environments), count))
        self._ends = np.cumsum(shares)[:-1]
        self._workers = workers.start(partial(make_fleet, settings, seed, shares), count, ray_address)
        self._seed = seed
        self._trial: Trial | None = None
        self._now: tuple[Singles, Singles] | None = None  # states and masks to act on

    @property
    def done(self) -> int:
        """Rounds done."""
        return self._round

    @property
    def total(self) -> int:
        """Rounds to do."""
        return self.settings.rounds

    def advance(self) -> dict[str, float]:
        """One round."""
        s = self.settings
        if self._now is None:
            self._workers.begin("reset", [()] * self._workers.count)
            states, masks = (np.concatenate(parts) for parts in zip(*self._workers.collect(), strict=True))
            self._now = states, masks
        states, masks = self._now
        started = self._round >= s.warm
        sigma = self.agent.sigma((self._round - s.warm) / max(s.rounds - s.warm, 1))
        actions = self.agent.explore(states, masks, sigma)
        self._workers.begin("step", [(part,) for part in np.split(actions, self._ends)])
        told = self._learn() if started else {}
        columns = [np.concatenate(parts) for parts in zip(*self._workers.collect(), strict=True)]
        reward, reached, goes_on, following, next_masks = columns
        self.agent.replay.add(states, actions, masks, reward, reached, goes_on)
        self._now = following, next_masks
        self._round += 1
        if self._round == s.warm and s.kind == "compact":
            self.agent.fit_scales(self.agent.replay.state[: len(self.agent.replay)])
        told |= {"reward": float(reward.mean()), "noise": sigma}
        if self._round in (s.warm, s.rounds) or (started and self._round % s.check_every == 0):
            told |= self._check()
        return told

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to go on exactly."""
        self._workers.begin("state", [()] * self._workers.count)
        fleets = [one for part in self._workers.collect() for one in part]
        return {
            "agent": self.agent.state(),
            "fleets": fleets,
            "round": self._round,
            "best": self._best,
            "now": self._now,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, whatever the number of workers then and now."""
        self.agent.restore(state["agent"])
        self._round, self._best = state["round"], state["best"]
        self._now = tuple(state["now"]) if state["now"] is not None else None
        bounds = [0, *self._ends.tolist(), self.settings.environments]
        parts = [(state["fleets"][low:high],) for low, high in pairwise(bounds)]
        self._workers.begin("restore", parts)
        self._workers.collect()

    def export(self, path: Path, record: dict[str, Any]) -> None:
        """The weights of `use_best`."""
        self.use_best()
        told = {"settings": as_record(self.settings), "gain": self._best["gain"], "round": self._best["round"]}
        weights.save(path, self.agent, self.settings.encoding, record | told)

    def use_best(self) -> None:
        """Give the agent the weights that did best in a trial without noise."""
        if self._best["actor"] is not None:
            self.agent.actor.load_state_dict(self._best["actor"])
            self.agent.critic.load_state_dict(self._best["critic"])

    def close(self) -> None:
        """End the workers."""
        self._workers.close()

    def _learn(self) -> dict[str, float]:
        told: dict[str, float] = {}
        for _ in range(self.settings.updates):
            told |= self.agent.update()
        return told

    def _check(self) -> dict[str, float]:
        """Try the actor without noise."""
        if self._trial is None:
            self._trial = own_trial(self.settings, self._seed)
        gain = self._trial.gain(self.agent)
        if gain > self._best["gain"]:
            kept = {name: value.clone() for name, value in self.agent.actor.state_dict().items()}
            critic = {name: value.clone() for name, value in self.agent.critic.state_dict().items()}
            self._best = {"gain": gain, "round": self._round, "actor": kept, "critic": critic}
        return {"gain": gain}
