"""Flows that have just become long: from the kernel's ring to central at once, and how soon their verdict was in force.

    egress program --ring--> LongFlowEvents.take --LongFlows--> central --Verdicts--> LongFlowEvents.decided

The agent's loop polls the ring while central follows long flows. What that costs is bounded: so many events between two
reports, and then the ring waits. What it has no room for is counted by the kernel, and known to central by the next
report. Only the eBPF data path has a ring; behind others central learns of long flows from the reports alone.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import zmq

from fabricpilot.wire import MAX_LONG_FLOWS, FlowSummary, FlowVerdict
from hostagent.datapath.base import Datapath
from hostagent.datapath.ebpf import EbpfDatapath
from hostagent.datapath.layout import LONG_FLOW_DTYPE
from hostagent.datapath.pinned_names import LONG_FLOW_RING
from hostagent.datapath.ring import Ring
from hostagent.datapath.verdicts import flow_keys
from hostagent.observe import address

MAX_EVENTS: Final = 4096  # between two reports: what central is told of at once, at 40 us each
_WAITING: Final = 4096  # flows whose verdict is waited for, to know how long it took
LATENCIES_KEPT: Final = 1024


class LongFlowEvents:
    """The reading end of the ring of flows that became long.

    Args:
        ring: of LONG_FLOW_DTYPE records.
    """

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._left = MAX_EVENTS
        self._watched = False
        self._since: OrderedDict[bytes, int] = OrderedDict()  # flow key -> when it became long, CLOCK_MONOTONIC ns
        self._latency_ms: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self._told = self._verdicts = 0

    @property
    def fileno(self) -> int:
        """Readable while there are events."""
        return self._ring.fd

    def watch(self, poller: zmq.Poller, following: bool) -> None:
        """Have `poller` wake the loop for events while central follows them and not too many have come."""
        wanted = following and self._left > 0
        if wanted != self._watched:
            (poller.register if wanted else poller.unregister)(self._ring.fd, *([zmq.POLLIN] if wanted else []))
            self._watched = wanted

    def take(self, levels: int) -> tuple[list[FlowSummary], list[FlowSummary]]:
        """Flows that have become long, the last of K levels, and those that have ended; as many as a message holds."""
        records = self._ring.read(min(MAX_LONG_FLOWS, self._left))
        self._left -= len(records)
        self._told += len(records)
        told: tuple[list[FlowSummary], list[FlowSummary]] = ([], [])
        for record in records:
            key, began_ns, at_ns = record["key"], int(record["message_began_ns"]), int(record["at_ns"])
            if not record["ended"]:
                self._since[key.tobytes()] = at_ns
            told[int(record["ended"])].append(
                FlowSummary(
                    source=address(key["source"].tobytes()),
                    destination=address(key["destination"].tobytes()),
                    source_port=int(key["source_port"]),
                    destination_port=int(key["destination_port"]),
                    protocol=int(key["protocol"]),
                    size_bytes=int(record["attained_bytes"]),
                    duration_us=max(0, at_ns - began_ns) // 1000,
                    level=levels - 1,
                    backlog_bytes=int(record["backlog_bytes"]),
                )
            )
        while len(self._since) > _WAITING:
            self._since.popitem(last=False)
        return told

    def decided(self, verdicts: Sequence[FlowVerdict]) -> None:
        """These verdicts are in the kernel's map now."""
        if not self._since:
            return
        now_ns = time.monotonic_ns()
        for key in flow_keys(verdicts):
            since_ns = self._since.pop(key.tobytes(), None)
            if since_ns is not None:
                self._verdicts += 1
                self._latency_ms.append((now_ns - since_ns) / 1e6)

    def renew(self, following: bool) -> None:
        """A report has gone out: as many events again. Those that central did not want are let go."""
        self._left = MAX_EVENTS
        if not following:
            while len(self._ring.read(MAX_LONG_FLOWS)):
                pass
            self._since.clear()

    def status(self) -> dict[str, Any]:
        """What `fabricpilot agent status` shows."""
        known = np.array(self._latency_ms)
        return {
            "told": self._told,
            "verdicts": self._verdicts,  # for flows that central was told of at once
            "verdict_latency_ms": {
                "p50": round(float(np.percentile(known, 50)), 3) if len(known) else None,
                "p99": round(float(np.percentile(known, 99)), 3) if len(known) else None,
            },
        }

    def close(self) -> None:
        """Stop reading. Idempotent."""
        self._ring.close()


def open_long_flow_events(datapath: Datapath) -> LongFlowEvents | None:
    """The ring of a loaded data path; None if it has none."""
    if not isinstance(datapath, EbpfDatapath):
        return None
    return LongFlowEvents(Ring(datapath.map_fd(LONG_FLOW_RING), LONG_FLOW_DTYPE))
