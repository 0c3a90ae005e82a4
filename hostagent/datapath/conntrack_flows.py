"""What the kernel knows about flows without BPF, as numpy columns: conntrack's entries and our sets' elements.

    connections(dump)       one row per connection: both directions' 5-tuples and counters, start, TCP state
    senders(dump, ...)      one row per flow that left a scheduled interface: conntrack id, when it last sent
    flow_table(...)         the two joined: one row per flow

A connection is two flows, one per direction; those whose packets left a scheduled interface are in the set of their
direction. A flow's key is what the packets look like on the wire: the other direction's tuple turned around, so that
address translation does not matter. Times of conntrack are of the wall clock; `realtime_offset_ns` turns them.
"""

import time
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from hostagent.datapath.base import FLAG_ENDED, FLAG_SAW_START, FLOW_KEY_DTYPE, FLOW_STATE_DTYPE
from hostagent.datapath.netlink_dump import (
    ATTRIBUTE_HEADER_BYTES,
    MESSAGE_HEADER_BYTES,
    NetfilterDump,
    Shape,
    attribute,
    nested,
    shapes,
)
from hostagent.datapath.nft_rules import DIRECTIONS
from hostagent.datapath.payload_estimate import TCP, UDP, payload_bytes

# linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h, nf_tables.h, nf_conntrack_tcp.h
_CONNTRACK, _CT_GET, _CT_GET_STATISTICS = 1, 1, 4
_NFTABLES, _GET_SET_ELEMENTS = 10, 13
_NFPROTO_INET = 1
_TUPLE: Final = (1, 2)  # by direction, like all pairs below
_ADDRESSES: Final = {False: ((1, 1), (1, 2), 4), True: ((1, 3), (1, 4), 16)}  # by IPv6: source, destination, bytes
_PROTOCOL: Final = (2, 1)
_PORTS: Final = ((2, 2), (2, 3))
_COUNTERS: Final = (9, 10)
_PACKETS, _BYTES = 1, 2
_ID: Final = (12,)
_START: Final = (20, 1)
_TCP_STATE: Final = (4, 1, 1)
_TCP_FLAGS: Final = ((4, 1, 4), (4, 1, 5))
_FIN_WAIT, _CLOSE_WAIT, _LAST_ACK, _TIME_WAIT, _CLOSE = 4, 5, 6, 7, 8
_CLOSE_INIT, _BE_LIBERAL = 0x04, 0x08
_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS = 1, 2, 3
_ELEMENT_KEY: Final = (1, 1)
_ELEMENT_TIMEOUT: Final = (4,)
_ELEMENT_EXPIRATION: Final = (5,)

_NS_PER_MS: Final = 1_000_000

# One direction of a connection.
_SIDE_DTYPE: Final = np.dtype(
    [("key", FLOW_KEY_DTYPE), ("packets", "<u8"), ("ip_bytes", "<u8"), ("ended", "?"), ("payload_bytes", "<u8")]
)
CONNECTION_DTYPE: Final = np.dtype(
    [
        ("id", "<u4"),
        ("start_realtime_ns", "<i8"),  # 0: older than timestamps
        ("saw_start", "?"),
        ("sides", _SIDE_DTYPE, 2),
    ]
)
SENDER_DTYPE: Final = np.dtype([("id", "<u4"), ("last_sent_ns", "<i8")])

Rows = npt.NDArray[np.void]


@dataclass(frozen=True)
class Flows:
    """Flows as columns; `codes` (id << 1 | direction) names each for as long as conntrack knows it."""

    codes: npt.NDArray[np.uint64]
    keys: Rows  # FLOW_KEY_DTYPE
    states: Rows  # FLOW_STATE_DTYPE; `level` is not filled
    ip_bytes: npt.NDArray[np.uint64]  # what the rules compare with thresholds

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, rows: npt.NDArray[np.bool_] | slice) -> "Flows":
        """Some of them."""
        return Flows(self.codes[rows], self.keys[rows], self.states[rows], self.ip_bytes[rows])

    def and_also(self, other: "Flows") -> "Flows":
        """These, then those."""
        pairs = zip(self._columns(), other._columns(), strict=True)
        return Flows(*(np.concatenate(pair) for pair in pairs))

    def _columns(self) -> tuple[npt.NDArray[Any], ...]:
        return self.codes, self.keys, self.states, self.ip_bytes


