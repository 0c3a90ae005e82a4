"""From reads of the flow table to what happened between them: finished messages, long flows, summaries for central.

Pure functions on numpy columns, called once per report interval by the agent. What has a size is a message; one whose
start was not seen has none to tell. It is told to central once, unless a rule excludes it, when it has finished:

- Another one of its flow followed. The kernel counts those in histograms and keeps the latest of a flow in its entry.
- Its flow sent a FIN or RST. In the kernel's table an ended flow stays for a while: its last bytes may have to be sent
  again, and must not look like a flow of unknown age.
- Its flow was silent for so long that it is forgotten: the idle timeout for UDP, ten times that for a TCP connection
  that has sent payload, which is no longer counted as active after the first, but shall be known when it goes on.

Nothing in the kernel is cleared on read, so a long flow never returns to the top.
"""

import ipaddress
from dataclasses import dataclass
from functools import lru_cache

import msgspec
import numpy as np
import numpy.typing as npt

from fabricpilot.histogram import LogHistogram
from fabricpilot.wire import MAX_FINISHED_SAMPLE, MAX_LONG_FLOWS, FlowSummary
from hostagent.datapath.base import FLAG_ENDED, FLAG_SAW_MESSAGE, FLAG_SAW_START, FLAG_TOLD, FinishedMessages, FlowTable
from hostagent.datapath.rules import excluded

_V4_MAPPED = bytes(10) + b"\xff\xff"
_NS_PER_US = 1000
_TCP = 6
_TCP_PATIENCE = 10  # idle timeouts for which a silent TCP connection that has sent payload stays in the table

# How long an ended flow stays in the table: longer than TCP goes on trying at datacenter retransmission timeouts.
LINGER_S = 5.0

_MAX_FURTHER = 4 * MAX_LONG_FLOWS  # long flows told of at each report beyond those in it, if central follows them


