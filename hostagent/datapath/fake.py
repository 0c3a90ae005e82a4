"""A data path without a kernel: the same rules in plain Python, for tests without root and for trying the link.

Nothing arrives by itself; whoever has it calls `send` for every packet and gets back what the egress program would have
written. One suite of tests (tests/kernel/test_datapath_contract.py, tests/unit/hostagent/test_datapath_fake.py) runs
over this and over the kernel, so the two cannot drift apart.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fabricpilot.levels import MAX_LEVELS
from hostagent.datapath.base import (
    FLAG_ENDED,
    FLAG_SAW_START,
    FLOW_KEY_DTYPE,
    FLOW_STATE_DTYPE,
    FlowTable,
    Settings,
)
from hostagent.datapath.layout import counter_names

_TCP = 6


@dataclass(frozen=True)
class Tag:
    """What a packet left with: the level it travels on, DSCP and skb->priority (None: left as it was)."""

    level: int
    dscp: int
    priority: int | None


@dataclass(frozen=True)
class _Packet:
    key: bytes
    payload_bytes: int
    segments: int
    tcp: bool = False
    syn: bool = False
    fin: bool = False
    rst: bool = False


class FakeDatapath:
    """The `Datapath` in memory.

    Args:
        flow_entries: size of the flow table; the least recently used entry makes room.
    """

    name = "fake"
    capabilities = frozenset({"exact_payload", "segments", "evict", "forget"})

    def __init__(self, flow_entries: int = 131_072) -> None:
        self._flow_entries = flow_entries
        self._settings: Settings | None = None
        self._interfaces: set[str] = set()
        self._flows: OrderedDict[bytes, npt.NDArray[np.void]] = OrderedDict()  # least recently used first
        self._counted: Counter[str] = Counter()

    def attach(self, interface: str) -> bool:
        """See `Datapath.attach`."""
        if interface in self._interfaces:
            return False
        self._interfaces.add(interface)
        return True

    def attached(self) -> list[str]:
        """See `Datapath.attached`."""
        return sorted(self._interfaces)

    def release(self, interfaces: Collection[str]) -> None:
        """See `Datapath.release`."""
        self._interfaces.difference_update(interfaces)

    def claim(self) -> None:
        """See `Datapath.claim`; nobody else can see this one."""

    def detach(self) -> None:
        """See `Datapath.detach`."""
        self._interfaces.clear()
        self._flows.clear()
        self._counted.clear()
        self._settings = None

    def apply(self, settings: Settings) -> None:
        """See `Datapath.apply`."""
        self._settings = settings

    def settings(self) -> Settings | None:
        """See `Datapath.settings`."""
        return self._settings

    def flows(self) -> FlowTable:
        """See `Datapath.flows`."""
        keys = np.frombuffer(b"".join(self._flows), FLOW_KEY_DTYPE)
        states = np.array([state.item() for state in self._flows.values()], FLOW_STATE_DTYPE)
        return FlowTable(keys, states, time.monotonic_ns())

    def forget(self, keys: npt.NDArray[np.void]) -> int:
        """See `Datapath.forget`."""
        forgotten = sum(self._flows.pop(key.tobytes(), None) is not None for key in keys)
        self._counted["flows_forgotten"] += forgotten
        return forgotten

    def counters(self) -> dict[str, int]:
        """See `Datapath.counters`."""
        levels = self._settings.thresholds.levels if self._settings else MAX_LEVELS
        return {name: self._counted[name] for name in counter_names(levels)}

    def close(self) -> None:
        """See `Datapath.close`."""

    def send(
        self,
        key: npt.NDArray[np.void],
        payload_bytes: int = 0,
        *,
        syn: bool = False,
        fin: bool = False,
        rst: bool = False,
        segments: int = 1,
        dscp: int = 0,
    ) -> Tag:
        """One packet leaves; returns what it left with.

        Args:
            key: its flow, one FLOW_KEY_DTYPE record.
            payload_bytes: payload of all GSO segments together.
            syn: TCP flags of that name; ignored for UDP, as are the next two.
            fin: see above.
            rst: see above.
            segments: how many packets a GSO packet stands for.
            dscp: what the packet carries before.
        """
        packet = _Packet(key.tobytes(), payload_bytes, segments)
        if int(key["protocol"]) == _TCP:
            packet = _Packet(key.tobytes(), payload_bytes, segments, tcp=True, syn=syn, fin=fin, rst=rst)
        level = self._account(packet)
        return self._mark(level, dscp, payload_bytes, segments)

    def _account(self, packet: "_Packet") -> int:
        flow = self._flows.get(packet.key)
        if flow is None:
            if packet.payload_bytes == 0 and (not packet.syn or packet.rst):
                return 0
            flow = self._insert(packet.key, saw_start=packet.syn or not packet.tcp)
        elif packet.syn and (flow["attained_bytes"] or int(flow["flags"]) & FLAG_ENDED):
            self._counted["flows_restarted"] += 1
            self._counted["restarted_bytes"] += int(flow["attained_bytes"])
            flow = self._flows[packet.key] = _fresh(saw_start=True)
        self._flows.move_to_end(packet.key)
        if not int(flow["flags"]) & FLAG_ENDED:
            flow["last_seen_ns"] = time.monotonic_ns()
            if packet.fin or packet.rst:
                flow["flags"] |= FLAG_ENDED
        flow["packets"] += packet.segments
        if packet.payload_bytes == 0:
            return 0
        attained_bytes = int(flow["attained_bytes"])
        flow["attained_bytes"] += packet.payload_bytes
        flow["level"] = self._level(attained_bytes, saw_start=bool(int(flow["flags"]) & FLAG_SAW_START))
        return int(flow["level"])

    def _level(self, attained_bytes: int, saw_start: bool) -> int:
        if self._settings is None:
            return 0
        thresholds = self._settings.thresholds
        return thresholds.level_of(attained_bytes) if saw_start else thresholds.levels - 1

    def _insert(self, key: bytes, saw_start: bool) -> npt.NDArray[np.void]:
        if len(self._flows) >= self._flow_entries:
            self._flows.popitem(last=False)
            self._counted["flows_evicted"] += 1
        self._counted["flows_inserted"] += 1
        self._counted["flows_midlife"] += not saw_start
        flow = self._flows[key] = _fresh(saw_start)
        return flow

    def _mark(self, level: int, dscp: int, payload_bytes: int, segments: int) -> Tag:
        settings = self._settings
        if settings is None:
            self._counted["untagged"] += segments
            return Tag(level, dscp, None)
        if settings.respect_dscp and dscp not in (0, *settings.dscp):
            self._counted["foreign_dscp"] += segments
            return Tag(level, dscp, None)
        self._counted[f"packets_level_{level}"] += segments
        self._counted[f"bytes_level_{level}"] += payload_bytes
        if settings.observe:
            self._counted["observed"] += segments
            return Tag(level, dscp, None)
        return Tag(level, settings.dscp[level], settings.priority[level])


def _fresh(saw_start: bool) -> npt.NDArray[np.void]:
    flow = np.zeros((), FLOW_STATE_DTYPE)
    flow["first_seen_ns"] = flow["last_seen_ns"] = time.monotonic_ns()
    flow["flags"] = FLAG_SAW_START if saw_start else 0
    return flow
