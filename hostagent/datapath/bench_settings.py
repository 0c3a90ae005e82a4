"""The settings that all benchmarks of the eBPF data path run under."""

from typing import Final

from fabricpilot.levels import default_dscp, default_thresholds
from hostagent.datapath.base import MessageRule, Settings

_NEVER_NS: Final = 3600 * 10**9
ROOM: Final = 2.0


def settings() -> Settings:
    """Eight levels; every DSCP may be written; a flow is one message, and a source may begin any number of flows."""
    return Settings(
        default_thresholds(8),
        default_dscp(8),
        tuple(range(1, 9)),
        respect_dscp=False,
        messages=MessageRule(gap_ns=_NEVER_NS, blind_gap_ns=_NEVER_NS, starved_ns=0),
        new_flows_per_s=0,
    )
