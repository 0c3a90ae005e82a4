"""Shapes the bottleneck: the switch's port towards each receiver, by the same script an operator would use.

Both kinds have the same rate and the same buffer in all; `tc_scripts/switch` splits it between the bands.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fabricpilot.errors import FabricpilotError, KernelError
from testbed.netns.programs import Programs
from testbed.netns.star import BOTTLENECK_PORT, MTU_BYTES, StarPlan

_HANDLE, _LEAF = "fab", "fa1"  # of the root and of the first band's queue, as tc_scripts/bands.sh has them
SCRIPT = Path(__file__).parents[2] / "tc_scripts" / "switch"


@dataclass(frozen=True)
class PortCounters:
    """What the port's queues have sent and dropped, all bands together."""

    packets: int
    sent_bytes: int
    dropped: int


def shape_command(
    rate_bps: int, buffer_bytes: int, dscp: Sequence[int] | None, port: str = BOTTLENECK_PORT
) -> list[str]:
    """The command that shapes a bottleneck port.

    Args:
        rate_bps: rate of the port.
        buffer_bytes: what the port may queue in all.
        dscp: one code point per strict band, or None for one FIFO band.
        port: of the switch.
    """
    kind = ["--fifo"] if dscp is None else ["--levels", str(len(dscp)), "--dscp", ",".join(map(str, dscp))]
    return [str(SCRIPT), port, "--rate", f"{rate_bps}bit", "--buffer", str(buffer_bytes), *kind]


def shape(programs: Programs, star: StarPlan, rate_bps: int, buffer_bytes: int, dscp: Sequence[int] | None) -> None:
    """Shape the bottleneck ports afresh, see `shape_command`.

    Raises:
        FabricpilotError: the script failed; the message is its own.
    """
    for host in star.receiver_hosts:
        programs.run_in(star.switch, shape_command(rate_bps, buffer_bytes, dscp, host.name))


def shape_fair_queues(programs: Programs, star: StarPlan, buffer_bytes: int) -> None:
    """Give every flow a queue of its own at ports that `shape` made one FIFO: sch_fq, or fq_codel.

    Both let a flow that has just begun go before those that have a queue already.

    Raises:
        KernelError: the kernel has neither.
        FabricpilotError: tc failed otherwise.
    """
    for host in star.receiver_hosts:
        _shape_fair_queues(programs, star, buffer_bytes, host.name)


def _shape_fair_queues(programs: Programs, star: StarPlan, buffer_bytes: int, port: str) -> None:
    leaf = ["dev", port, "parent", f"{_HANDLE}:1"]
    programs.run_in(star.switch, ["tc", "qdisc", "del", *leaf])
    packets = max(1, buffer_bytes // MTU_BYTES)
    for kind in (
        ["fq", "limit", f"{packets}", "flow_limit", f"{packets}", "nopacing"],
        ["fq_codel", "limit", f"{packets}", "memory_limit", f"{buffer_bytes}", "noecn"],
    ):
        try:
            programs.run_in(star.switch, ["tc", "qdisc", "add", *leaf, "handle", f"{_LEAF}:", *kind])
            return
        except FabricpilotError as error:
            if "qdisc kind is unknown" not in str(error):
                raise
    raise KernelError(
        "scheme 'fq' needs a queue per flow, which this kernel lacks: CONFIG_NET_SCH_FQ or CONFIG_NET_SCH_FQ_CODEL"
    )


def port_counters(programs: Programs, star: StarPlan) -> PortCounters:
    """Counters of the bottleneck since it was shaped, all ports together."""
    ports = [
        parse_counters(programs.run_in(star.switch, ["tc", "-s", "qdisc", "show", "dev", host.name, "root"]))
        for host in star.receiver_hosts
    ]
    return PortCounters(
        sum(port.packets for port in ports), sum(port.sent_bytes for port in ports), sum(port.dropped for port in ports)
    )


def parse_counters(text: str) -> PortCounters:
    """The counters in the first `Sent ... bytes ... pkt (dropped ...` of `tc -s qdisc`."""
    found = re.search(r"Sent (\d+) bytes (\d+) pkt \(dropped (\d+)", text)
    assert found, f"unexpected output of tc: {text}"
    sent_bytes, packets, dropped = map(int, found.groups())
    return PortCounters(packets, sent_bytes, dropped)
