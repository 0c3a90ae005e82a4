"""From reads of the flow table to what happened between them: finished flows, long flows, summaries for central.

Pure functions on numpy columns, called once per report interval by the agent. A flow has finished when it sent a FIN
or RST, or was silent for the idle timeout; its size is its attained service then. It is told to central once, by the
first read after its end, unless a rule excludes it. In the kernel's table an ended flow stays for a while: its last
bytes may have to be sent again, and must not look like a flow of unknown age. Nothing in the kernel is cleared on read,
so a long flow never returns to the top.
"""

import ipaddress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fabricpilot.histogram import LogHistogram
from fabricpilot.wire import MAX_FINISHED_SAMPLE, MAX_LONG_FLOWS, FlowSummary
from hostagent.datapath.base import FLAG_ENDED, FLAG_SAW_START, FlowTable
from hostagent.datapath.rules import excluded

_V4_MAPPED = bytes(10) + b"\xff\xff"
_NS_PER_US = 1000

# How long an ended flow stays in the table: longer than TCP goes on trying at datacenter retransmission timeouts.
LINGER_S = 5.0


@dataclass(frozen=True)
class Observation:
    """One read of the flow table, sorted into what finished, what is long and the rest.

    Attributes:
        finished: indices (shape (n,)) of flows that ended or went idle since the read before this one.
        leaving: indices of flows to forget: gone idle, or ended long enough ago.
        long: indices of the active flows beyond the last threshold, the largest first.
        active: how many flows go on.
    """

    table: FlowTable
    finished: npt.NDArray[np.intp]
    leaving: npt.NDArray[np.intp]
    long: npt.NDArray[np.intp]
    active: int

    @property
    def leaving_keys(self) -> npt.NDArray[np.void]:
        """Keys of the flows for the data path to forget."""
        return self.table.keys[self.leaving]

    def sizes(self) -> LogHistogram:
        """Sizes of the measured flows, bytes."""
        return LogHistogram.of(self._measured_states()["attained_bytes"])

    def durations(self) -> LogHistogram:
        """Durations of the measured flows, first to last packet, microseconds."""
        states = self._measured_states()
        return LogHistogram.of((states["last_seen_ns"] - states["first_seen_ns"]) // _NS_PER_US)

    def finished_sample(self, rng: np.random.Generator) -> list[FlowSummary]:
        """At most `MAX_FINISHED_SAMPLE` measured flows, drawn without preference."""
        rows = self._measured()
        if len(rows) > MAX_FINISHED_SAMPLE:
            rows = np.sort(rng.choice(rows, MAX_FINISHED_SAMPLE, replace=False))
        return [summary(self.table, row) for row in rows]

    def long_flows(self) -> list[FlowSummary]:
        """The `MAX_LONG_FLOWS` largest long flows."""
        return [summary(self.table, row) for row in self.long[:MAX_LONG_FLOWS]]

    def finished_count(self) -> int:
        """How many flows were measured from their start to their end, and carried payload."""
        return len(self._measured())

    def _measured(self) -> npt.NDArray[np.intp]:
        """Finished flows whose size is known: they carried payload, and their start was seen."""
        states = self.table.states[self.finished]
        known: npt.NDArray[np.bool_] = (states["attained_bytes"] > 0) & ((states["flags"] & FLAG_SAW_START) != 0)
        return self.finished[known]

    def _measured_states(self) -> npt.NDArray[np.void]:
        return self.table.states[self._measured()]


def observe(
    table: FlowTable, last_threshold_bytes: int, idle_timeout_s: float, previous_read_ns: int = 0
) -> Observation:
    """Sort a read of the flow table.

    Args:
        table: the read.
        last_threshold_bytes: beyond it a flow is long.
        idle_timeout_s: silence after which a flow counts as finished.
        previous_read_ns: `read_at_ns` of the read before this one; what had ended then was told then.
    """
    states = table.states
    last_seen_ns = states["last_seen_ns"]
    # A packet can be stamped after the clock was read for this snapshot: that is no silence, and an end stamped so
    # belongs to the next read.
    silent_s = (table.read_at_ns - np.minimum(last_seen_ns, table.read_at_ns).astype(np.int64)) / 1e9
    ended = (states["flags"] & FLAG_ENDED) != 0
    idle = ~ended & (silent_s > idle_timeout_s)
    just_ended = ended & (last_seen_ns > previous_read_ns) & (last_seen_ns <= table.read_at_ns)
    reported = ~excluded(states)
    going = ~ended & ~idle & reported
    long = np.flatnonzero(going & (states["attained_bytes"] >= last_threshold_bytes))
    largest_first = long[np.argsort(states["attained_bytes"][long])[::-1]]
    return Observation(
        table=table,
        finished=np.flatnonzero((just_ended | idle) & reported),
        leaving=np.flatnonzero((ended & (silent_s > LINGER_S)) | idle),
        long=largest_first,
        active=int(going.sum()),
    )


def summary(table: FlowTable, row: int | np.intp) -> FlowSummary:
    """One flow as it travels on the wire and as `agent dump` shows it."""
    key, state = table.keys[row], table.states[row]
    return FlowSummary(
        source=address(key["source"].tobytes()),
        destination=address(key["destination"].tobytes()),
        source_port=int(key["source_port"]),
        destination_port=int(key["destination_port"]),
        protocol=int(key["protocol"]),
        size_bytes=int(state["attained_bytes"]),
        duration_us=max(0, int(state["last_seen_ns"]) - int(state["first_seen_ns"])) // _NS_PER_US,
        level=int(state["level"]),
        route=int(state["route"]),
    )


def address(raw: bytes) -> str:
    """A 16-byte address as text; IPv4-mapped ones in dotted form."""
    if raw[:12] == _V4_MAPPED:
        return str(ipaddress.IPv4Address(raw[12:]))
    return str(ipaddress.IPv6Address(raw))
