"""`fabricpilot train lrla`: REINFORCE in the laboratory, as a `Trainer`.

An iteration: the workers make the runs; the learner weighs them against each other; the workers take the gradients of
their own runs; the learner adds these up, run by run, and steps.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from central.lrla.flow_set import Floats
from central.lrla.laboratory import Lab
from central.lrla.network import Policy, PolicyNetwork
from central.lrla.paper import Baseline, PaperNetwork
from central.lrla.reinforce import (
    Gradient,
    Rollout,
    Settings,
    draw,
    gradient,
    multiplied,
    paper_weights,
    plain_costs,
    roll,
    step,
    weights_of,
)
from central.training import checkpoint, workers


def network_of(settings: Settings) -> Policy:
    """The network that the settings name, with its first weights."""
    if settings.network == "paper":
        return PaperNetwork(settings.paper.layers, settings.rates)
    return PolicyNetwork(settings.rates)


class Runner:
    """The runs of one worker. What a run does depends on its arguments alone, so the number of workers changes nothing.

    Between `roll` and `gradients` the runs stay here: only costs and gradients travel.
    """

    def __init__(self, settings: Settings, index: int) -> None:
        torch.set_num_threads(1)
        self._settings = settings
        self._network = network_of(settings)
        self._rollouts: list[Rollout] = []

    def roll(self, now: list[Any], lab: Lab, traffic: int, chances: list[int]) -> list[Rollout]:
        """A run for each seed of chances, on the same traffic, with the network's values `now`; without decisions."""
        names = self._network.state_dict()
        self._network.load_state_dict({name: torch.from_numpy(v) for name, v in zip(names, now, strict=True)})
        generators = (torch.Generator().manual_seed(chance) for chance in chances)
        self._rollouts = [roll(lab, self._network, traffic, generator) for generator in generators]
        return [replace(rollout, decisions=[]) for rollout in self._rollouts]

    def gradients(self, weights: list[list[Floats]]) -> list[Gradient]:
        """Of these runs, with the weights of their decisions."""
        bonus = self._settings.entropy
        pairs = zip(self._rollouts, weights, strict=True)
        return [gradient(self._network, rollout.decisions, its, bonus) for rollout, its in pairs]


class LrlaTrainer:
    """One run; deterministic by its seed.

    Args:
        settings: hyper-parameters.
        seed: of everything.
        count: workers.
        ray_address: where they are; None: on this machine.

    Raises:
        UsageError: as `workers.start`.
    """

    def __init__(self, settings: Settings, seed: int, count: int = 1, ray_address: str | None = None) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        self.settings = settings
        self.done = 0
        self.total = settings.iterations
        self.network = network_of(settings)
        self._short_weight = settings.short_weight  # with a limit its multiplier
        self._baseline = Baseline(Lab().hosts)
        self._optimiser = torch.optim.Adam(self.network.parameters(), lr=settings.learning_rate)
        self._random = np.random.default_rng(seed)
        self._shares = np.array_split(np.arange(settings.runs), count)
        self._workers = workers.start(partial(Runner, settings), count, ray_address)

    def advance(self) -> dict[str, float]:
        """One iteration."""
        for group in self._optimiser.param_groups:
            group["lr"] = self.settings.learning_rate * (1 - self.done / self.total)
        lab = draw(self.settings, self._random)
        traffic = int(self._random.integers(2**31))
        chances = self._random.integers(2**31, size=self.settings.runs)
        now = [value.numpy() for value in self.network.state_dict().values()]
        rollouts = self._ask("roll", [(now, lab, traffic, chances[share].tolist()) for share in self._shares])
        short_weight = self._short_weight
        if self.settings.short_limit:
            plain = plain_costs(lab, traffic).tolist()
            short_weight *= plain[0] / plain[1]
        if self.settings.network == "paper":
            weights = paper_weights(rollouts, self.settings, lab.tick_s, self._baseline)
        else:
            weights = weights_of(rollouts, self.settings, lab.tick_s, short_weight)
        gradients = self._ask("gradients", [([weights[run] for run in share],) for share in self._shares])
        told = step(self.network, self._optimiser, gradients, self.settings.gradient_norm)
        self.done += 1
        long, short = np.mean([rollout.costs.sum(axis=0) for rollout in rollouts], axis=0).tolist()
        told = {"long": long, "short": short} | told
        if self.settings.short_limit:
            told |= {"long below": 1 - long / plain[0], "short below": 1 - short / plain[1], "weight": short_weight}
            self._short_weight = multiplied(self._short_weight, short, plain[1], self.settings)
        return told

    def _ask(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """What the workers answer, in the order of the runs."""
        self._workers.begin(method, arguments)
        return [one for part in self._workers.collect() for one in part]

    def state(self) -> dict[str, Any]:
        """See `Trainer.state`."""
        return {
            "done": self.done,
            "network": dict(self.network.state_dict()),
            "optimiser": self._optimiser.state_dict(),
            "random": self._random.bit_generator.state,
            "baseline": [self._baseline.count, self._baseline.total],
            "short_weight": self._short_weight,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """See `Trainer.restore`."""
        self.done = state["done"]
        self.network.load_state_dict(state["network"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._random.bit_generator.state = state["random"]
        self._baseline.count, self._baseline.total = (np.array(values) for values in state["baseline"])
        self._short_weight = state["short_weight"]

    def export(self, path: Path, record: dict[str, Any]) -> None:
        """See `Trainer.export`."""
        checkpoint.save(path, {"network": dict(self.network.state_dict()), "record": record})

    def close(self) -> None:
        """End the workers."""
        self._workers.close()
