"""What finished flows experienced, from the samples in the hosts' reports: slowdowns and completion times of a group.

Per host: sums per size bucket and a histogram of slowdowns, fading. Per group: every number is found for each host, no
host weighs more than the median host, and the mean is that of the middle half of the weight. So hosts that lie, fewer
than a quarter of those that report, move a number no further than other hosts' values already lie. Pure numpy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from central.policy.base import Outcome
from fabricpilot.wire import FlowSummary
from simulator.physics import Physics, ideal_s
from simulator.statistics import BUCKETS

Floats = npt.NDArray[np.float64]

ASSUMED_RATE_BPS = 10e9  # of a link whose rate is unknown; slowdowns are then right up to a factor

# No report shifts a mean by more than a flow of such a slowdown; what a lost SYN costs a small flow is within.
MAX_SLOWDOWN = 4096.0
LEAST_SLOWDOWN = 1 / 16  # below 1 where a link is faster than it says, or a small flow is never seen to last

_LONGEST_S = 3600.0
_PER_OCTAVE = 8  # bins of the histogram of slowdowns, 9 % wide
_LOWEST = math.log2(LEAST_SLOWDOWN) * _PER_OCTAVE
_SLOTS = int(math.log2(MAX_SLOWDOWN / LEAST_SLOWDOWN) * _PER_OCTAVE) + 1
_PHYSICS = Physics()
_EDGES_BYTES = np.array([edge for _, edge in BUCKETS[:-1]])


@dataclass(frozen=True, eq=False)
class Experienced:
    """Finished flows of one report; arrays of shape (flows,).

    Attributes:
        bucket: index into `BUCKETS`.
        slowdown: completion time over that of the flow alone on the host's link, within `LEAST_SLOWDOWN` and
            `MAX_SLOWDOWN`.
        fct_s: completion time.
    """

    bucket: npt.NDArray[np.int64]
    slowdown: Floats
    fct_s: Floats


def experienced(sample: Sequence[FlowSummary], rate_bps: float) -> Experienced:
    """What the flows of a report's sample experienced on a link of `rate_bps` (0: unknown).

    The sender sees the time from first to last packet; the base latency stands for what the last one takes to arrive.
    """
    size_bytes = np.array([flow.size_bytes for flow in sample], np.float64).clip(1.0, 1e15)
    seen_s = np.array([flow.duration_us for flow in sample], np.float64) / 1e6
    fct_s = np.minimum(seen_s, _LONGEST_S) + _PHYSICS.base_latency_s
    alone_s = ideal_s(_PHYSICS, size_bytes, _PHYSICS.goodput(rate_bps or ASSUMED_RATE_BPS))
    slowdown = (fct_s / alone_s).clip(LEAST_SLOWDOWN, MAX_SLOWDOWN)
    return Experienced(np.searchsorted(_EDGES_BYTES, size_bytes, side="left"), slowdown, fct_s)


class Experience:
    """What one host's flows experienced lately; fades as exp(-age / window_s)."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._at_s = 0.0
        self._sums = np.zeros((3, len(BUCKETS)))  # flows, slowdowns, completion times
        self._slots = np.zeros(_SLOTS, np.float32)  # flows by slowdown

    def add(self, flows: Experienced, now_s: float) -> None:
        """Count a report's flows at monotonic time `now_s`."""
        if len(flows.bucket) == 0:
            return
        faded = self._faded(now_s)
        self._sums *= faded
        self._slots *= np.float32(faded)
        self._at_s = max(now_s, self._at_s)
        for row, weights in enumerate((None, flows.slowdown, flows.fct_s)):
            self._sums[row] += np.bincount(flows.bucket, weights, len(BUCKETS))
        slots = np.rint(np.log2(flows.slowdown) * _PER_OCTAVE - _LOWEST).astype(np.int64)
        self._slots += np.bincount(slots, minlength=_SLOTS).astype(np.float32)

    def at(self, now_s: float) -> Floats:
        """Flows, sums of slowdowns and of completion times (s) per bucket as they weigh now; shape (3, buckets)."""
        faded: Floats = self._sums * self._faded(now_s)
        return faded

    def p99_slowdown(self) -> float:
        """99th percentile of the slowdowns; 0 without flows."""
        reached = np.cumsum(self._slots, dtype=np.float64)
        if reached[-1] <= 0:
            return 0.0
        slot = int(np.searchsorted(reached, 0.99 * reached[-1]))
        return float(2 ** ((slot + _LOWEST) / _PER_OCTAVE))

    def _faded(self, now_s: float) -> float:
        return math.exp(-max(0.0, now_s - self._at_s) / self._window_s)


def outcome_of(hosts: Sequence[Experience], now_s: float) -> Outcome | None:
    """The outcome of a group; None if no flow finished lately."""
    sums = np.array([host.at(now_s) for host in hosts]).reshape(-1, 3, len(BUCKETS))
    flows = sums[:, 0]
    weights = even_weights(flows.sum(axis=1))
    if weights.sum() <= 0:
        return None
    per_host = flows / np.maximum(flows.sum(axis=1, keepdims=True), 1e-300)
    shares = np.array([middle_mean(per_host[:, b], weights) for b in range(len(BUCKETS))])
    shares /= shares.sum()
    slowdown, fct_s = (
        np.array([_bucket_mean(flows[:, b], sums[:, row, b]) for b in range(len(BUCKETS))]) for row in (1, 2)
    )
    return Outcome(
        flows=float(weights.sum()),
        shares=tuple(shares.tolist()),
        slowdown=tuple(slowdown.tolist()),
        mean_fct_s=float(shares @ fct_s),
        mean_slowdown=float(shares @ slowdown),
        p99_slowdown=middle_mean(np.array([host.p99_slowdown() for host in hosts]), weights),
    )


def even_weights(flows: Floats) -> Floats:
    """Weights of hosts by their flows, shape (hosts,): none above the median of the hosts that have any."""
    some = flows[flows > 0]
    weights: Floats = np.minimum(flows, np.median(some)) if len(some) else np.zeros_like(flows)
    return weights


def middle_mean(values: Floats, weights: Floats) -> float:
    """Weighted mean of the middle half of the weight, values in order; 0 without weight (shapes (n,), (n,))."""
    total = float(weights.sum())
    if total <= 0:
        return 0.0
    order = np.argsort(values)
    upto = np.cumsum(weights[order]) / total
    inside = np.minimum(upto, 0.75) - np.maximum(np.concatenate(([0.0], upto[:-1])), 0.25)
    kept = np.maximum(inside, 0.0)
    return float(kept @ values[order] / kept.sum())


def _bucket_mean(flows: Floats, sums: Floats) -> float:
    return middle_mean(sums / np.maximum(flows, 1e-300), even_weights(flows))
