"""Schemes that do not learn: what every learned policy is measured by, and what it starts from.

ecmp            the hash's route, the lowest priority: what a fabric does by itself
least-loaded    the route whose busier end has the fewest long flows, the lowest priority
young-first     as least-loaded, and flows that have not sent much yet go before the others
shortest-first  as least-loaded, and a priority by what is seen to remain: the shorter the remainder the higher
"""

from dataclasses import dataclass

import numpy as np

from central.lrla.flow_set import (
    UNKNOWN_ROUTE,
    Bools,
    Choice,
    Floats,
    FlowSet,
    Ints,
    LongFlowScheme,
    route_loads,
    route_shares,
)
from simulator.compiled import compiled

_ONE_BY_ONE = (
    48  # flows decided on at once up to which each sees where all those before it went; more go in so many parts
)


@dataclass(frozen=True)
class Ecmp:
    """Leaves everything as it is without central."""

    name: str = "ecmp"

    def decide(self, flows: FlowSet, asked: Ints) -> Choice:
        """The lowest priority, no route."""
        return Choice(np.zeros(len(asked), np.int64), np.full(len(asked), UNKNOWN_ROUTE))


@dataclass(frozen=True)
class LeastLoaded:
    """Greedy by the number of long flows.

    Attributes:
        remainders_bytes: a flow that is seen to have less left gets a priority more for each.
        sent_bytes: a flow that has sent less gets a priority more for each. Both empty: all have the lowest priority.
    """

    remainders_bytes: tuple[float, ...] = ()
    sent_bytes: tuple[float, ...] = ()
    name: str = "least-loaded"

    def decide(self, flows: FlowSet, asked: Ints) -> Choice:
        """Routes one after the other, each flow seeing where those before it went."""
        return Choice(priorities(flows, asked, self.remainders_bytes, self.sent_bytes), assign(flows, asked))


def priorities(
    flows: FlowSet, asked: Ints, remainders_bytes: tuple[float, ...] = (), sent_bytes: tuple[float, ...] = ()
) -> Ints:
    """Priority of the flows in rows `asked` by what is seen to remain and by what they sent; migrations: the lowest."""
    known, sent = flows.known_bytes[asked], flows.attained_bytes[asked]
    left = np.where(np.isnan(known), np.inf, known)
    wanted = np.zeros(len(asked), np.int64)
    for limit in remainders_bytes:
        wanted += left < limit
    for limit in sent_bytes:
        wanted += sent < limit
    wanted[flows.migration[asked]] = 0
    bounded: Ints = np.minimum(wanted, flows.priorities[asked] - 1)
    return bounded


def costs(flows: FlowSet, asked: Ints, up: Floats, down: Floats, own: Floats) -> Floats:
    """What each route costs each flow in rows `asked`, in flows, shape (m, R); infinite where it may not go.

    The busier end of the route decides, then both ends together; a flow leaves the route it has only for one that is
    better by a whole flow.

    Args:
        flows: all of them.
        asked: rows, shape (m,).
        up: long flows on the way up from each rack, shape (racks, R).
        down: on the way down to each.
        own: how the asked flows themselves count in there, shape (m, R).
    """
    others_up = up[flows.source_rack[asked]] - own
    others_down = down[flows.destination_rack[asked]] - own
    cost = np.maximum(others_up, others_down) + 0.1 * (others_up + others_down)
    has = flows.route[asked] >= 0
    cost[has, flows.route[asked][has]] -= 1.0
    cost[~flows.usable[asked]] = np.inf
    return cost


def assign(flows: FlowSet, asked: Ints, bonus: Floats | None = None) -> Ints:
    """The cheapest route of each flow in rows `asked`, one after the other, each seeing where those before it went.

    Args:
        flows: all of them.
        asked: rows, shape (m,).
        bonus: taken off the cost, shape (m, R).
    """
    up, down = route_loads(flows)
    own = route_shares(flows, asked)
    off = np.zeros(own.shape) if bonus is None else np.ascontiguousarray(bonus, np.float64)
    may = flows.usable[asked] & flows.crosses[asked][:, None]
    ends = flows.source_rack[asked], flows.destination_rack[asked]
    chosen = np.full(len(asked), UNKNOWN_ROUTE)
    _assign(*ends, flows.route[asked], asked, may, own, off, up, down, chosen)
    return chosen


@compiled
def _assign(
    source: Ints,
    destination: Ints,
    now: Ints,
    turn: Ints,
    may: Bools,
    own: Floats,
    off: Floats,
    up: Floats,
    down: Floats,
    chosen: Ints,
) -> None:
    """`assign` into `chosen`, flow by flow, with the costs of `costs`; equal routes are taken in turn."""
    m, routes = own.shape
    for i in range(m):
        least = np.inf
        for step in range(routes):
            r = (step + turn[i]) % routes
            if not may[i, r]:
                continue
            above, below = up[source[i], r] - own[i, r], down[destination[i], r] - own[i, r]
            cost = max(above, below) + 0.1 * (above + below) - off[i, r]
            if r == now[i]:
                cost -= 1.0
            if cost < least - 1e-9:
                least, chosen[i] = cost, r
        if chosen[i] >= 0:
            for r in range(routes):
                moved = (1.0 if r == chosen[i] else 0.0) - own[i, r]
                up[source[i], r] += moved
                down[destination[i], r] += moved


SHORTEST_FIRST_BYTES = (2e6, 3.9e6)  # picked by hand from a few (docs/lrla.md)
YOUNG_BYTES = (10e6,)  # where flows begin to be long
RULES: dict[str, LongFlowScheme] = {
    "ecmp": Ecmp(),
    "least-loaded": LeastLoaded(),
    "young-first": LeastLoaded(sent_bytes=YOUNG_BYTES, name="young-first"),
    "shortest-first": LeastLoaded(SHORTEST_FIRST_BYTES, name="shortest-first"),
}
