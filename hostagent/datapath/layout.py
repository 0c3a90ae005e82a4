"""The structs that kernel and agent share besides the flow table, as numpy dtypes, and their conversion.

`struct settings` is in ebpf/level.h, `struct counters` in ebpf/counters.h; a test compares them through BTF.
"""

import numpy as np
import numpy.typing as npt

from fabricpilot.histogram import BINS
from fabricpilot.levels import MAX_LEVELS, Thresholds
from hostagent.datapath.base import FLOW_KEY_DTYPE, MessageRule, Settings

SETTINGS_DTYPE = np.dtype(
    [
        ("thresholds", "<u8", MAX_LEVELS - 1),
        ("writable_dscp", "<u8"),
        ("priority", "<u4", MAX_LEVELS),
        ("dscp", "u1", MAX_LEVELS),
        ("levels", "u1"),
        ("observe", "u1"),
        ("pad", "u1", 6),
        ("quiet_ns", "<u8"),
        ("gap_ns", "<u8"),
        ("blind_gap_ns", "<u8"),
        ("starved_ns", "<u8"),
        ("turn_bytes", "<u8"),
        ("use_backlog", "<u4"),
        ("use_hints", "<u4"),
        ("new_flows_per_s", "<u4"),
        ("new_flow_ns", "<u4"),
    ]
)

# `struct send_buffer` in ebpf/send_buffer.h.
SEND_BUFFER_PORTS = 32
SEND_BUFFER_DTYPE = np.dtype([("bytes", "<u4"), ("ports", "<u4"), ("port", "<u2", SEND_BUFFER_PORTS)])

# `struct long_flow` in ebpf/long_flow.h, a record of the ring `became_long`.
LONG_FLOW_DTYPE = np.dtype(
    [
        ("key", FLOW_KEY_DTYPE),
        ("at_ns", "<u8"),  # CLOCK_MONOTONIC
        ("message_began_ns", "<u8"),
        ("attained_bytes", "<u8"),  # of the current message
        ("backlog_bytes", "<u8"),  # of its packet and unsent then; 0: not known
        ("ended", "<u8"),  # 0: it has become long; 1: it was, and has ended
    ]
)

# `struct finished_messages` in ebpf/message.h.
FINISHED_DTYPE = np.dtype([("sizes", "<u8", BINS), ("durations", "<u8", BINS)])

# Why a packet was left alone, in the order of `enum untracked_reason`; its code 0 is no reason.
UNTRACKED_REASONS = (
    "",
    "not_ip",
    "vlan",
    "other_protocol",
    "fragment",
    "extension_header",
    "malformed",
    "unreadable",
)

# Single counters behind the per-level ones, in the order of `struct counters`.
SINGLE_COUNTERS = (
    "foreign_dscp",
    "observed",
    "untagged",
    "excluded",
    "routed",
    "route_unusable",
    "flows_inserted",
    "flows_evicted",
    "flows_midlife",
    "flows_restarted",
    "restarted_bytes",
    "messages_finished",
    "turns",
    "over_share",
    "flowless",
    "write_failed",
    "long_untold",
)

COUNTERS_DTYPE = np.dtype(
    [
        ("packets", "<u8", MAX_LEVELS),
        ("bytes", "<u8", MAX_LEVELS),
        ("untracked", "<u8", len(UNTRACKED_REASONS)),
        *((name, "<u8") for name in SINGLE_COUNTERS),
    ]
)

_NS_PER_S = 1_000_000_000
_NO_THRESHOLD = 2**64 - 1
_NEVER = 2**64 - 1
_ANY_DSCP = 2**64 - 1


def pack_settings(settings: Settings) -> npt.NDArray[np.void]:
    """`settings` as one SETTINGS_DTYPE record, shape ()."""
    packed = np.zeros((), SETTINGS_DTYPE)
    levels = settings.thresholds.levels
    packed["thresholds"] = _NO_THRESHOLD
    packed["thresholds"][: levels - 1] = settings.thresholds.bytes
    packed["priority"][:levels] = settings.priority
    packed["dscp"][:levels] = settings.dscp
    packed["levels"] = levels
    packed["observe"] = settings.observe
    rule = settings.messages
    starved_ns = rule.starved_ns or _NEVER
    packed["quiet_ns"] = min(rule.gap_ns, rule.blind_gap_ns, starved_ns)
    packed["gap_ns"], packed["blind_gap_ns"], packed["starved_ns"] = rule.gap_ns, rule.blind_gap_ns, starved_ns
    packed["turn_bytes"], packed["use_backlog"] = rule.turn_bytes, settings.use_backlog
    packed["use_hints"] = settings.use_hints
    packed["new_flows_per_s"] = settings.new_flows_per_s
    packed["new_flow_ns"] = _NS_PER_S // settings.new_flows_per_s if settings.new_flows_per_s else 0
    # Unmarked packets and those marked by us before (retransmissions keep the socket's mark, forwarded ones the
    # sender's) may be marked anew.
    packed["writable_dscp"] = sum(1 << dscp for dscp in {0, *settings.dscp}) if settings.respect_dscp else _ANY_DSCP
    return packed


def unpack_settings(packed: npt.NDArray[np.void]) -> Settings | None:
    """Inverse of `pack_settings`; None for a slot that was never filled."""
    levels = int(packed["levels"])
    if levels == 0:
        return None
    return Settings(
        thresholds=Thresholds.of(int(t) for t in packed["thresholds"][: levels - 1]),
        dscp=tuple(int(d) for d in packed["dscp"][:levels]),
        priority=tuple(int(p) for p in packed["priority"][:levels]),
        respect_dscp=int(packed["writable_dscp"]) != _ANY_DSCP,
        observe=bool(packed["observe"]),
        messages=MessageRule(
            gap_ns=int(packed["gap_ns"]),
            blind_gap_ns=int(packed["blind_gap_ns"]),
            starved_ns=0 if int(packed["starved_ns"]) == _NEVER else int(packed["starved_ns"]),
            turn_bytes=int(packed["turn_bytes"]),
        ),
        use_backlog=bool(packed["use_backlog"]),
        use_hints=bool(packed["use_hints"]),
        new_flows_per_s=int(packed["new_flows_per_s"]),
    )


def name_counters(total: npt.NDArray[np.void], levels: int) -> dict[str, int]:
    """One COUNTERS_DTYPE record, shape (), as a dictionary; per-level counters for the first `levels` levels."""
    named = {}
    for level in range(levels):
        named[f"packets_level_{level}"] = int(total["packets"][level])
        named[f"bytes_level_{level}"] = int(total["bytes"][level])
    for code, reason in enumerate(UNTRACKED_REASONS):
        if reason:
            named[f"untracked_{reason}"] = int(total["untracked"][code])
    for name in SINGLE_COUNTERS:
        named[name] = int(total[name])
    return named


def counter_names(levels: int) -> tuple[str, ...]:
    """All names that `Datapath.counters` has for K = `levels`."""
    return (*name_counters(np.zeros((), COUNTERS_DTYPE), levels), *BOOKKEEPING_COUNTERS)


# Counted by user space: entries dropped by `forget`, how often the flow table had
# to be started afresh because a new version's differs, and how often another version took over at all.
BOOKKEEPING_COUNTERS = ("flows_forgotten", "fresh_starts", "upgrades")
