"""AuTO's own agent from its weights: for `fabricpilot bench lrla` alone, not for a running central."""

from pathlib import Path

import torch

from central.lrla.learned import SHIPPED, filled
from central.lrla.paper import PaperNetwork
from central.lrla.reinforce import Sampler, Settings
from central.training import checkpoint
from central.training.settings import read
from fabricpilot.errors import UsageError

PAPER = SHIPPED.with_name("paper.npz")


def auto(path: Path = PAPER, seed: int = 1) -> Sampler:
    """The agent for one run: it remembers, and draws its decisions, as published.

    Args:
        path: weights.
        seed: of the draws.

    Raises:
        UsageError: no such file, or other weights.
    """
    torch.set_num_threads(1)
    stored = checkpoint.load(path)
    try:
        settings = read(Settings, None, stored["record"]["settings"])
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path} holds no weights of `fabricpilot train lrla`") from error
    if settings.network != "paper":
        raise UsageError(f'{path} was not trained with network = "paper" (central/lrla/configs/paper.toml)')
    network = filled(PaperNetwork(settings.paper.layers), stored, path)
    return Sampler(network.eval(), torch.Generator().manual_seed(seed))
