"""The data path as the agent sees it: one interface, whatever counts and tags the packets underneath.

`Settings` is the whole vector the kernel acts on, applied at once. `FlowTable` is one read of the flow table as numpy
columns; counters in it only ever grow, so the agent works with differences.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fabricpilot.levels import Thresholds, check_dscp

# Layout of `struct flow_key` in ebpf/; IPv4 addresses are IPv4-mapped (::ffff:a.b.c.d), ports in host order.
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

# Layout of `struct flow_state` in ebpf/. Times are CLOCK_MONOTONIC nanoseconds.
FLOW_STATE_DTYPE = np.dtype(
    [
        ("attained_bytes", "<u8"),
        ("packets", "<u8"),
        ("first_seen_ns", "<u8"),
        ("last_seen_ns", "<u8"),
        ("level", "u1"),
        ("flags", "u1"),
        ("pad", "u1", 6),
    ]
)

FLAG_ENDED = 1  # a FIN or RST was sent; the entry waits to be read and forgotten
FLAG_SAW_START = 2  # the flow's SYN was seen (TCP), so attained_bytes is all it ever sent


@dataclass(frozen=True)
class Settings:
    """Everything the kernel acts on. One vector: a packet sees the whole of it or the whole of the one before.

    Attributes:
        thresholds: K-1 ascending byte counts.
        dscp: one code point per level.
        priority: `skb->priority` per level, in the form the NIC's qdisc reads.
        respect_dscp: leave packets alone that carry a DSCP which is none of ours and not 0.
    """

    thresholds: Thresholds
    dscp: tuple[int, ...]
    priority: tuple[int, ...]
    respect_dscp: bool = True

    def __post_init__(self) -> None:
        check_dscp(self.dscp, self.thresholds.levels)
        if len(self.priority) != self.thresholds.levels:
            raise ValueError(f"{len(self.priority)} priorities for {self.thresholds.levels} levels")


@dataclass(frozen=True)
class FlowTable:
    """One read of the flow table; row i of `keys` (FLOW_KEY_DTYPE) and of `states` (FLOW_STATE_DTYPE) is one flow."""

    keys: npt.NDArray[np.void]
    states: npt.NDArray[np.void]
    read_at_ns: int  # CLOCK_MONOTONIC

    def __len__(self) -> int:
        return len(self.keys)


class Datapath(Protocol):
    """What counts, tags and prioritises packets.

    A backend keeps no state of its own that matters: all of it is in the kernel, so that another agent can adopt it.
    """

    name: str

    def attach(self, interface: str) -> None:
        """Schedule packets leaving `interface`. Idempotent.

        Raises:
            KernelError: the kernel refused; nothing is left half-attached.
            UsageError: there is no such interface.
        """

    def attached(self) -> list[str]:
        """Interfaces scheduled now, also by an agent before this one."""

    def detach(self) -> None:
        """Remove every trace from the kernel: filters, pins, maps. Idempotent."""

    def apply(self, settings: Settings) -> None:
        """Act on `settings` from the next packet on; never on a mixture of old and new."""

    def settings(self) -> Settings | None:
        """What the kernel acts on now; None before the first `apply`."""

    def flows(self) -> FlowTable:
        """Read the whole flow table. Entries that come and go during the read may be missed, none is torn."""

    def forget(self, keys: npt.NDArray[np.void]) -> int:
        """Drop the given flows (FLOW_KEY_DTYPE, shape (n,)); returns how many were there."""

    def counters(self) -> dict[str, int]:
        """Cumulative counters by name: packets and bytes per level, untracked packets by reason, evictions."""

    def close(self) -> None:
        """Let go of file descriptors; the kernel goes on tagging."""
