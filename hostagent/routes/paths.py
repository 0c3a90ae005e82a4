"""Routes as configured, understood and checked. Pure.

A route is one of three: a next hop behind an interface, whatever policy routing does with packets of a mark, or an
IPv6 flow label for fabrics that choose among equal paths by it.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fabricpilot.config import Route
from fabricpilot.errors import UsageError
from fabricpilot.wire import MAX_ROUTE
from hostagent.datapath.steering import ROUTE_DTYPE, ROUTE_IPV4, ROUTE_IPV6, ROUTE_LABEL, ROUTE_MANAGED

_MAX_FLOW_LABEL: Final = 2**20 - 1


@dataclass(frozen=True)
class Hop:
    """A next hop: packed addresses, or None where the route does not serve that IP version.

    An address of zeros stands for the destination itself: it is a neighbour on that interface.
    """

    interface: int
    ipv4: bytes | None
    ipv6: bytes | None

    def record(self, managed: bool, ipv4: bool, ipv6: bool) -> npt.NDArray[np.void]:
        """As the kernel has it, ROUTE_DTYPE, shape ().

        Args:
            managed: that interface has the data path's program, too.
            ipv4: the IPv4 next hop may be used now.
            ipv6: the IPv6 one may. Only the flags say so: one half comes and goes without touching the other.
        """
        route = np.zeros((), ROUTE_DTYPE)
        route["interface"] = self.interface
        route["flags"] = (ROUTE_IPV4 if ipv4 else 0) | (ROUTE_IPV6 if ipv6 else 0) | (ROUTE_MANAGED if managed else 0)
        route["on_link"] = 0 if any(self.ipv4 or b"") or any(self.ipv6 or b"") else 2**32 - 1
        route["next_hop_ipv4"] = np.frombuffer(self.ipv4 or bytes(4), np.uint8)
        route["next_hop_ipv6"] = np.frombuffer(self.ipv6 or bytes(16), np.uint8)
        return route


@dataclass(frozen=True)
class Path:
    """A configured route. One of `interface`, `mark` and `flow_label` is set."""

    number: int
    interface: str
    next_hop: bytes | None
    next_hop6: bytes | None
    mark: int
    flow_label: int

    def hop(self, index: int) -> Hop:
        """Its next hop; `index` is that of its interface now."""
        if self.next_hop is None and self.next_hop6 is None:
            return Hop(index, bytes(4), bytes(16))
        return Hop(index, self.next_hop, self.next_hop6)

    def label_record(self) -> npt.NDArray[np.void]:
        """A flow-label route as the kernel has it, ROUTE_DTYPE, shape ()."""
        route = np.zeros((), ROUTE_DTYPE)
        route["flags"], route["flow_label"] = ROUTE_LABEL, self.flow_label
        return route


def parse_paths(paths: Sequence[Route]) -> dict[int, Path]:
    """The routes of a configuration by number.

    Raises:
        UsageError: names the route and what is wrong with it.
    """
    parsed: dict[int, Path] = {}
    for path in paths:

        def wrong(what: str, number: int = path.number) -> UsageError:
            return UsageError(f"route {number}: {what}")

        if not 1 <= path.number <= MAX_ROUTE:
            raise wrong(f"the number of a route must be 1 to {MAX_ROUTE} (0 is the kernel's choice)")
        if path.number in parsed:
            raise wrong("there are two routes of that number")
        if sum((bool(path.interface), bool(path.mark), bool(path.flow_label))) != 1:
            raise wrong("give one of interface, mark and flow_label")
        if (path.next_hop or path.next_hop6) and not path.interface:
            raise wrong("a next hop needs the interface that it is behind")
        if not 0 <= path.mark < 2**32:
            raise wrong(f"mark = {path.mark}; a mark is an unsigned 32-bit number")
        if not 0 <= path.flow_label <= _MAX_FLOW_LABEL:
            raise wrong(f"flow_label = {path.flow_label}; a flow label is 1 to {_MAX_FLOW_LABEL}")
        try:
            next_hop = ipaddress.IPv4Address(path.next_hop).packed if path.next_hop else None
            next_hop6 = ipaddress.IPv6Address(path.next_hop6).packed if path.next_hop6 else None
        except ValueError as error:
            raise wrong(f"{error}; next_hop is an IPv4 address, next_hop6 an IPv6 address") from error
        parsed[path.number] = Path(path.number, path.interface, next_hop, next_hop6, path.mark, path.flow_label)
    return parsed
