"""`fabricpilot train lrla`: REINFORCE in the laboratory, as a `Trainer`."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from central.lrla.network import PolicyNetwork
from central.lrla.reinforce import Settings, draw, roll, update
from central.training import checkpoint


class LrlaTrainer:
    """One run; deterministic by its seed.

    Args:
        settings: hyper-parameters.
        seed: of everything.
    """

    def __init__(self, settings: Settings, seed: int) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        self.settings = settings
        self.done = 0
        self.total = settings.iterations
        self.network = PolicyNetwork()
        self._optimiser = torch.optim.Adam(self.network.parameters(), lr=settings.learning_rate)
        self._generator = torch.Generator().manual_seed(seed)
        self._random = np.random.default_rng(seed)

    def advance(self) -> dict[str, float]:
        """One iteration."""
        for group in self._optimiser.param_groups:
            group["lr"] = self.settings.learning_rate * (1 - self.done / self.total)
        lab = draw(self.settings, self._random)
        traffic = int(self._random.integers(2**31))
        runs = range(self.settings.runs)
        rollouts = [roll(lab, self.network, traffic, self._generator, self.settings.short_weight) for _ in runs]
        told = update(self.network, self._optimiser, rollouts, self.settings, lab.tick_s)
        self.done += 1
        return told

    def state(self) -> dict[str, Any]:
        """See `Trainer.state`."""
        return {
            "done": self.done,
            "network": dict(self.network.state_dict()),
            "optimiser": self._optimiser.state_dict(),
            "generator": self._generator.get_state(),
            "random": self._random.bit_generator.state,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """See `Trainer.restore`."""
        self.done = state["done"]
        self.network.load_state_dict(state["network"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._generator.set_state(state["generator"])
        self._random.bit_generator.state = state["random"]

    def export(self, path: Path, record: dict[str, Any]) -> None:
        """See `Trainer.export`."""
        checkpoint.save(path, {"network": dict(self.network.state_dict()), "record": record})

    def close(self) -> None:
        """Nothing is left open."""
