"""Schemes that do not learn: what every learned policy is measured by, and what it starts from.

ecmp            the hash's route, the lowest priority: what a fabric does by itself
least-loaded    the route whose busier end has the fewest long flows, the lowest priority
shortest-first  as least-loaded, and a priority by what is seen to remain: the shorter the remainder the higher
"""

from dataclasses import dataclass

import numpy as np

from central.lrla.flow_set import UNKNOWN_ROUTE, Choice, Floats, FlowSet, Ints, LongFlowScheme, route_loads


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
        remainders_bytes: ascending; a flow is seen to have at most the last of these left to get priority 1, the one
            before for 2, and so on. Empty: all have the lowest priority.
        margin: flows by which another route must be better for a flow to leave the one it has.
    """

    remainders_bytes: tuple[float, ...] = ()
    margin: float = 1.0
    name: str = "least-loaded"

    def decide(self, flows: FlowSet, asked: Ints) -> Choice:
        """One after the other, each seeing where those before it went."""
        return Choice(self._priorities(flows, asked), self._routes(flows, asked))

    def _priorities(self, flows: FlowSet, asked: Ints) -> Ints:
        known = flows.known_bytes[asked]
        left = np.where(np.isnan(known), np.inf, known)
        wanted = np.zeros(len(asked), np.int64)
        for limit in self.remainders_bytes:
            wanted += left <= limit
        wanted[flows.migration[asked]] = 0
        priorities: Ints = np.minimum(wanted, flows.priorities[asked] - 1)
        return priorities

    def _routes(self, flows: FlowSet, asked: Ints) -> Ints:
        up, down = route_loads(flows)
        routes = np.full(len(asked), UNKNOWN_ROUTE)
        for place, row in enumerate(asked.tolist()):
            usable = flows.usable[row]
            here, there, now = int(flows.source_rack[row]), int(flows.destination_rack[row]), int(flows.route[row])
            if here == there or not usable.any():
                continue
            own = np.zeros(flows.routes)
            if now >= 0:
                own[now] = 1.0
            else:
                own[usable] = 1.0 / usable.sum()
            others_up, others_down = up[here] - own, down[there] - own
            # The busier end decides; then both together; then the lowest number of those left, turned by flow so
            # that equal routes are taken in turn.
            cost = np.maximum(others_up, others_down) + 1e-3 * (others_up + others_down)
            cost += 1e-6 * ((np.arange(flows.routes) + row) % flows.routes)
            if now >= 0 and usable[now]:
                cost[now] -= self.margin
            cost[~usable] = np.inf
            chosen = int(cost.argmin())
            routes[place] = chosen
            up[here] += _moved(own, chosen)
            down[there] += _moved(own, chosen)
        return routes


def _moved(own: Floats, chosen: int) -> Floats:
    change = -own
    change[chosen] += 1.0
    return change


SHORTEST_FIRST_BYTES = (1e6, 4e6)  # found best in `fabricpilot bench lrla` (docs/lrla.md)


def rule(name: str) -> LongFlowScheme:
    """A scheme of this file by its name."""
    made: dict[str, LongFlowScheme] = {
        "ecmp": Ecmp(),
        "least-loaded": LeastLoaded(),
        "shortest-first": LeastLoaded(SHORTEST_FIRST_BYTES, name="shortest-first"),
    }
    return made[name]
