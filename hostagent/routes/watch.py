"""Which routes lead somewhere now: follows links and neighbours by netlink, and withdraws a route at once.

    link down, gone, or too small an MTU  -> the route is withdrawn; flows on it go where the kernel sends them
    next hop does not answer              -> that IP version of the route is withdrawn, and the next hop asked again
    back again                            -> offered again; flows return in their next gap

Next hops are asked (ARP, neighbour discovery) before a route is offered, and kept under watch: a router that dies
behind a link that stays up is noticed as well, within the seconds that the kernel gives a neighbour to answer.

An event says only that something changed: what is, is read afresh, so lost events cost nothing but time. Routes are
lent to the kernel for a few ticks: when the agent is gone, nobody watches, and flows return to the kernel's choice.
"""

import contextlib
import logging
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from hostagent.datapath.steering import Steering
from hostagent.routes.marks import MarkRoutes
from hostagent.routes.paths import Hop, Path

log = logging.getLogger(__name__)

_GROUPS: Final = 0x1 | 0x4 | 0x40 | 0x400  # RTMGRP_LINK, NEIGH, IPV4_ROUTE, IPV6_ROUTE
_NEW_LINK, _DEL_LINK, _NEW_ROUTE, _DEL_ROUTE, _NEW_NEIGHBOUR = 16, 17, 24, 25, 28
_UP_AND_RUNNING: Final = 0x1 | 0x40  # IFF_UP, IFF_RUNNING
_REACHABLE: Final = 0x02 | 0x40 | 0x80  # NUD_REACHABLE, NOARP, PERMANENT: nothing to ask
_ANSWERS: Final = _REACHABLE | 0x04 | 0x08 | 0x10  # STALE, DELAY, PROBE: it did
_INCOMPLETE: Final = 0x01  # NUD_INCOMPLETE: being asked
_FAILED: Final = 0x20  # NUD_FAILED
_NTF_USE: Final = 0x01  # ask the neighbour now


Neighbour = tuple[int, bytes]  # interface, packed address


@dataclass(frozen=True)
class Link:
    """What matters of an interface."""

    index: int
    running: bool
    mtu: int