@dataclass(frozen=True)
class Observation:
    """One read of the flow table, sorted into what finished, what is long and the rest.

    Attributes:
        finished: indices (shape (n,)) of flows that ended since the read before this one, or leave for their silence.
        leaving: indices of flows to forget: silent, or ended long enough ago.
        followed: indices of flows whose message before the current one finished since the read before this one.
        long: indices of the active flows beyond the last threshold, by what they have sent or by what is known to
            be written; those that have sent most first.
        active: how many flows go on.
        messages: finished messages that were followed by another since the read before this one.
    """

    table: FlowTable
    finished: npt.NDArray[np.intp]
    leaving: npt.NDArray[np.intp]
    followed: npt.NDArray[np.intp]
    long: npt.NDArray[np.intp]
    active: int
    messages: FinishedMessages

    @property
    def leaving_keys(self) -> npt.NDArray[np.void]:
        """Keys of the flows for the data path to forget."""
        return self.table.keys[self.leaving]

    def sizes(self) -> LogHistogram:
        """Sizes of the finished messages, bytes."""
        sizes = LogHistogram.of(self.table.states["attained_bytes"][self._measured()])
        sizes.add(LogHistogram(self.messages.sizes))
        return sizes

    def durations(self) -> LogHistogram:
        """Durations of the finished messages, first to last packet, microseconds."""
        durations = LogHistogram.of(_duration_ns(self.table.states[self._measured()]) // _NS_PER_US)
        durations.add(LogHistogram(self.messages.durations))
        return durations

    def finished_sample(self, rng: np.random.Generator) -> list[FlowSummary]:
        """At most `MAX_FINISHED_SAMPLE` finished messages, drawn without preference; at most two of one flow."""
        measured = self._measured()
        choice = np.arange(len(measured) + len(self.followed))
        if len(choice) > MAX_FINISHED_SAMPLE:
            choice = np.sort(rng.choice(choice, MAX_FINISHED_SAMPLE, replace=False))
        last, before = choice[choice < len(measured)], choice[choice >= len(measured)] - len(measured)
        told = [summary(self.table, row) for row in measured[last]]
        return told + [summary_of_message_before(self.table, row) for row in self.followed[before]]

    def long_flows(self) -> list[FlowSummary]:
        """The `MAX_LONG_FLOWS` largest long flows."""
        return summaries(self.table, self.long[:MAX_LONG_FLOWS])

    def finished_count(self) -> int:
        """How many messages of known size finished."""
        return len(self._measured()) + int(self.messages.sizes.sum())

    def _measured(self) -> npt.NDArray[np.intp]:
        """Finished flows whose last message has a size: it carried payload, and its start was seen."""
        states = self.table.states[self.finished]
        known = states["flags"] & (FLAG_SAW_START | FLAG_SAW_MESSAGE) != 0
        measured: npt.NDArray[np.intp] = self.finished[(states["attained_bytes"] > 0) & known]
        return measured


def observe(
    table: FlowTable,
    last_threshold_bytes: int,
    idle_timeout_s: float,
    previous_read_ns: int = 0,
    messages: FinishedMessages | None = None,
) -> Observation:
    """Sort a read of the flow table.

    Args:
        table: the read.
        last_threshold_bytes: beyond it a flow is long.
        idle_timeout_s: silence after which a flow no longer counts as active, and a UDP flow as finished.
        previous_read_ns: `read_at_ns` of the read before this one; what had ended then was told then.
        messages: finished messages that were followed by another since then; None: there were none.
    """
    states = table.states
    last_seen_ns = states["last_seen_ns"]
    # A packet can be stamped after the clock was read for this snapshot: that is no silence, and an end stamped so
    # belongs to the next read.
    silent_s = (table.read_at_ns - np.minimum(last_seen_ns, table.read_at_ns).astype(np.int64)) / 1e9
    ended = (states["flags"] & FLAG_ENDED) != 0
    connected = (table.keys["protocol"] == _TCP) & (states["attained_bytes"] + states["earlier_bytes"] > 0)
    patience = np.where(connected, _TCP_PATIENCE, 1)
    given_up = ~ended & (silent_s > patience * idle_timeout_s)
    just_ended = ended & (last_seen_ns > previous_read_ns) & (last_seen_ns <= table.read_at_ns)
    reported = ~excluded(states)
    going = ~ended & (silent_s <= idle_timeout_s) & reported
    followed = (states["last_message_bytes"] > 0) & (states["message_began_ns"] > previous_read_ns) & reported
    sent_enough = states["attained_bytes"] >= last_threshold_bytes
    long = np.flatnonzero(going & (sent_enough | (states["flags"] & FLAG_TOLD != 0)))
    largest_first = long[np.argsort(states["attained_bytes"][long])[::-1]]
    return Observation(
        table=table,
        finished=np.flatnonzero((just_ended | given_up) & reported),
        leaving=np.flatnonzero((ended & (silent_s > LINGER_S)) | given_up),
        followed=np.flatnonzero(followed & (states["message_began_ns"] <= table.read_at_ns)),
        long=largest_first,
        active=int(going.sum()),
        messages=messages or FinishedMessages.none(),
    )


def _duration_ns(states: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    """First to last packet of the current messages. A FIN that comes later says nothing of how long they took.

    A data path that does not tell messages apart leaves their times 0: the flow is one.
    """
    whole = states["message_began_ns"] == 0
    began = np.where(whole, states["first_seen_ns"], states["message_began_ns"]).astype(np.int64)
    ended = np.where(whole, states["last_seen_ns"], states["last_data_ns"]).astype(np.int64)
    duration: npt.NDArray[np.int64] = np.maximum(ended - began, 0)
    return duration


def further_long_flows(seen: Observation, turn: int) -> list[npt.NDArray[np.intp]]:
    """Rows of long flows that a report has no room for, in parts of `MAX_LONG_FLOWS`; others each turn if too many."""
    further = seen.long[MAX_LONG_FLOWS:]
    if len(further) > _MAX_FURTHER:
        further = np.roll(further, -turn * _MAX_FURTHER)[:_MAX_FURTHER]
    return [further[begin : begin + MAX_LONG_FLOWS] for begin in range(0, len(further), MAX_LONG_FLOWS)]


def summary(table: FlowTable, row: int | np.intp) -> FlowSummary:
    """A flow, its size and duration those of its current message, as on the wire and as `agent dump` shows it."""
    return summaries(table, np.array([row], np.intp))[0]


def summaries(table: FlowTable, rows: npt.NDArray[np.intp]) -> list[FlowSummary]:
    """As `summary`, for many."""
    keys, states = table.keys[rows], table.states[rows]
    columns = (
        map(address, map(bytes, keys["source"])),
        map(address, map(bytes, keys["destination"])),
        keys["source_port"].tolist(),
        keys["destination_port"].tolist(),
        keys["protocol"].tolist(),
        states["attained_bytes"].tolist(),
        (_duration_ns(states) // _NS_PER_US).tolist(),
        states["level"].tolist(),
        states["route"].tolist(),
    )
    return [FlowSummary(*values) for values in zip(*columns, strict=True)]


def summary_of_message_before(table: FlowTable, row: int | np.intp) -> FlowSummary:
    """As `summary`, but size and duration of the message before the current one."""
    state = table.states[row]
    return msgspec.structs.replace(
        summary(table, row),
        size_bytes=int(state["last_message_bytes"]),
        duration_us=int(state["last_message_ns"]) // _NS_PER_US,
    )


@lru_cache(maxsize=4096)
def address(raw: bytes) -> str:
    """A 16-byte address as text; IPv4-mapped ones in dotted form."""
    if raw[:12] == _V4_MAPPED:
        return str(ipaddress.IPv4Address(raw[12:]))
    return str(ipaddress.IPv6Address(raw))
