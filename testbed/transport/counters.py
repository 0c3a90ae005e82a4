"""What an ECN marker shares with the kernel: its configuration and its counters, as memory and as numbers.

The structures are those of `ebpf/transport/ecn_marker.h`; a test compares them through BTF.
"""

import ctypes
from dataclasses import dataclass, replace

from fabricpilot.levels import MAX_DSCP

BINS = 256


class Config(ctypes.Structure):
    """struct marker_config, ebpf/transport/ecn_marker.h."""

    _fields_ = (
        ("drain_bytes_per_s", ctypes.c_uint64),
        ("k_bytes", ctypes.c_uint32),
        ("cap_bytes", ctypes.c_uint32),
        ("bin_bytes", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("class_of_dscp", ctypes.c_uint32 * (MAX_DSCP + 1)),
    )


class Counters(ctypes.Structure):
    """struct marker_stats, ebpf/transport/ecn_marker.h."""

    _fields_ = (
        ("packets", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("marked", ctypes.c_uint64),
        ("not_capable", ctypes.c_uint64),
        ("no_queue", ctypes.c_uint64),
        ("queue_bytes_sum", ctypes.c_uint64),
        ("queue_bytes_max", ctypes.c_uint64),
        ("queue_bins", ctypes.c_uint64 * BINS),
    )


@dataclass(frozen=True)
class MarkerStats:
    """What a marker saw.

    Attributes:
        packets, bytes: that left towards the port's queue; bytes as on the wire.
        marked: left with CE because they found more than K queued.
        not_capable: found more than K but do not do ECN.
        no_queue: belong to a class without a child qdisc: neither measured nor marked.
        queue_bytes_sum: over packets, the queue each found.
        queue_bytes_max: the longest queue found since the marker was attached.
        bins: packets by the queue they found, `bin_bytes` per bin; the last bin has all beyond.
    """

    packets: int
    bytes: int
    marked: int
    not_capable: int
    no_queue: int
    queue_bytes_sum: int
    queue_bytes_max: int
    bins: tuple[int, ...]
    bin_bytes: int

    @property
    def mean_queue_bytes(self) -> float:
        """Mean over packets of the queue each found; 0 without packets."""
        measured = self.packets - self.no_queue
        return self.queue_bytes_sum / measured if measured else 0.0

    def queue_quantile_bytes(self, q: float) -> int:
        """Upper edge of the bin in which the quantile lies; 0 without packets."""
        left = q * sum(self.bins)
        for number, packets in enumerate(self.bins):
            left -= packets
            if packets and left <= 0:
                return (number + 1) * self.bin_bytes
        return 0

    def since(self, earlier: "MarkerStats") -> "MarkerStats":
        """What was counted between `earlier` and this (the maximum stays that of all time)."""
        changed = {
            name: getattr(self, name) - getattr(earlier, name)
            for name in ("packets", "bytes", "marked", "not_capable", "no_queue", "queue_bytes_sum")
        }
        bins = tuple(now - before for now, before in zip(self.bins, earlier.bins, strict=True))
        return replace(self, bins=bins, **changed)


def read_stats(counters: Counters, bin_bytes: int) -> MarkerStats:
    """The counters as numbers."""
    plain = {name: int(getattr(counters, name)) for name, _ in Counters._fields_ if name != "queue_bins"}
    return MarkerStats(**plain, bins=tuple(counters.queue_bins), bin_bytes=bin_bytes)