class RouteWatch:
    """The routes of one host.

    Args:
        ipr: one long-lived rtnetlink socket in the data path's network namespace.
        steering: where usable routes are told.
        paths: the configured routes by number.
        scheduled: names of the interfaces that carry the data path's program.
        gap_ms: silence after which a flow may change its route.
        lease_s: how long routes hold on without a `tick`.

    Attributes:
        socket: for a poller; call `on_event` when it is readable.
        why_not: why a route is withdrawn, by number.
    """

    def __init__(
        self,
        ipr: IPRoute,
        steering: Steering,
        paths: Mapping[int, Path],
        scheduled: Callable[[], list[str]],
        gap_ms: int,
        lease_s: float,
    ) -> None:
        self._ipr = ipr
        self._steering = steering
        self._paths = dict(paths)
        self._scheduled = scheduled
        self._gap_ms = gap_ms
        self._lease_s = lease_s
        self._hops: set[bytes] = set()  # addresses of all next hops
        self._wanted: set[Neighbour] = set()  # next hops behind links that are up
        self._told: dict[int, npt.NDArray[np.void]] = {}
        self._neighbours: dict[Neighbour, int] = {}  # state of the next hops that the kernel knows
        self.why_not: dict[int, str] = {}
        self.marks = MarkRoutes(ipr, {number: path.mark for number, path in self._paths.items() if path.mark})
        # Opened first: what changes while the first state is read is not missed.
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        try:
            self.socket.bind((0, _GROUPS))
            self.refresh()
        except BaseException:
            self.socket.close()
            raise

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of the configured routes."""
        return tuple(self._paths)

    def on_event(self) -> bool:
        """Act on what netlink has told; returns whether routing tables changed, so that marks lead elsewhere."""
        link = neighbour = tables = False
        for kind, body in self._messages():
            if kind in (_NEW_LINK, _DEL_LINK):
                link = True
                self._withdraw_over(kind, body)
            neighbour |= kind == _NEW_NEIGHBOUR and self._concerns_a_next_hop(body)
            tables |= kind in (_NEW_ROUTE, _DEL_ROUTE)
        if link or neighbour:
            self.refresh()
        return tables or link

    def tick(self) -> None:
        """Read everything afresh, renew the lease, ask silent next hops again."""
        self.refresh()
        self._ask(_REACHABLE | _INCOMPLETE)

    def refresh(self) -> None:
        """Read links and neighbours, and tell the kernel which routes may be used."""
        links = self._links()
        scheduled = set(self._scheduled())
        managed = {links[name].index for name in scheduled if name in links}
        least_mtu = max((links[name].mtu for name in scheduled if name in links), default=0)
        self._neighbours = self._read_neighbours()
        self._wanted = set()
        records: dict[int, npt.NDArray[np.void]] = {}
        why_not: dict[int, str] = {}
        names = {link.index: name for name, link in links.items()}
        for number, path in self._paths.items():
            if path.flow_label:
                records[number] = path.label_record()
            elif path.interface and path.interface not in links:
                why_not[number] = f"there is no interface {path.interface}"
            elif path.interface:
                hop = path.hop(links[path.interface].index)
                self._add(number, hop, path.interface, links, least_mtu, managed, records, why_not)
        for number, hop in self.marks.hops().items():
            self._add(number, hop, names.get(hop.interface, ""), links, least_mtu, managed, records, why_not)
        changed = {n: record for n, record in records.items() if not _same(self._told.get(n), record)}
        if set(self._told) - set(records):
            self._steering.use_routes([n for n in records if n not in changed], self._lease_s)  # withdraw first
        if changed or not self._told:
            self._steering.set_routes(changed, self._gap_ms)
        self._steering.use_routes(list(records), self._lease_s)
        self._log_changes(why_not)
        self._told, self.why_not = records, why_not
        self._ask(_ANSWERS | _INCOMPLETE)

    def close(self) -> None:
        """Stop watching, so routes must not be used any more: flows return to the kernel's choice."""
        self._steering.use_routes([], 0)
        self.socket.close()

    def _add(
        self,
        number: int,
        hop: Hop,
        name: str,
        links: Mapping[str, Link],
        least_mtu: int,
        managed: set[int],
        records: dict[int, npt.NDArray[np.void]],
        why_not: dict[int, str],
    ) -> None:
        link = links.get(name)
        if link is None or not link.running:
            why_not[number] = f"{name or 'its interface'} is down"
            return
        if link.mtu < least_mtu:
            why_not[number] = f"{name} has MTU {link.mtu}, packets of up to {least_mtu} bytes would be sent there"
            return
        ipv4, ipv6 = self._answers(hop.interface, hop.ipv4), self._answers(hop.interface, hop.ipv6)
        if not ipv4 and not ipv6:
            why_not[number] = f"its next hop behind {name} does not answer"
            return
        if (hop.ipv4 is not None and not ipv4) or (hop.ipv6 is not None and not ipv6):  # half of it is left
            why_not[number] = f"its {'IPv4' if ipv6 else 'IPv6'} next hop behind {name} does not answer"
        records[number] = hop.record(hop.interface in managed, ipv4, ipv6)

    def _links(self) -> dict[str, Link]:
        return {
            link.get_attr("IFLA_IFNAME"): Link(
                link["index"], link["flags"] & _UP_AND_RUNNING == _UP_AND_RUNNING, link.get_attr("IFLA_MTU") or 0
            )
            for link in self._ipr.get_links()
        }

    def _answers(self, interface: int, address: bytes | None) -> bool:
        """Whether there is a next hop and it answers; zeros stand for the destination, which is not asked."""
        if address is None or not any(address):
            return address is not None
        self._wanted.add((interface, address))
        return bool(self._neighbours.get((interface, address), 0) & _ANSWERS)

    def _ask(self, unless: int) -> None:
        """Have the kernel ask the next hops whose state is none of `unless`."""
        for interface, address in self._wanted:
            if not self._neighbours.get((interface, address), 0) & unless:
                with contextlib.suppress(NetlinkError):  # the interface may be gone
                    self._ipr.neigh("replace", ifindex=interface, dst=_text(address), flags=_NTF_USE, state=0)

    def _read_neighbours(self) -> dict[Neighbour, int]:
        hops = {hop for path in self._paths.values() for hop in (path.next_hop, path.next_hop6) if hop}
        hops |= {hop for found in self.marks.hops().values() for hop in (found.ipv4, found.ipv6) if hop and any(hop)}
        self._hops = hops
        states = {}
        for family in {socket.AF_INET if len(hop) == 4 else socket.AF_INET6 for hop in hops}:
            for neighbour in self._ipr.get_neighbours(family):
                address = _packed(neighbour.get_attr("NDA_DST") or "")
                if address in hops:
                    states[neighbour["ifindex"], address] = neighbour["state"]
        return states

    def _withdraw_over(self, kind: int, body: bytes) -> None:
        """Withdraw what leads over a link that has just gone, before taking the time to read everything afresh."""
        if len(body) < 12:
            return
        index, flags = struct.unpack_from("=4xiI", body)  # struct ifinfomsg
        if kind == _NEW_LINK and flags & _UP_AND_RUNNING == _UP_AND_RUNNING:
            return
        left = {number: record for number, record in self._told.items() if int(record["interface"]) != index}
        if len(left) < len(self._told):
            self._steering.use_routes(list(left), self._lease_s)
            self._told = left

    def _concerns_a_next_hop(self, body: bytes) -> bool:
        if len(body) < 12:
            return False
        # struct ndmsg: family, padding, interface, state. The address stands in some attribute behind it.
        state = struct.unpack_from("=BxHiH", body)[3]
        return bool(state & (_FAILED | _ANSWERS)) and any(hop in body for hop in self._hops)

    def _messages(self) -> Iterator[tuple[int, bytes]]:
        while True:
            try:
                data = self.socket.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError:  # ENOBUFS: events were lost, so anything may have changed
                yield _NEW_LINK, b""
                continue
            offset = 0
            while offset + 16 <= len(data):
                length, kind = struct.unpack_from("=IH", data, offset)
                if length < 16:
                    break
                yield kind, data[offset + 16 : offset + length]
                offset += (length + 3) & ~3

    def _log_changes(self, why_not: Mapping[int, str]) -> None:
        for number, why in why_not.items():
            if self.why_not.get(number) != why:
                log.warning("route %d is withdrawn: %s", number, why)
        for number in self.why_not:
            if number not in why_not:
                log.info("route %d is usable again", number)


def _same(before: npt.NDArray[np.void] | None, now: npt.NDArray[np.void]) -> bool:
    return before is not None and before.tobytes() == now.tobytes()


def _packed(text: str) -> bytes:
    if not text:
        return b""
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def _text(address: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)
