"""The data path as the agent sees it: one interface, whatever counts and tags the packets underneath.

`Settings` is the whole vector the kernel acts on, applied at once. `FlowTable` is one read of the flow table as numpy
columns. An entry's counters only ever grow; when a SYN starts an entry afresh (port reuse) its `first_seen_ns`
changes, so (key, first_seen_ns) names one flow.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from fabricpilot.histogram import BINS
from fabricpilot.levels import Thresholds, check_dscp

# Layout of `struct flow_key` in ebpf/parse.h; IPv4 addresses are IPv4-mapped (::ffff:a.b.c.d), ports in host order.
FLOW_KEY_DTYPE = np.dtype(
    [
        ("source", "u1", 16),
        ("destination", "u1", 16),
        ("source_port", "<u2"),
        ("destination_port", "<u2"),
        ("protocol", "u1"),
        ("pad", "u1", 3),
    ]
)

# Layout of `struct flow_state` in ebpf/flow.h. Times are CLOCK_MONOTONIC nanoseconds: exact where a local TCP socket
# tells them, else of the latest timer tick (1 to 10 ms), but for the flow's first and, once it has ended, its last.
# `level` is that of the latest packet with payload.
FLOW_STATE_DTYPE = np.dtype(
    [
        ("attained_bytes", "<u8"),  # of the current message
        ("packets", "<u8"),
        ("last_data_ns", "<u8"),  # latest packet with payload
        ("next_sequence", "<u4"),
        ("level", "u1"),
        ("flags", "u1"),
        ("route", "u1"),  # in use; 0: the kernel's choice
        ("pad", "u1"),
        ("last_seen_ns", "<u8"),
        ("rules", "<u8"),  # KEPT_OUTCOME_DTYPE in rules.py: what the operator's rules say
        ("verdict", "<u8"),  # VERDICT_DTYPE in verdicts.py: what central says
        ("routed_ms", "<u4"),
        ("hint_sequence", "<u4"),
        ("first_seen_ns", "<u8"),
        ("message_began_ns", "<u8"),
        ("turn_ends_bytes", "<u8"),
        ("earlier_bytes", "<u8"),  # of all messages before the current one
        ("last_message_bytes", "<u8"),  # the message before the current one; 0: there was none, or it is unknown
        ("last_message_ns", "<u8"),
    ]
)

FLAG_ENDED = 1  # a FIN or RST was sent; the entry waits to be read and forgotten
FLAG_SAW_START = 2  # TCP: its SYN was seen, so its bytes are all it ever sent. UDP: always set
FLAG_SAW_MESSAGE = 4  # the current message's start was seen, so attained_bytes is all of it
FLAG_UNSENT = 8  # the latest packet left unsent bytes behind in the send buffer
FLAG_TURN = 16  # a starved flow has a turn at the top
FLAG_TOLD = 32  # user space was told that the current message is long


@dataclass(frozen=True)
class MessageRule:
    """When a flow's count starts again, and when a starved flow gets a turn at the top (ebpf/message.h).

    Attributes:
        gap_ns: least silence between two messages of a local TCP socket whose send buffer is empty; twice the
            round-trip time where that is longer.
        blind_gap_ns: silence between two messages where there is no such socket.
        starved_ns: silence with data waiting after which a flow gets a turn; 0: never. Each waits up to twice that.
        turn_bytes: payload that a turn is for.
    """

    gap_ns: int = 500_000
    blind_gap_ns: int = 200_000_000
    starved_ns: int = 500_000_000
    turn_bytes: int = 65_536

    def __post_init__(self) -> None:
        for name in ("gap_ns", "blind_gap_ns", "starved_ns", "turn_bytes"):
            if not 0 <= getattr(self, name) < 2**62:
                raise ValueError(f"{name} = {getattr(self, name)}; it must be 0 to 2^62")


MAX_NEW_FLOWS_PER_S: Final = 1_000_000  # of one source; the kernel reckons in nanoseconds per flow

# What a data path may or may not be able to do; each declares its own (`Datapath.capabilities`). `agent check` shows
# what the one at hand lacks, and a configuration that needs more is refused.
CAPABILITIES: Final = {
    "adopt": "outlives the agent in the kernel, and is adopted by the next one",
    "exact_payload": "counts payload to the byte, instead of estimating it from IP bytes and packets",
    "segments": "counts a GSO packet as the packets it becomes",
    "evict": "makes room for new flows in a full flow table",
    "forget": "takes a forgotten flow that goes on for a new one",
    "bridged": "schedules bridged packets too, beside local and routed ones",
    "messages": "starts a flow's count again with each of its messages",
    "backlog": "levels by what was written to a local TCP socket",
    "share": "bounds how many flows one source may begin at the top",
    "sockets": "takes size hints from applications, and sets their send buffers",
}


@dataclass(frozen=True)
class Settings:
    """Everything the kernel acts on. One vector: a packet sees the whole of it or the whole of the one before.

    Attributes:
        thresholds: K-1 ascending byte counts.
        dscp: one code point per level.
        priority: `skb->priority` per level, in the form the NIC's qdisc reads.
        respect_dscp: leave packets alone that carry a DSCP which is none of ours and not 0.
        observe: compute and count everything, change no packet.
        messages: when a flow's count starts again.
        use_backlog: rank by what the send buffer shows, where it can be seen.
        use_hints: believe the sizes that applications announce (`SocketRule` says whose).
        new_flows_per_s: how many flows one source may begin at the top (ebpf/admission.h); 0: as many as it likes.
    """

    thresholds: Thresholds
    dscp: tuple[int, ...]
    priority: tuple[int, ...]
    respect_dscp: bool = True
    observe: bool = False
    messages: MessageRule = MessageRule()
    use_backlog: bool = False
    use_hints: bool = False
    new_flows_per_s: int = 0

    def __post_init__(self) -> None:
        check_dscp(self.dscp, self.thresholds.levels)
        if len(self.priority) != self.thresholds.levels:
            raise ValueError(f"{len(self.priority)} priorities for {self.thresholds.levels} levels")
        if any(not 0 <= priority < 2**32 for priority in self.priority):
            raise ValueError(f"priority = {list(self.priority)}; skb->priority is an unsigned 32-bit number")
        if not 0 <= self.new_flows_per_s <= MAX_NEW_FLOWS_PER_S:
            raise ValueError(f"new_flows_per_s = {self.new_flows_per_s}; it must be 0 to {MAX_NEW_FLOWS_PER_S}")


@dataclass(frozen=True)
class FlowTable:
    """One read of the flow table; row i of `keys` (FLOW_KEY_DTYPE) and of `states` (FLOW_STATE_DTYPE) is one flow."""

    keys: npt.NDArray[np.void]
    states: npt.NDArray[np.void]
    read_at_ns: int  # CLOCK_MONOTONIC, before the read began

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def empty(cls, read_at_ns: int) -> "FlowTable":
        """A table without flows."""
        return cls(np.zeros(0, FLOW_KEY_DTYPE), np.zeros(0, FLOW_STATE_DTYPE), read_at_ns)


@dataclass(frozen=True)
class SocketRule:
    """What is done at the sockets of local applications, by cgroup (path below cgroup v2, "/" for all).

    Attributes:
        hint_cgroups: whose size hints count (ebpf/hint.h).
        send_buffer_bytes: send buffer of new TCP connections; 0: the kernel's own.
        send_buffer_ports: only of those with one of these ports on either side; empty: of all. At most 32.
        send_buffer_cgroups: only of these.
    """

    hint_cgroups: tuple[str, ...] = ()
    send_buffer_bytes: int = 0
    send_buffer_ports: tuple[int, ...] = ()
    send_buffer_cgroups: tuple[str, ...] = ("/",)


@dataclass(frozen=True)
class FinishedMessages:
    """How large finished messages were and how long they took; bins of fabricpilot/histogram.py."""

    sizes: npt.NDArray[np.int64]  # bytes, shape (BINS,)
    durations: npt.NDArray[np.int64]  # microseconds, first packet to last, shape (BINS,)

    @classmethod
    def none(cls) -> "FinishedMessages":
        """No message at all."""
        return cls(np.zeros(BINS, np.int64), np.zeros(BINS, np.int64))

    def since(self, before: "FinishedMessages") -> "FinishedMessages":
        """Those that came after `before` was read; all, if counting began anew since."""
        if (self.sizes < before.sizes).any() or (self.durations < before.durations).any():
            return self
        return FinishedMessages(self.sizes - before.sizes, self.durations - before.durations)


class Datapath(Protocol):
    """What counts, tags and prioritises packets.

    A backend keeps no state of its own that matters: all of it is in the kernel, so that another agent can adopt it.
    Opening one changes nothing; `attach` and `apply` bring it into the kernel where it is not there yet.
    """

    name: str
    capabilities: frozenset[str]  # of `CAPABILITIES`

    def attach(self, interface: str) -> bool:
        """Schedule packets leaving `interface`. Idempotent; returns whether anything had to be done.

        Raises:
            KernelError: the kernel refused; nothing is left half-attached.
            UsageError: there is no such interface.
        """

    def attached(self) -> list[str]:
        """Interfaces scheduled now, also by an agent before this one; sorted."""

    def attached_by(self, interfaces: Collection[str]) -> dict[str, list[str]]:
        """These, those that exist, by the mechanism of the kernel that each is, or would be, attached by."""

    def release(self, interfaces: Collection[str]) -> None:
        """Schedule packets leaving these no longer; also forgets all interfaces that are gone. Idempotent."""

    def claim(self) -> None:
        """Be the one agent that works on this data path, until `close` or the end of the process.

        Raises:
            UsageError: another one does.
        """

    def detach(self) -> None:
        """Remove every trace from the kernel: programs, pins, maps. Idempotent."""

    def apply(self, settings: Settings) -> None:
        """Act on `settings` from the next packet on; never on a mixture of old and new."""

    def settings(self) -> Settings | None:
        """What the kernel acts on now; None before the first `apply`."""

    def flows(self) -> FlowTable:
        """Read the whole flow table. Entries that come and go during the read may be missed, none is torn."""

    def forget(self, keys: npt.NDArray[np.void]) -> int:
        """Drop the given flows (FLOW_KEY_DTYPE, shape (n,)); returns how many were there."""

    def finished_messages(self) -> FinishedMessages:
        """Messages that were followed by another one of the same flow, cumulative since the data path was loaded."""

    def serve_sockets(self, rule: SocketRule) -> None:
        """Do exactly this at local sockets from now on; needs the capability `sockets` for anything but nothing.

        Raises:
            UsageError: a cgroup does not exist.
            KernelError: the kernel refused.
        """

    def sees_backlog(self) -> bool:
        """Whether what is in the kernel can see send buffers, so that `Settings.use_backlog` has an effect."""

    def counters(self) -> dict[str, int]:
        """Cumulative counters by name (`layout.counter_names`, and a data path's own) since it was loaded."""

    def close(self) -> None:
        """Let go of file descriptors; the kernel goes on tagging."""