NO_FLOWS: Final = Flows(
    np.zeros(0, np.uint64), np.zeros(0, FLOW_KEY_DTYPE), np.zeros(0, FLOW_STATE_DTYPE), np.zeros(0, np.uint64)
)


def load_conntrack(dump: NetfilterDump) -> None:
    """Have the kernel load conntrack and its netlink interface, without starting to track.

    Raises:
        OSError: it has none, or it may not be used.
    """
    dump.read(_CONNTRACK, _CT_GET_STATISTICS)


def connections(dump: NetfilterDump) -> Rows:
    """All TCP and UDP connections that conntrack tracks, CONNECTION_DTYPE, one row per id, sorted by it.

    Raises:
        OSError: conntrack or its netlink interface is not there, or may not be read.
    """
    entries = dump.read(_CONNTRACK, _CT_GET)
    parts = [np.zeros(0, CONNECTION_DTYPE)]
    for shape in shapes(entries, MESSAGE_HEADER_BYTES):
        if _has_ports(shape):
            parts.append(_connections(shape))
    rows = np.concatenate(parts)
    return rows[np.unique(rows["id"], return_index=True)[1]]


def senders(dump: NetfilterDump, table: str, direction: str, now_ns: int) -> Rows:
    """Flows of one direction that left a scheduled interface, SENDER_DTYPE, sorted by id.

    Args:
        dump: where to read.
        table: name of our table.
        direction: one of `DIRECTIONS`.
        now_ns: CLOCK_MONOTONIC, against which the remaining times of elements are turned into times.

    Raises:
        OSError: ENOENT: there is no such table.
    """
    name = f"sent_{direction}"
    wanted = attribute(_LIST_TABLE, table.encode() + b"\0") + attribute(_LIST_SET, name.encode() + b"\0")
    elements = nested(dump.read(_NFTABLES, _GET_SET_ELEMENTS, _NFPROTO_INET, wanted), (_LIST_ELEMENTS,))
    parts = [np.zeros(0, SENDER_DTYPE)]
    for shape in shapes(elements, ATTRIBUTE_HEADER_BYTES, frozenset({_ELEMENT_KEY[:1]})):
        rows = np.zeros(len(shape.rows), SENDER_DTYPE)
        rows["id"] = shape.number(_ELEMENT_KEY, 4)
        age_ms = shape.number(_ELEMENT_TIMEOUT, 8) - shape.number(_ELEMENT_EXPIRATION, 8)
        rows["last_sent_ns"] = now_ns - age_ms.astype(np.int64) * _NS_PER_MS
        parts.append(rows)
    found = np.concatenate(parts)
    return found[np.unique(found["id"], return_index=True)[1]]


def flow_table(known: Rows, sent: tuple[Rows, Rows], realtime_offset_ns: int, since_ns: int) -> Flows:
    """Join connections with the flows that left a scheduled interface.

    Args:
        known: from `connections`.
        sent: from `senders`, per direction.
        realtime_offset_ns: what the wall clock is ahead of CLOCK_MONOTONIC.
        since_ns: first_seen_ns of connections older than conntrack's timestamps.
    """
    parts = []
    for side in range(len(DIRECTIONS)):
        _, rows, senders_rows = np.intersect1d(known["id"], sent[side]["id"], assume_unique=True, return_indices=True)
        chosen, flow = known[rows], known["sides"][rows, side]
        states = np.zeros(len(rows), FLOW_STATE_DTYPE)
        states["attained_bytes"] = flow["payload_bytes"]
        states["packets"] = flow["packets"]
        start = chosen["start_realtime_ns"]
        states["first_seen_ns"] = np.where(start > 0, np.maximum(start - realtime_offset_ns, 0), since_ns)
        # The set's clock ticks every 1 to 10 ms.
        states["last_seen_ns"] = np.maximum(sent[side]["last_sent_ns"][senders_rows], states["first_seen_ns"])
        states["flags"] = FLAG_ENDED * flow["ended"] | FLAG_SAW_START * chosen["saw_start"]
        codes = chosen["id"].astype(np.uint64) << np.uint64(1) | np.uint64(side)
        parts.append(Flows(codes, flow["key"], states, flow["ip_bytes"]))
    return parts[0].and_also(parts[1])


