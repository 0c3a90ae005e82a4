"""The long flows that hosts have told of, kept as rows of one array, and the verdicts they have.

Where it sits: in the scheduler's process (`process.py`). What hosts say goes in with `update`; `due` says which flows
need a decision, `flow_set` shows all of them to the scheme, `verdicts` notes the answer and says what to send.

    new        needs a decision at once
    going on   is decided on again with every report; its host is told of changes, and before the verdict ends
    ended      told by an event, or missing in a report that tells of all long flows of its host

A host that stays silent loses its flows with the verdicts: after `ttl_s`. Text from hosts is looked at once per flow.
"""

import ipaddress
from functools import lru_cache
from typing import Final

import msgspec
import numpy as np

from central.lrla.flow_set import MAX_PRIORITIES, UNKNOWN_ROUTE, Choice, FlowSet, Ints
from fabricpilot.config import LongFlowsSection
from fabricpilot.wire import MAX_ROUTE, FlowSummary, FlowVerdict

Key = tuple[str, str, int, int, int]

_ROW: Final = np.dtype(
    [
        ("seen_s", "<f8"),  # when its host last told of it; NaN: the row is free
        ("source", "<i8"),
        ("destination", "<i8"),
        ("source_rack", "<i8"),
        ("destination_rack", "<i8"),
        ("attained", "<f8"),
        ("known_end", "<f8"),  # bytes sent and seen to remain when last told so; NaN: never
        ("age_s", "<f8"),
        ("migration", "?"),
        ("levels", "<i8"),
        ("usable", "<u4"),  # bit r: route r
        ("route", "<i8"),  # told to its host; 0: none
        ("priority", "<i8"),
        ("until_s", "<f8"),  # when the verdict ends; -inf: none yet
        ("decided_s", "<f8"),
    ]
)
_LEAST_ROWS: Final = 1024
_RENEWED: Final = 64  # flows that are decided on again in one round ...
_REST_S: Final = 0.2  # ... and how long none is
_MAX_PORT: Final = 65_535
_MAX_PROTOCOL: Final = 255
MAX_HOST_FLOWS: Final = 8192  # what a host has room for in its kernel
MAX_FLOWS: Final = 65_536  # beyond that flows go without a verdict


class HostFlows(msgspec.Struct, frozen=True, array_like=True):
    """What one host has said."""

    host: str
    levels: int
    link_rate_bps: int
    routes: list[int]  # that lead somewhere now
    whole: bool  # a report with all of its long flows
    flows: list[FlowSummary]
    ended: list[FlowSummary]
    moving: list[int]  # which of `flows` are migrations of virtual machines


