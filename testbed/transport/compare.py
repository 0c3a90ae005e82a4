"""DCTCP over a marking port, beside cubic over the same port unmarked: queue length and throughput.

The star with its bottleneck as one FIFO; each trial runs bulk flows from every sender, leaves out the first part, and
reports what the port saw in the rest. The queue is measured twice, independently: by the marker program (as every
packet found it) and from outside (the qdisc's backlog by netlink, every 10 ms).
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from fabricpilot.errors import FabricpilotError
from testbed.netns.programs import Programs
from testbed.netns.registry import Run
from testbed.netns.star import BOTTLENECK_PORT, StarPlan
from testbed.netns.switch_port import port_counters, shape
from testbed.transport.bulk import BulkFlow, bulk_flows
from testbed.transport.dctcp import dctcp_registered
from testbed.transport.marker import DEFAULT_GAMMA, attach_marker
from testbed.transport.port import open_port

_WARM_UP_S = 1.0
_SAMPLE_S = 0.01


@dataclass(frozen=True)
class Setting:
    """The port and the load.

    Attributes:
        senders: one bulk flow each.
        rate_bps: rate of the port.
        buffer_bytes: what the port may queue.
        k_bytes: marking threshold.
        seconds: measured, after a warm-up of one second.
        gamma: share of the rate at which the virtual queue drains.
    """

    senders: int = 2
    rate_bps: int = 100_000_000
    buffer_bytes: int = 500_000
    k_bytes: int = 30_000
    seconds: float = 3.0
    gamma: float = DEFAULT_GAMMA


@dataclass(frozen=True)
class Outcome:
    """What one trial showed.

    Attributes:
        name: congestion control, and how the port marked.
        throughput_ratio: bytes on the wire over what the line could carry.
        goodput_bps: payload, all flows together.
        queue_mean_bytes, queue_p99_bytes: backlog of the port, sampled from outside.
        found_queue_bytes: mean of what packets found queued, as the marker program read it; None for a virtual queue.
        marked_fraction: packets marked over all packets.
        dropped: packets that found the buffer full.
        fairness: Jain's index over the flows' goodput; 1 is equal.
    """

    name: str
    throughput_ratio: float
    goodput_bps: float
    queue_mean_bytes: float
    queue_p99_bytes: float
    found_queue_bytes: float | None
    marked_fraction: float
    dropped: int
    fairness: float


def compare(setting: Setting) -> list[Outcome]:
    """Cubic, DCTCP marked by the real queue, DCTCP marked by a virtual queue: on one star, one after another.

    Raises:
        UsageError: the setting is out of bounds.
        KernelError: not root, or the kernel lacks what is needed.
    """
    with _star(setting.senders) as (star, programs), dctcp_registered() as dctcp:
        return [
            _trial(star, programs, setting, "cubic", "real"),  # marks nothing: cubic does not ask for ECN
            _trial(star, programs, setting, dctcp, "real"),
            _trial(star, programs, setting, dctcp, "virtual"),
        ]


def jain_index(shares: Sequence[float]) -> float:
    """Jain's fairness index, (sum x)^2 / (n sum x^2): 1 if all are equal, 1/n if one has everything."""
    squares = len(shares) * sum(x * x for x in shares)
    return sum(shares) ** 2 / squares if squares else 0.0


@contextmanager
def _star(senders: int) -> Iterator[tuple[StarPlan, Programs]]:
    run = Run.create()
    try:
        star = StarPlan(run, senders)
        star.build()
        yield star, Programs(run, run.dir / "logs")
    finally:
        run.remove()


def _trial(
    star: StarPlan, programs: Programs, setting: Setting, congestion_control: str, mode: Literal["real", "virtual"]
) -> Outcome:
    shape(programs, star, setting.rate_bps, setting.buffer_bytes, None)
    with (
        open_port(star.switch, BOTTLENECK_PORT) as port,
        attach_marker(
            star.switch, BOTTLENECK_PORT, setting.k_bytes, setting.rate_bps, mode, gamma=setting.gamma
        ) as marker,
        bulk_flows(star.sender_hosts, star.receiver, congestion_control) as flows,
    ):
        _check_agreed(flows, congestion_control)
        time.sleep(_WARM_UP_S)
        seen_before, port_before = marker.stats(), port_counters(programs, star)
        received_before, started_s = [flow.received_bytes for flow in flows], time.monotonic()
        backlog_bytes = []
        while time.monotonic() - started_s < setting.seconds:
            backlog_bytes.append(port.backlog_bytes())
            time.sleep(_SAMPLE_S)
        elapsed_s, received = time.monotonic() - started_s, [flow.received_bytes for flow in flows]
        port_after, seen = port_counters(programs, star), marker.stats().since(seen_before)
        port_elapsed_s = time.monotonic() - started_s
    goodputs_bps = [8 * (now - before) / elapsed_s for now, before in zip(received, received_before, strict=True)]
    marking = f"{mode} queue" if seen.marked else "no marks"
    return Outcome(
        name=f"{congestion_control}, {marking}",
        throughput_ratio=8 * (port_after.sent_bytes - port_before.sent_bytes) / port_elapsed_s / setting.rate_bps,
        goodput_bps=sum(goodputs_bps),
        queue_mean_bytes=statistics.fmean(backlog_bytes),
        queue_p99_bytes=sorted(backlog_bytes)[int(0.99 * len(backlog_bytes))],
        found_queue_bytes=seen.mean_queue_bytes if mode == "real" else None,
        marked_fraction=seen.marked / seen.packets if seen.packets else 0.0,
        dropped=port_after.dropped - port_before.dropped,
        fairness=jain_index(goodputs_bps),
    )


def _check_agreed(flows: Sequence[BulkFlow], congestion_control: str) -> None:
    """DCTCP gives way to Reno where the peers do not agree on ECN; such a trial would measure Reno."""
    for flow in flows:
        if flow.congestion_control != congestion_control:
            raise FabricpilotError(
                f"the flow uses {flow.congestion_control}, not {congestion_control}: the peers did not agree on ECN"
            )
