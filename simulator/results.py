"""What a run gives back: finished flows, and a look at those under way."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simulator.arrays import Bools, Floats, Ints


@dataclass(frozen=True, eq=False)
class FlowResults:
    """Finished flows in order of their end; all arrays have shape (n,).

    Attributes:
        flow: number of the flow, in order of start over the whole run.
        size_bytes: payload.
        start_s: when it started.
        fct_s: completion time.
        ideal_s: completion time of the same flow alone.
        host: sender.
        destination: receiver.
    """

    flow: Ints
    size_bytes: Floats
    start_s: Floats
    fct_s: Floats
    ideal_s: Floats
    host: Ints
    destination: Ints

    def __len__(self) -> int:
        return len(self.flow)

    @property
    def slowdown(self) -> Floats:
        """FCT over the FCT of the same flow alone."""
        ratio: Floats = self.fct_s / self.ideal_s
        return ratio

    @classmethod
    def joined(cls, parts: Sequence["FlowResults"]) -> "FlowResults":
        """All parts, one after the other."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in _FIELDS))

    def in_order_of_start(self) -> "FlowResults":
        """Sorted by flow number."""
        return self.rows(np.argsort(self.flow))

    def rows(self, which: Ints | Bools) -> "FlowResults":
        """Those at these places, in their order, or those that a mask of shape (n,) says."""
        return FlowResults(*(getattr(self, name)[which] for name in _FIELDS))


def p99(values: Floats) -> float:
    """The 99th percentile, between the two nearest values in proportion; `values` has shape (n,), n at least 1.

    What `numpy.percentile` says, without the 50 us that it takes to prepare (environments ask at every step).
    """
    at = 0.99 * (len(values) - 1)
    low = int(at)
    high = min(low + 1, len(values) - 1)
    sorted_there = np.partition(values, (low, high))
    below, above = float(sorted_there[low]), float(sorted_there[high])
    return below + (at - low) * (above - below)


_FIELDS = tuple(FlowResults.__dataclass_fields__)


@dataclass(frozen=True, eq=False)
class ActiveFlows:
    """The flows under way at one moment; all arrays have shape (n,), sorted by flow number.

    `backlog_bytes` is what the send buffer shows. `level` is the one the flow is in now.
    """

    flow: Ints
    host: Ints
    destination: Ints
    start_s: Floats
    attained_bytes: Floats
    backlog_bytes: Floats
    remaining_bytes: Floats
    level: Ints
    route: Ints

    def __len__(self) -> int:
        return len(self.flow)
