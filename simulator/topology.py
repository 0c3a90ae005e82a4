"""The fabric: hosts, links with their rates, and the routes between two hosts.

A fabric is leaves of hosts joined by spines; a star is one leaf and no spine. A link is one direction. Link numbers:

    host h to its leaf            h
    leaf to host h                hosts + h
    leaf l to spine s             2 hosts + l spines + s
    spine s to leaf l             2 hosts + leaves spines + l spines + s

A route between hosts of different leaves is a spine's number. Flows without a verdict take one by hash (ECMP).
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fabricpilot.errors import UsageError
from simulator.arrays import HOPS, Paths


@dataclass(frozen=True, eq=False)
class Topology:
    """A star or leaf-spine fabric.

    Attributes:
        leaf: int64, shape (hosts,), the leaf of each host.
        leaves: how many leaves there are.
        spines: how many spines; 0 for a star.
        link_bps: float64, shape (links,), rate of each link in bit/s, numbered as above.

    Raises:
        UsageError: fewer than two hosts, several leaves without a spine, or a rate that is not positive.
    """

    leaf: npt.NDArray[np.int64]
    leaves: int
    spines: int
    link_bps: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.hosts < 2:
            raise UsageError(f"a fabric of {self.hosts} hosts; it needs at least 2")
        if self.leaves > 1 and self.spines < 1:
            raise UsageError(f"{self.leaves} leaves and no spine; give at least 1 spine")
        if len(self.link_bps) != 2 * self.hosts + 2 * self.leaves * self.spines:
            raise UsageError(f"{len(self.link_bps)} link rates do not fit the fabric")
        if not (np.isfinite(self.link_bps).all() and (self.link_bps > 0).all()):
            raise UsageError("every link rate must be a positive number of bit/s")

    @property
    def hosts(self) -> int:
        """Number of hosts."""
        return len(self.leaf)

    @property
    def links(self) -> int:
        """Number of directed links."""
        return len(self.link_bps)

    @property
    def routes(self) -> int:
        """Routes between hosts of different leaves, at least 1."""
        return max(self.spines, 1)

    def paths(self, source: npt.ArrayLike, destination: npt.ArrayLike, route: npt.ArrayLike) -> Paths:
        """Link numbers of each flow's path, int32, shape (n, 4), -1 after the last.

        Args:
            source: sending hosts, shape (n,).
            destination: receiving hosts, shape (n,).
            route: spine of each flow, shape (n,); without meaning inside a leaf.

        Raises:
            UsageError: a host or route the fabric does not have, or a flow from a host to itself.
        """
        s, d, r = (np.asarray(a, np.int64) for a in (source, destination, route))
        for what, values, limit in (("host", s, self.hosts), ("host", d, self.hosts), ("route", r, self.routes)):
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < limit:
                raise UsageError(f"{what} {int(values.max())} is not in the fabric, which has {limit} {what}s from 0")
        if (s == d).any():
            raise UsageError(f"a flow from host {int(s[s == d][0])} to itself; source and destination must differ")
        path = np.full((len(s), HOPS), -1, np.int32)
        path[:, 0] = s
        path[:, 1] = self.hosts + d
        far = self.leaf[s] != self.leaf[d]
        if far.any():
            up = 2 * self.hosts + self.leaf[s] * self.spines + r
            down = 2 * self.hosts + (self.leaves + self.leaf[d]) * self.spines + r
            path[far, 1] = up[far]
            path[far, 2] = down[far]
            path[far, 3] = self.hosts + d[far]
        return path

    def route_of(self, path: Paths) -> npt.NDArray[np.int64]:
        """The route each path takes, shape (n,); 0 inside a leaf."""
        first_up = path[:, 1].astype(np.int64) - 2 * self.hosts
        inside = (path[:, 2] < 0) | (self.spines == 0)
        routes: npt.NDArray[np.int64] = np.where(inside, 0, first_up % max(self.spines, 1))
        return routes

    def hashed_route(self, flow: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """A route per flow number, spread like ECMP's hash does (a fixed mix of the number's bits)."""
        mixed = flow.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(32)
        mixed *= np.uint64(0xD6E8FEB86659FD93)
        routes: npt.NDArray[np.int64] = ((mixed >> np.uint64(32)) % np.uint64(self.routes)).astype(np.int64)
        return routes

    def with_host_rate(self, host: int, rate_bps: float) -> "Topology":
        """The same fabric with another rate on both links of one host.

        Raises:
            UsageError: no such host, or the rate is not positive.
        """
        if not 0 <= host < self.hosts:
            raise UsageError(f"host {host} is not in the fabric, which has {self.hosts} hosts from 0")
        rates = self.link_bps.copy()
        rates[[host, self.hosts + host]] = rate_bps
        return replace(self, link_bps=rates)


def star(hosts: int, rate_bps: float) -> Topology:
    """Hosts around one switch, every link of the same rate."""
    return Topology(np.zeros(hosts, np.int64), 1, 0, np.full(2 * hosts, float(rate_bps)))


def leaf_spine(
    leaves: int, spines: int, hosts_per_leaf: int, host_bps: float, oversubscription: float = 1.0
) -> Topology:
    """A leaf-spine fabric; a leaf's uplinks together carry its hosts' rate divided by `oversubscription`.

    Raises:
        UsageError: counts below 1 or an oversubscription that is not positive.
    """
    if min(leaves, spines, hosts_per_leaf) < 1 or not oversubscription > 0:
        raise UsageError(
            f"{leaves} leaves, {spines} spines, {hosts_per_leaf} hosts per leaf, oversubscription "
            f"{oversubscription}: each must be above 0"
        )
    hosts = leaves * hosts_per_leaf
    uplink_bps = hosts_per_leaf * host_bps / (spines * oversubscription)
    rates = np.concatenate([np.full(2 * hosts, float(host_bps)), np.full(2 * leaves * spines, uplink_bps)])
    return Topology(np.repeat(np.arange(leaves), hosts_per_leaf), leaves, spines, rates)
