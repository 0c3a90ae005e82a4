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

from fabricpilot.histogram import bin_of
from fabricpilot.levels import MAX_LEVELS
from hostagent.datapath.base import (
    FLAG_ENDED,
    FLAG_SAW_MESSAGE,
    FLAG_SAW_START,
    FLAG_TURN,
    FLOW_KEY_DTYPE,
    FLOW_STATE_DTYPE,
    FinishedMessages,
    FlowTable,
    Settings,
    SocketRule,
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
    repeated: bool = False


class FakeDatapath:
    """The `Datapath` in memory.

    Args:
        flow_entries: size of the flow table; the least recently used entry makes room.
    """

    name = "fake"
    capabilities = frozenset({"exact_payload", "segments", "evict", "forget", "messages"})

    def __init__(self, flow_entries: int = 131_072) -> None:
        self._flow_entries = flow_entries
        self._settings: Settings | None = None
        self._interfaces: set[str] = set()
        self._flows: OrderedDict[bytes, npt.NDArray[np.void]] = OrderedDict()  # least recently used first
        self._counted: Counter[str] = Counter()
        self._finished = FinishedMessages.none()

    def attach(self, interface: str) -> bool:
        """See `Datapath.attach`."""
        if interface in self._interfaces:
            return False
        self._interfaces.add(interface)
        return True

    def attached(self) -> list[str]:
        """See `Datapath.attached`."""
        return sorted(self._interfaces)

    def attached_by(self, interfaces: Collection[str]) -> dict[str, list[str]]:
        """See `Datapath.attached_by`."""
        return {"nothing": list(interfaces)}

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
        self._finished = FinishedMessages.none()
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

    def finished_messages(self) -> FinishedMessages:
        """See `Datapath.finished_messages`."""
        return FinishedMessages(self._finished.sizes.copy(), self._finished.durations.copy())

    def serve_sockets(self, rule: SocketRule) -> None:
        """See `Datapath.serve_sockets`: there is nothing it could do."""

    def sees_backlog(self) -> bool:
        """See `Datapath.sees_backlog`: here are no sockets."""
        return False

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
        repeated: bool = False,
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
            repeated: TCP: its bytes were sent before.
        """
        packet = _Packet(key.tobytes(), payload_bytes, segments)
        if int(key["protocol"]) == _TCP:
            packet = _Packet(key.tobytes(), payload_bytes, segments, True, syn, fin, rst, repeated)
        level = self._account(packet)
        return self._mark(level, dscp, payload_bytes, segments)

    def _account(self, packet: "_Packet") -> int:
        flow = self._flows.get(packet.key)
        if flow is None:
            if packet.payload_bytes == 0 and (not packet.syn or packet.rst):
                self._counted["flowless"] += packet.segments
                return 0
            flow = self._insert(packet.key, saw_start=packet.syn or not packet.tcp)
        elif packet.syn and (flow["attained_bytes"] or flow["earlier_bytes"] or int(flow["flags"]) & FLAG_ENDED):
            self._counted["flows_restarted"] += 1
            self._counted["restarted_bytes"] += int(flow["attained_bytes"]) + int(flow["earlier_bytes"])
            self._record_message(flow)
            flow = self._flows[packet.key] = _fresh(saw_start=True)
        self._flows.move_to_end(packet.key)
        now_ns = time.monotonic_ns()
        if not int(flow["flags"]) & FLAG_ENDED:
            flow["last_seen_ns"] = now_ns
            if packet.fin or packet.rst:
                flow["flags"] |= FLAG_ENDED
        flow["packets"] += packet.segments
        if packet.payload_bytes == 0:
            return 0
        self._after_silence(flow, now_ns, packet.repeated and packet.tcp)
        flow["last_data_ns"] = now_ns
        attained_bytes = int(flow["attained_bytes"])
        flow["attained_bytes"] += packet.payload_bytes
        flow["level"] = level = self._level(attained_bytes, known=bool(int(flow["flags"]) & FLAG_SAW_MESSAGE))
        if int(flow["flags"]) & FLAG_TURN:
            if attained_bytes < flow["turn_ends_bytes"]:
                return 0
            flow["flags"] = int(flow["flags"]) & ~FLAG_TURN
        return level

    def _level(self, attained_bytes: int, known: bool) -> int:
        if self._settings is None:
            return 0
        thresholds = self._settings.thresholds
        return thresholds.level_of(attained_bytes) if known else thresholds.levels - 1

    def _after_silence(self, flow: npt.NDArray[np.void], now_ns: int, repeated: bool) -> None:
        if self._settings is None or int(flow["flags"]) & FLAG_ENDED:
            return
        rule, silent_ns = self._settings.messages, now_ns - int(flow["last_data_ns"])
        draw = int(flow["first_seen_ns"]) >> 10 & 0xFF
        if silent_ns >= rule.blind_gap_ns and not repeated:
            duration_ns = max(0, int(flow["last_data_ns"]) - int(flow["message_began_ns"]))
            self._record_message(flow)
            if int(flow["flags"]) & FLAG_SAW_MESSAGE:
                flow["last_message_bytes"], flow["last_message_ns"] = flow["attained_bytes"], duration_ns
            flow["earlier_bytes"] += flow["attained_bytes"]
            flow["attained_bytes"], flow["message_began_ns"] = 0, now_ns
            flow["flags"] = (int(flow["flags"]) | FLAG_SAW_MESSAGE) & ~FLAG_TURN
        elif rule.starved_ns and silent_ns >= rule.starved_ns + (rule.starved_ns >> 8) * draw:
            self._counted["turns"] += 1
            flow["turn_ends_bytes"] = flow["attained_bytes"] + rule.turn_bytes
            flow["flags"] |= FLAG_TURN

    def _record_message(self, flow: npt.NDArray[np.void]) -> None:
        if not flow["attained_bytes"] or not int(flow["flags"]) & FLAG_SAW_MESSAGE:
            return
        self._counted["messages_finished"] += 1
        duration_ns = max(0, int(flow["last_data_ns"]) - int(flow["message_began_ns"]))
        self._finished.sizes[bin_of(int(flow["attained_bytes"]))] += 1
        self._finished.durations[bin_of(duration_ns // 1000)] += 1

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
    for field in ("first_seen_ns", "last_seen_ns", "last_data_ns", "message_began_ns"):
        flow[field] = time.monotonic_ns() if field == "first_seen_ns" else flow["first_seen_ns"]
    flow["flags"] = FLAG_SAW_START | FLAG_SAW_MESSAGE if saw_start else 0
    return flow
