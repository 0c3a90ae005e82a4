"""AuTO's own agent from its weights: for `fabricpilot bench lrla` alone, not for a running central."""

from pathlib import Path

import torch

from central.lrla.paper import PaperNetwork
from central.lrla.reinforce import Sampler, Settings
from central.lrla.weights import PAPER, stored
from central.training.settings import read


def auto(path: Path = PAPER, seed: int = 1) -> Sampler:
    """The agent for one run: it remembers, and draws its decisions, as published.

    Args:
        path: weights.
        seed: of the draws.

    Raises:
        UsageError: no such file, or other weights.
    """
    torch.set_num_threads(1)
    weights = stored(path, "paper")
    settings = read(Settings, None, weights.settings)
    network = PaperNetwork(settings.paper.layers, settings.rates)
    network.load_state_dict({name: torch.from_numpy(value) for name, value in weights.values.items()})
    return Sampler(network.eval(), torch.Generator().manual_seed(seed))