def contained(values: npt.NDArray[Any], among: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which of `values` are in `among`; a tenth of what np.isin takes where both come nearly sorted."""
    if len(among) == 0:
        return np.zeros(len(values), np.bool_)
    ordered = np.sort(among)
    found: npt.NDArray[np.bool_] = ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values
    return found


def realtime_offset_ns() -> int:
    """How far the wall clock is ahead of CLOCK_MONOTONIC now."""
    return time.time_ns() - time.monotonic_ns()


def _has_ports(shape: Shape) -> bool:
    return all((side, *port) in shape for side in _TUPLE for port in _PORTS)


def _connections(shape: Shape) -> Rows:
    first = (_TUPLE[0], *_ADDRESSES[True][0])
    ipv6 = first in shape
    rows = np.zeros(len(shape.rows), CONNECTION_DTYPE)
    protocol = shape.octets((_TUPLE[0], *_PROTOCOL), 1)[:, 0]
    rows["id"] = shape.number(_ID, 4)  # what `ct id` is in the rules
    if _START in shape:
        rows["start_realtime_ns"] = shape.number(_START, 8).astype(np.int64)
    rows["saw_start"] = _saw_start(shape, protocol)
    for side in range(len(DIRECTIONS)):
        flow = rows["sides"][:, side]
        _fill_key(flow["key"], shape, _TUPLE[1 - side], protocol, ipv6)
        if (_COUNTERS[side], _PACKETS) in shape:
            flow["packets"] = shape.number((_COUNTERS[side], _PACKETS), 8)
            flow["ip_bytes"] = shape.number((_COUNTERS[side], _BYTES), 8)
        else:
            rows["saw_start"] = False  # older than accounting
        flow["ended"] = _ended(shape, side)
        flow["payload_bytes"] = payload_bytes(
            flow["ip_bytes"], flow["packets"], protocol, np.full(len(rows), ipv6), rows["saw_start"]
        )
    kept: Rows = rows[(protocol == TCP) | (protocol == UDP)]
    return kept


def _fill_key(keys: Rows, shape: Shape, turned: int, protocol: npt.NDArray[np.uint8], ipv6: bool) -> None:
    """Keys of one direction on the wire, from the tuple of the other one."""
    their_source, their_destination, width = _ADDRESSES[ipv6]
    for name, path in (("source", their_destination), ("destination", their_source)):
        keys[name][:, 16 - width :] = shape.octets((turned, *path), width)
        if not ipv6:
            keys[name][:, 10:12] = 0xFF
    keys["source_port"] = shape.number((turned, *_PORTS[1]), 2)
    keys["destination_port"] = shape.number((turned, *_PORTS[0]), 2)
    keys["protocol"] = protocol


def _saw_start(shape: Shape, protocol: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Whether the connection was tracked from its start: conntrack is liberal with those it found in mid-life."""
    if _TCP_FLAGS[0] not in shape:
        return np.equal(protocol, UDP)
    saw_start: npt.NDArray[np.bool_] = shape.octets(_TCP_FLAGS[0], 1)[:, 0] & _BE_LIBERAL == 0
    return saw_start


def _ended(shape: Shape, side: int) -> npt.NDArray[np.bool_]:
    """Whether this direction has sent its FIN, or either a RST."""
    if _TCP_STATE not in shape or _TCP_FLAGS[side] not in shape:
        return np.zeros(len(shape.rows), np.bool_)
    state = shape.octets(_TCP_STATE, 1)[:, 0]
    closed_first = shape.octets(_TCP_FLAGS[side], 1)[:, 0] & _CLOSE_INIT != 0
    ended: npt.NDArray[np.bool_] = np.isin(state, (_LAST_ACK, _TIME_WAIT, _CLOSE))
    ended |= closed_first & np.isin(state, (_FIN_WAIT, _CLOSE_WAIT))
    return ended
