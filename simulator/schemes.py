"""The schemes by name: what each knows of a flow, and how it orders flows. A scheme is a parameter of the engine.

`scheme(name, ...)` builds one; `NAMES` says what there is and, in one line each, what it does.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from fabricpilot.errors import UsageError
from fabricpilot.levels import MAX_LEVELS, Thresholds, check_levels, default_thresholds
from fabricpilot.published import published, workload_of
from simulator.workloads.distribution import SizeDistribution

ATTAINED, SIZE, REMAINING, BACKLOG, WRITTEN = range(5)  # what a level is found from; `rank` has the rules
SHARED, FIRST_COME, SHORTEST = range(3)  # order inside a level

DEFAULT_SEND_BUFFER_BYTES = 4_000_000  # Linux's default maximum of tcp_wmem; a stock host shows about half of it
DEFAULT_LEVELS = MAX_LEVELS  # what switches have; an operator who keeps queues for others takes fewer

MARKING_BYTES = 17_650.0  # standing queue of ECN-marked traffic: 150 us at 1 Gbit/s; see `physics`
DROP_TAIL_BYTES = 125_000.0  # mean standing queue of a drop-tail port (an assumption: a half full 250 KB buffer)
SPARSE_BYTES = 15_140.0  # what fq lets a new flow send before it joins the others: its initial quantum

_FINE_LEVELS = 64  # LAS is these many levels, 25 % apart from 1 KB to 1 GB


@dataclass(frozen=True)
class Scheme:
    """How flows are ranked.

    Attributes:
        name: as in results.
        basis: what the level is found from, ATTAINED ... WRITTEN.
        order: inside a level, SHARED, FIRST_COME or SHORTEST.
        thresholds: ascending bytes between the levels; empty for one level.
        send_buffer_bytes: how much of its backlog a flow shows (BACKLOG and WRITTEN).
        queue_bytes: what stands in a queue that several flows share.
        turns: flows of the last level are served one at a time, the oldest first (SHARED only; one bottleneck only).
    """

    name: str
    basis: int = ATTAINED
    order: int = SHARED
    thresholds: tuple[float, ...] = ()
    send_buffer_bytes: float = 0.0
    queue_bytes: float = MARKING_BYTES
    turns: bool = False

    def __post_init__(self) -> None:
        whole = all(float(t).is_integer() for t in (*self.thresholds, self.send_buffer_bytes))
        if not whole or any(low >= high for low, high in pairwise((0, *self.thresholds))):
            # Whole bytes are exact in float64, so a flow at a threshold is neither short of it nor beyond.
            raise UsageError(f"thresholds and send buffer of scheme '{self.name}' must be whole bytes, ascending")

    @property
    def levels(self) -> int:
        """K."""
        return len(self.thresholds) + 1

    def with_thresholds(self, thresholds: Thresholds) -> "Scheme":
        """The same scheme with other thresholds."""
        return replace(self, thresholds=tuple(map(float, thresholds.bytes)))


NAMES = {
    "fair": "equal sharing of every link, ECN-marked queue (TCP/DCTCP)",
    "fifo": "equal sharing, drop-tail queue (TCP through pfifo)",
    "fq": f"equal sharing, a new flow's first {SPARSE_BYTES:.0f} bytes first (fq's sparse-flow boost)",
    "fcfs": "whole flows in order of arrival, no sharing",
    "mlfq": "K levels by bytes sent (AuTO, PIAS); --thresholds, or log-spaced ones",
    "qlas": "mlfq under AuTO's name: thresholds fixed for web search at load 0.8",
    "qsjf": "K levels by the size known in advance, thresholds as qlas (AuTO's baseline)",
    "pias-published": "mlfq with the published thresholds nearest in workload, load and K",
    "equal-split": "mlfq with thresholds at the k/K quantiles of the flow sizes",
    "backlog": "K levels by what remains, where the send buffer shows all of it",
    "written": "K levels by bytes sent and those that wait in the send buffer (the data path's mode = backlog)",
    "las": f"least attained service first ({_FINE_LEVELS} levels, 25 % apart)",
    "srpt": "shortest remaining size first: knows everything, the bound",
}


def scheme(
    name: str,
    *,
    thresholds: Thresholds | None = None,
    levels: int | None = None,
    send_buffer_bytes: float = DEFAULT_SEND_BUFFER_BYTES,
    distribution: SizeDistribution | None = None,
    workload: str = "",
    load: float = 0.8,
) -> Scheme:
    """A scheme by its name.

    Args:
        name: a key of `NAMES`.
        thresholds: for mlfq, qlas, qsjf, backlog and written; others have their own.
        levels: K where no thresholds are given, 8 by default.
        send_buffer_bytes: visible backlog.
        distribution: the flow sizes, needed by equal-split.
        workload: name of the workload, chooses among the published thresholds.
        load: chooses among the published thresholds.

    Raises:
        UsageError: unknown name, impossible K or send buffer, or equal-split without a distribution.
    """
    if name not in NAMES:
        raise UsageError(f"scheme '{name}' is unknown; choose from: {', '.join(NAMES)}")
    if not (math.isfinite(send_buffer_bytes) and send_buffer_bytes > 0):
        raise UsageError(f"send buffer of {send_buffer_bytes} bytes; it must be above 0")
    if levels is not None:
        check_levels(levels)
    given = thresholds or default_thresholds(levels or DEFAULT_LEVELS)
    if name in ("fair", "fifo", "fcfs", "fq", "srpt", "las"):
        return _SIMPLE[name]
    if name == "equal-split":
        if distribution is None:
            raise UsageError("equal-split needs the distribution of flow sizes")
        return Scheme(name, thresholds=_floats(equal_split(distribution, levels or DEFAULT_LEVELS)))
    if name == "pias-published":
        found = published(workload_of(workload), levels or DEFAULT_LEVELS, load)
        return Scheme(name, thresholds=_floats(found.thresholds))
    if name in ("qlas", "qsjf") and thresholds is None:
        given = published("websearch", levels or DEFAULT_LEVELS, 0.8).thresholds
    basis = {"qsjf": SIZE, "backlog": BACKLOG, "written": WRITTEN}.get(name, ATTAINED)
    return Scheme(name, basis=basis, thresholds=_floats(given), send_buffer_bytes=float(round(send_buffer_bytes)))


def equal_split(distribution: SizeDistribution, levels: int) -> Thresholds:
    """Thresholds that put as many flows' sizes into each level (PIAS, section 6): the quantiles k/K.

    Where an atom makes neighbours equal, the later one is one byte larger.
    """
    check_levels(levels)
    values: list[int] = []
    for quantile in distribution.quantile(np.arange(1, levels) / levels):
        values.append(max(round(float(quantile)), 1, values[-1] + 1 if values else 1))
    return Thresholds.of(values)


def fine_thresholds() -> tuple[float, ...]:
    """Thresholds of 64 levels from 1 KB to 1 GB: LAS, and SRPT in a fabric."""
    return tuple(float(round(t)) for t in np.geomspace(1e3, 1e9, _FINE_LEVELS - 1))


def _floats(thresholds: Thresholds) -> tuple[float, ...]:
    return tuple(map(float, thresholds.bytes))


_SIMPLE = {
    "fair": Scheme("fair"),
    "fifo": Scheme("fifo", queue_bytes=DROP_TAIL_BYTES),
    "fcfs": Scheme("fcfs", order=FIRST_COME),
    "fq": Scheme("fq", thresholds=(SPARSE_BYTES,), queue_bytes=0.0),
    "srpt": Scheme("srpt", order=SHORTEST),
    "las": Scheme("las", thresholds=fine_thresholds()),
}
