"""For comparison: TD3 of stable-baselines3 (extra `sb3`) on the same environment, with the same networks and budget.

What it trains is written as weights like ours, so that policy, benchmark and central take either. Its critic is not
carried over, and a run cannot be resumed: its library keeps no exact checkpoint.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from central.srla import weights
from central.srla.ddpg import Ddpg
from central.srla.encoding import ACTIONS
from central.srla.environment import ThresholdTrials
from central.srla.training import Settings, own_trial
from central.training.settings import as_record
from fabricpilot.errors import UsageError


class Td3Trainer:
    """A run of TD3 as `central.training.Trainer`; a round steps every environment once, as in `SrlaTrainer`.

    Raises:
        UsageError: stable-baselines3 is not installed.
    """

    def __init__(self, settings: Settings, seed: int) -> None:
        try:
            from stable_baselines3 import TD3
            from stable_baselines3.common.noise import NormalActionNoise
            from stable_baselines3.common.vec_env import DummyVecEnv
        except ImportError:
            raise UsageError(
                "--algorithm td3 needs stable-baselines3; install the extra: pip install 'fabricpilot[sb3]'"
            ) from None
        torch.set_num_threads(1)
        self.settings, self._round = settings, 0
        s, its = settings, settings.agent
        count = s.environments
        worlds = DummyVecEnv(
            [
                lambda number=number: ThresholdTrials(s.environment, s.encoding, seed * 1_000_003 + number)
                for number in range(count)
            ]
        )
        self._model = TD3(
            "MlpPolicy",
            worlds,
            learning_rate=its.actor_rate,
            buffer_size=its.replay,
            learning_starts=s.warm * count,
            batch_size=its.batch,
            tau=its.tau,
            gamma=its.gamma,
            train_freq=1,
            gradient_steps=s.updates,
            policy_delay=its.policy_delay,
            action_noise=NormalActionNoise(np.zeros(ACTIONS), np.full(ACTIONS, its.noise_end)),
            policy_kwargs={"net_arch": {"pi": list(its.actor_layers), "qf": list(its.joint_layers)}},
            seed=seed,
            device="cpu",
        )
        self.agent = Ddpg(its, s.encoding.features, ACTIONS, seed)
        self._trial = own_trial(s, seed)
        self._gain = -np.inf

    @property
    def done(self) -> int:
        """Rounds done."""
        return self._round

    @property
    def total(self) -> int:
        """Rounds to do."""
        return self.settings.rounds

    def advance(self) -> dict[str, float]:
        """As many rounds as lie between two trials without noise, and such a trial."""
        rounds = min(self.settings.check_every, self.total - self._round)
        self._model.learn(rounds * self.settings.environments, reset_num_timesteps=self._round == 0)
        self._round += rounds
        copy_actor(self._model.policy.actor, self.agent)
        self._gain = self._trial.gain(self.agent)
        return {"gain": self._gain}

    def state(self) -> dict[str, Any]:
        """The actor; not enough to go on."""
        return {"actor": self.agent.actor.state_dict(), "round": self._round}

    def restore(self, state: dict[str, Any]) -> None:
        """Not possible.

        Raises:
            UsageError: always.
        """
        raise UsageError("a run with --algorithm td3 cannot be resumed; start it anew with another --out")

    def export(self, path: Path, record: dict[str, Any]) -> None:
        """The actor as it is at the end."""
        told = {"settings": as_record(self.settings), "gain": self._gain, "algorithm": "td3"}
        weights.save(path, self.agent, self.settings.encoding, record | told)

    def close(self) -> None:
        """End the environments."""
        self._model.env.close()


def copy_actor(theirs: nn.Module, agent: Ddpg) -> None:
    """The linear layers of an actor of stable-baselines3 into ours, which has as many of the same sizes."""
    mine = [module for module in agent.actor.modules() if isinstance(module, nn.Linear)]
    given = [module for module in theirs.modules() if isinstance(module, nn.Linear)]
    for one, other in zip(mine, given, strict=True):
        one.load_state_dict(other.state_dict())
