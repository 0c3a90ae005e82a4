"""The learned scheme: the network's corrections on top of the rules, for a running central and for comparisons."""

from pathlib import Path
from typing import Any, TypeVar

import torch

from central.lrla.flow_set import Choice, FlowSet, Ints
from central.lrla.network import Policy, PolicyNetwork, batch_of
from central.lrla.rules import assign
from central.training import checkpoint
from fabricpilot.errors import UsageError

SHIPPED = Path(__file__).with_name("weights") / "lrla.npz"
PolicyT = TypeVar("PolicyT", bound=Policy)


class LearnedScheme:
    """Decides by a trained network, without chance: the same flows, the same verdicts."""

    name = "learned"

    def __init__(self, network: PolicyNetwork) -> None:
        torch.set_num_threads(1)  # the network is small: threads would only wait for each other
        self._network = network.eval()

    @classmethod
    def load(cls, path: Path | None = None) -> "LearnedScheme":
        """From a file of `fabricpilot train lrla`; None: the shipped one.

        Raises:
            UsageError: no such file, or other weights.
        """
        return cls(filled(PolicyNetwork(), checkpoint.load(path or SHIPPED), path or SHIPPED))

    def decide(self, flows: FlowSet, asked: Ints) -> Choice:
        """One pass for all flows asked for; routes are then given out one after the other."""
        bonus, priority = self._network.bonus(batch_of(flows, asked))
        return Choice(priority, assign(flows, asked, bonus))


def filled(network: PolicyT, stored: Any, path: Path) -> PolicyT:
    """The network with stored weights.

    Raises:
        UsageError: other weights, or such as are not finite; names the file.
    """
    try:
        network.load_state_dict(stored["network"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise UsageError(f"{path} holds no weights of this network") from error
    if not all(bool(torch.isfinite(value).all()) for value in network.state_dict().values()):
        raise UsageError(f"{path} holds weights that are not finite")
    return network
