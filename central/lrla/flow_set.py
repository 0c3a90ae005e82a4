"""The long flows under way, as columns: what every scheme decides on, in the simulator and in the daemon alike.

Hosts, racks and routes are dense numbers from 0. A rack is a leaf switch with the hosts below it; a route is a way from
rack to rack, so a flow loads the way up from its sender's rack and the way down to its receiver's. Flows inside one
rack have no route.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

UNKNOWN_ROUTE = -1  # the kernel's or the switch's choice
MAX_PRIORITIES = 4  # a scheme tells the last levels apart: priority p is level K-1-p, and 0 the lowest


@dataclass(frozen=True, eq=False)
class FlowSet:
    """n long flows.

    Attributes:
        source: sender, shape (n,) as all others.
        destination: receiver.
        source_rack: leaf of the sender.
        destination_rack: leaf of the receiver.
        attained_bytes: sent so far.
        known_bytes: seen to remain, as far as the send buffer shows; NaN: nothing is known.
        age_s: since the message began.
        route: the one it takes; `UNKNOWN_ROUTE` before its first decision.
        priority: the one it has, 0 to `MAX_PRIORITIES` - 1.
        migration: it moves a virtual machine.
        usable: bool, shape (n, R): routes it may take.
        priorities: how many it may have (at most its host's K).
        hosts: how many hosts there are.
        racks: how many racks.
        rate_bps: of a host's link, what rates are measured by.
    """

    source: Ints
    destination: Ints
    source_rack: Ints
    destination_rack: Ints
    attained_bytes: Floats
    known_bytes: Floats
    age_s: Floats
    route: Ints
    priority: Ints
    migration: Bools
    usable: Bools
    priorities: Ints
    hosts: int
    racks: int
    rate_bps: float

    def __len__(self) -> int:
        return len(self.source)

    @property
    def routes(self) -> int:
        """R."""
        return int(self.usable.shape[1])

    @property
    def crosses(self) -> Bools:
        """Flows between racks: only these have a route to choose."""
        across: Bools = self.source_rack != self.destination_rack
        return across


class Choice(NamedTuple):
    """A scheme's decisions, shape (m,) each."""

    priority: Ints
    route: Ints  # `UNKNOWN_ROUTE`: none, the kernel's choice
    rate: Floats | None = None  # highest rate as a share of the host's link, infinite: none; None: rates are not chosen


class LongFlowScheme(Protocol):
    """Chooses priority and route of long flows, and in the laboratory their rate."""

    @property
    def name(self) -> str:
        """As configuration and results call it."""

    def decide(self, flows: FlowSet, asked: Ints) -> Choice:
        """For the flows of these rows (shape (m,)), given all of them."""


def route_shares(flows: FlowSet, rows: Ints) -> Floats:
    """How the flows of these rows count on routes, shape (m, R): whole, or in equal parts where theirs is unknown.

    Flows inside a rack count nowhere.
    """
    share = np.zeros((len(rows), flows.routes))
    route, crosses, usable = flows.route[rows], flows.crosses[rows], flows.usable[rows]
    known = np.flatnonzero(crosses & (route >= 0))
    share[known, route[known]] = 1.0
    blind = crosses & (route < 0)
    share[blind] = usable[blind] / np.maximum(usable[blind].sum(axis=1, keepdims=True), 1)
    return share


def route_loads(flows: FlowSet, share: Floats | None = None) -> tuple[Floats, Floats]:
    """Long flows on the way up from each rack and down to each, by route: two of shape (racks, R).

    Args:
        flows: all of them.
        share: their `route_shares`, if they are known already.
    """
    share = route_shares(flows, np.arange(len(flows))) if share is None else share
    up, down = np.zeros((flows.racks, flows.routes)), np.zeros((flows.racks, flows.routes))
    for route in range(flows.routes):
        up[:, route] = np.bincount(flows.source_rack, share[:, route], flows.racks)
        down[:, route] = np.bincount(flows.destination_rack, share[:, route], flows.racks)
    return up, down
