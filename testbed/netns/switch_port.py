"""Shapes the bottleneck: the switch's port towards the receiver, by the same script an operator would use.

Both kinds have the same rate and the same buffer in all; `tc_scripts/switch` splits it between the bands.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from testbed.netns.programs import Programs
from testbed.netns.star import BOTTLENECK_PORT, StarPlan

SCRIPT = Path(__file__).parents[2] / "tc_scripts" / "switch"


@dataclass(frozen=True)
class PortCounters:
    """What the port's queues have sent and dropped, all bands together."""

    packets: int
    sent_bytes: int
    dropped: int


def shape_command(rate_bps: int, buffer_bytes: int, dscp: Sequence[int] | None) -> list[str]:
    """The command that shapes the bottleneck port.

    Args:
        rate_bps: rate of the port.
        buffer_bytes: what the port may queue in all.
        dscp: one code point per strict band, or None for one FIFO band.
    """
    kind = ["--fifo"] if dscp is None else ["--levels", str(len(dscp)), "--dscp", ",".join(map(str, dscp))]
    return [str(SCRIPT), BOTTLENECK_PORT, "--rate", f"{rate_bps}bit", "--buffer", str(buffer_bytes), *kind]


def shape(programs: Programs, star: StarPlan, rate_bps: int, buffer_bytes: int, dscp: Sequence[int] | None) -> None:
    """Shape the bottleneck port afresh, see `shape_command`.

    Raises:
        FabricpilotError: the script failed; the message is its own.
    """
    programs.run_in(star.switch, shape_command(rate_bps, buffer_bytes, dscp))


def port_counters(programs: Programs, star: StarPlan) -> PortCounters:
    """Counters of the bottleneck port since it was shaped."""
    return parse_counters(programs.run_in(star.switch, ["tc", "-s", "qdisc", "show", "dev", BOTTLENECK_PORT, "root"]))


def parse_counters(text: str) -> PortCounters:
    """The counters in the first `Sent ... bytes ... pkt (dropped ...` of `tc -s qdisc`."""
    found = re.search(r"Sent (\d+) bytes (\d+) pkt \(dropped (\d+)", text)
    assert found, f"unexpected output of tc: {text}"
    sent_bytes, packets, dropped = map(int, found.groups())
    return PortCounters(packets, sent_bytes, dropped)