class FlowTable:
    """All long flows known.

    Args:
        section: `[long_flows]`.
    """

    def __init__(self, section: LongFlowsSection) -> None:
        self._section = section
        self._rows = np.zeros(_LEAST_ROWS, _ROW)
        self._rows["seen_s"] = np.nan
        self._free = list(range(_LEAST_ROWS - 1, -1, -1))
        self._row_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self._host_of: dict[int, str] = {}
        self._of_host: dict[str, set[int]] = {}
        self._hosts: dict[str, int] = {}  # number of each address, dense
        self._racks: dict[str, int] = {}  # and of each rack: schemes keep sums per rack and route
        self._rates: dict[str, int] = {}
        self.untold = 0  # flows there was no room for

    def __len__(self) -> int:
        return len(self._row_of)

    def update(self, told: HostFlows, now_s: float) -> None:
        """Take in what a host has said."""
        known = self._of_host.setdefault(told.host, set())
        self._rates[told.host] = told.link_rate_bps
        found = [self._row_for(told.host, _key(flow)) for flow in told.flows]
        seen = {row: flow for row, flow in zip(found, told.flows, strict=True) if row is not None}
        self._put(told, np.fromiter(seen, np.int64, len(seen)), list(seen.values()), now_s)
        for number in told.moving:
            if (row := found[number]) is not None and not self._rows["migration"][row]:
                self._rows["migration"][row], self._rows["until_s"][row] = True, -np.inf
        for flow in told.ended:
            if self._row_of.get(_key(flow)) in known:
                self._drop(_key(flow))
        if told.whole:
            for row in known.difference(seen):
                self._drop(self._key_of[row])

    def expire(self, now_s: float) -> None:
        """Forget flows that nobody has told of for as long as a verdict holds."""
        for row in np.flatnonzero(self._rows["seen_s"] < now_s - self._section.ttl_s).tolist():
            self._drop(self._key_of[row])

    def due(self, now_s: float) -> Ints:
        """Rows that need a decision: all new ones, and some of those that were told of since the one before.

        These come in small parts, so that no new flow waits behind all of them.
        """
        used = self._used()
        rows = self._rows[used]
        new = np.isneginf(rows["until_s"])
        again = np.flatnonzero(~new & (rows["seen_s"] > rows["decided_s"]) & (rows["decided_s"] < now_s - _REST_S))
        oldest = again[np.argsort(rows["decided_s"][again], kind="stable")]
        return np.concatenate([used[new], used[oldest[:_RENEWED]]])

    def flow_set(self) -> tuple[FlowSet, Ints]:
        """All flows, and the row of each."""
        used = self._used()
        rows = self._rows[used]
        bits = np.arange(1, MAX_ROUTE + 1)
        usable = (rows["usable"][:, None] >> bits & 1).astype(np.bool_)
        most = int(np.flatnonzero(usable.any(axis=0)).max(initial=-1)) + 1
        left = rows["known_end"] - rows["attained"]
        flows = FlowSet(
            source=rows["source"],
            destination=rows["destination"],
            source_rack=rows["source_rack"],
            destination_rack=rows["destination_rack"],
            attained_bytes=rows["attained"],
            # All that was seen has been sent and it goes on: what remains is not known any more.
            known_bytes=np.where(left > 0, left, np.nan),
            age_s=rows["age_s"],
            route=rows["route"] - 1,
            priority=rows["priority"],
            migration=rows["migration"],
            usable=usable[:, :most],
            priorities=np.minimum(rows["levels"], MAX_PRIORITIES),
            hosts=len(self._hosts),
            racks=len(self._racks),
            rate_bps=float(max(self._rates.values(), default=0) or 10**9),
        )
        return flows, used

    def verdicts(self, rows: Ints, choice: Choice, now_s: float) -> dict[str, list[FlowVerdict]]:
        """Note what was decided for these rows; returns what to tell each host: changes, and what is half over."""
        ttl_s, before = self._section.ttl_s, self._rows[rows]
        self._rows["decided_s"][rows] = now_s
        same = (before["route"] == choice.route + 1) & (before["priority"] == choice.priority)
        news = np.flatnonzero(~same | (before["until_s"] < now_s + ttl_s / 2))
        rows = rows[news]
        priorities, routes = choice.priority[news], choice.route[news]
        self._rows["route"][rows], self._rows["priority"][rows] = routes + 1, priorities
        self._rows["until_s"][rows] = now_s + ttl_s
        told: dict[str, list[FlowVerdict]] = {}
        for row, priority, route in zip(rows.tolist(), priorities.tolist(), routes.tolist(), strict=True):
            level = int(self._rows["levels"][row]) - 1 - priority
            verdict = FlowVerdict(*self._key_of[row], max(level, 0), max(route + 1, 0), ttl_s)
            told.setdefault(self._host_of[row], []).append(verdict)
        return told

    def _used(self) -> Ints:
        rows: Ints = np.flatnonzero(~np.isnan(self._rows["seen_s"]))
        return rows

    def _put(self, told: HostFlows, at: Ints, flows: list[FlowSummary], now_s: float) -> None:
        """What a host says of flows, into their rows."""
        rows = self._rows[at]
        sent = np.array([flow.size_bytes for flow in flows], np.float64)
        backlog = np.array([flow.backlog_bytes for flow in flows], np.float64)
        rows["known_end"][sent < rows["attained"]] = np.nan  # the flow's next message
        rows["known_end"] = np.where(backlog > 0, sent + backlog, rows["known_end"])
        rows["seen_s"], rows["attained"], rows["levels"] = now_s, sent, told.levels
        rows["age_s"] = [flow.duration_us / 1e6 for flow in flows]
        usable = sum(1 << number for number in set(told.routes) if 1 <= number <= MAX_ROUTE)
        rows["usable"] = usable
        astray = (rows["route"] > 0) & (usable >> rows["route"] & 1 == 0)  # it leads nowhere now: choose again
        rows["route"][astray], rows["until_s"][astray] = UNKNOWN_ROUTE + 1, -np.inf
        self._rows[at] = rows

    def _row_for(self, host: str, key: Key) -> int | None:
        """The row of a flow, a new one if it has none; None if there is no room, or it has no addresses."""
        row = self._row_of.get(key)
        if row is not None:
            return row if self._host_of[row] == host else None  # a host speaks of its own flows only
        racks = [rack_of(address, self._section.rack_prefix, self._section.rack_prefix6) for address in key[:2]]
        if "" in racks or max(key[2:4]) > _MAX_PORT or key[4] > _MAX_PROTOCOL:  # no flow
            return None
        full = not self._free and len(self._rows) >= MAX_FLOWS
        if full or len(self._of_host[host]) >= MAX_HOST_FLOWS:
            self.untold += 1
            return None
        if not self._free:
            grown = np.zeros(2 * len(self._rows), _ROW)
            grown["seen_s"] = np.nan
            grown[: len(self._rows)] = self._rows
            self._free = list(range(len(grown) - 1, len(self._rows) - 1, -1))
            self._rows = grown
        row = self._free.pop()
        self._row_of[key], self._key_of[row], self._host_of[row] = row, key, host
        self._of_host[host].add(row)
        values = self._rows[row]
        values["source"], values["destination"] = (_number(self._hosts, address) for address in key[:2])
        values["source_rack"], values["destination_rack"] = (_number(self._racks, rack) for rack in racks)
        values["attained"], values["known_end"] = 0.0, np.nan
        values["route"], values["priority"] = UNKNOWN_ROUTE + 1, 0
        values["until_s"] = values["decided_s"] = -np.inf
        values["migration"] = False
        return row

    def _drop(self, key: Key) -> None:
        row = self._row_of.pop(key, None)
        if row is None:
            return
        self._rows["seen_s"][row] = np.nan
        self._of_host[self._host_of.pop(row)].discard(row)
        del self._key_of[row]
        self._free.append(row)
        if not self._row_of:
            self._hosts.clear()  # so that they do not grow with every address there ever was
            self._racks.clear()


def _number(numbers: dict[str, int], name: str) -> int:
    return numbers.setdefault(name, len(numbers))


def _key(flow: FlowSummary) -> Key:
    return flow.source, flow.destination, flow.source_port, flow.destination_port, flow.protocol


@lru_cache(maxsize=65_536)
def rack_of(address: str, prefix: int, prefix6: int) -> str:
    """The network that an address shares with the hosts of its rack; empty if it is no address."""
    try:
        version = ipaddress.ip_address(address).version
        return str(ipaddress.ip_network(f"{address}/{prefix if version == 4 else prefix6}", strict=False))
    except ValueError:
        return ""
