"""The learned scheme: the network's corrections on top of the rules, for a running central and for comparisons."""

from pathlib import Path

import numpy as np

from central.lrla.flow_set import Choice, FlowSet, Ints
from central.lrla.inference import Inference
from central.lrla.rules import assign
from central.lrla.weights import SHIPPED, Stored, stored


class LearnedScheme:
    """Decides by a trained network, without chance: the same flows, the same verdicts.

    Args:
        weights: of a network of `network.py`.
    """

    name = "learned"

    def __init__(self, weights: Stored) -> None:
        self._inference = Inference(weights.values)
        self._rates = np.array([*weights.rates, np.inf])

    @classmethod
    def load(cls, path: Path | None = None) -> "LearnedScheme":
        """From a file of `fabricpilot train lrla`; None: the shipped one.

        Raises:
            UsageError: no such file, or other weights.
        """
        return cls(stored(path or SHIPPED, "sets"))

    def decide(self, flows: FlowSet, asked: Ints) -> Choice:
        """One pass for all flows asked for; routes are then given out one after the other."""
        bonus, priority, rate = self._inference.decide(flows, asked)
        return Choice(priority, assign(flows, asked, bonus), None if rate is None else self._rates[rate])
