"""Routes by mark: asks the kernel where policy routing sends a flow with that mark, and keeps the answers as next hops.

A packet's mark comes too late for its route at the egress program, so the question is asked beforehand, per flow with
a verdict for such a route (`ip route get DESTINATION mark MARK`), and the answer used like any other next hop. It is
asked again when routing tables change.
"""

import ipaddress
import time
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from fabricpilot.wire import MAX_ROUTE, FlowVerdict
from hostagent.datapath.steering import MAX_ROUTES
from hostagent.routes.paths import Hop

_NUMBERS: Final = range(MAX_ROUTE + 1, MAX_ROUTES)  # of next hops found here, beside the configured routes

FlowName = tuple[str, str, int, int, int]


class MarkRoutes:
    """Next hops of the flows that have a verdict for a route by mark.

    Args:
        ipr: rtnetlink socket.
        marks: by number of the route.
    """

    def __init__(self, ipr: IPRoute, marks: Mapping[int, int]) -> None:
        self._ipr = ipr
        self._marks = dict(marks)
        self._hops: dict[Hop, int] = {}
        self._followed: dict[FlowName, tuple[FlowVerdict, float]] = {}  # the verdict as central gave it, and its end

    def hops(self) -> dict[int, Hop]:
        """The next hops in use by number."""
        return {number: hop for hop, number in self._hops.items()}

    def translate(self, verdicts: Sequence[FlowVerdict]) -> list[FlowVerdict]:
        """`verdicts` with routes by mark replaced by the next hop that the kernel names; 0 if it names none."""
        if not self._marks:
            return list(verdicts)
        now = time.monotonic()
        for verdict in verdicts:
            self._followed.pop(_name(verdict), None)
            if verdict.route in self._marks and verdict.ttl_s > 0:
                self._followed[_name(verdict)] = verdict, now + verdict.ttl_s
        return [self._translated(verdict, verdict.ttl_s) for verdict in verdicts]

    def again(self) -> list[FlowVerdict]:
        """The verdicts by mark that still hold, translated anew: routing tables may have changed."""
        now = time.monotonic()
        self._followed = {name: kept for name, kept in self._followed.items() if kept[1] > now}
        self._hops = {}
        return [self._translated(verdict, until - now) for verdict, until in self._followed.values()]

    def _translated(self, verdict: FlowVerdict, ttl_s: float) -> FlowVerdict:
        if verdict.route not in self._marks or ttl_s == 0:
            return verdict
        hop = self._ask(verdict.destination, self._marks[verdict.route])
        return msgspec.structs.replace(verdict, route=self._number(hop) if hop else 0, ttl_s=ttl_s)

    def _number(self, hop: Hop) -> int:
        if hop not in self._hops:
            free = sorted(set(_NUMBERS) - set(self._hops.values()))
            if not free:
                return 0
            self._hops[hop] = free[0]
        return self._hops[hop]

    def _ask(self, destination: str, mark: int) -> Hop | None:
        try:
            answer = self._ipr.route("get", dst=destination, mark=mark)[0]
        except (NetlinkError, IndexError):
            return None  # unreachable that way
        index, gateway = answer.get_attr("RTA_OIF"), answer.get_attr("RTA_GATEWAY")
        version = ipaddress.ip_address(destination).version
        next_hop = ipaddress.ip_address(gateway).packed if gateway else bytes(4 if version == 4 else 16)
        if len(next_hop) == 4:
            return Hop(index, next_hop, None)
        return Hop(index, None, next_hop)


def _name(verdict: FlowVerdict) -> FlowName:
    return (
        verdict.source,
        verdict.destination,
        verdict.source_port,
        verdict.destination_port,
        verdict.protocol,
    )
