"""What is remembered of flow sizes, and the distribution that follows.

Histograms are forgotten exponentially, joined so that no host outweighs the others, and corrected for the flows that
still run. Pure numpy on arrays of shape (BINS,), the bins of `fabricpilot.histogram`.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fabricpilot.histogram import BINS, LogHistogram, bin_of

Counts = npt.NDArray[np.float64]

# A host counts as at most as many flows as its group's median host has; so one that lies, or runs amok, moves the
# group's distribution by one host's share. Measured on web search at load 0.8 with a host that claims large flows only:
# one in eight makes honest flows take 4 to 6 % longer, one in 32 0.4 %; with ten times the median, 16 % and 13 %. What
# it costs where a host truly has 10 or 30 times the others' flows, of another workload: at most 0.5 %.
ENOUGH_FLOWS = 50.0  # so many count of any host, however few the others have: they may be idle

_RESOLUTION = 2**40  # counts in the histogram of a distribution: shares down to 1e-12 survive the rounding


class ForgettingWindow:
    """A histogram whose counts fade as exp(-age / window_s): about the last `window_s` seconds.

    Held in single precision: 1.5 KB per host, and a relative error of 1e-7 nobody can see.
    """

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self._counts = np.zeros(BINS, np.float32)
        self._at_s = 0.0

    def add(self, sparse: Mapping[int, int], now_s: float) -> None:
        """Count a report's histogram ({bin: count}) at monotonic time `now_s`."""
        if not sparse:
            return
        self._counts *= np.float32(self._faded(now_s))
        self._at_s = max(now_s, self._at_s)
        bins = np.fromiter(sparse.keys(), np.intp, len(sparse))
        self._counts[bins] += np.fromiter(sparse.values(), np.float32, len(sparse))

    def at(self, now_s: float) -> Counts:
        """The counts as they weigh at `now_s`, shape (BINS,)."""
        return self._counts.astype(np.float64) * self._faded(now_s)

    def quantile(self, q: float, now_s: float) -> float:
        """Value below which a share `q` of the window lies; NaN when it is empty."""
        counts = self.at(now_s)
        total = counts.sum()
        return (
            LogHistogram(np.rint(counts / total * _RESOLUTION).astype(np.int64)).quantile(q) if total > 0 else math.nan
        )

    def _faded(self, now_s: float) -> float:
        return math.exp(-max(0.0, now_s - self._at_s) / self.window_s)


def running_counts(sizes_bytes: Sequence[int], running: int) -> dict[int, int]:
    """Attained sizes of the long flows of a report, {bin: count}.

    Args:
        sizes_bytes: of the flows that are listed (the longest ones).
        running: how many there are; those not listed are counted at the smallest size listed, the nearest known bound.
    """
    if not sizes_bytes:
        return {}
    counts = Counter(bin_of(np.array(sizes_bytes, np.float64)).tolist())
    counts[min(counts)] += max(0, running - len(sizes_bytes))
    return dict(counts)


def influence(flows: Counts) -> Counts:
    """The weight of each host's counts, at most 1.

    Args:
        flows: flows of each host in its window, finished and running, shape (hosts,).

    Returns:
        Shape (hosts,): 1, or what brings a host down to the median of the hosts with flows, or to `ENOUGH_FLOWS`.
    """
    some = flows[flows > 0]
    if len(some) == 0:
        return np.ones_like(flows)
    most = max(float(np.median(some)), ENOUGH_FLOWS)
    weights: Counts = np.minimum(1.0, most / np.maximum(flows, 1e-300))
    return weights


def size_distribution(finished: Counts, running: Counts) -> LogHistogram:
    """Flow sizes from finished flows and flows that still run: the product-limit estimate on the bins.

    Finished flows alone understate the large sizes: the longest flows are those still running. A running flow that has
    attained x bytes is an observation "larger than x", censored at x. With d_b flows finished in bin b and n_b that
    reached it (finished or running, in b or beyond), the share that goes on beyond b is 1 - d_b / n_b, and the
    distribution is the product of those shares (Kaplan and Meier 1958). Where the largest observations are running
    ones, they count as ending where they are (Efron 1967), so what is left of the bias is an understatement.

    Args:
        finished: weights of finished flows per bin, shape (BINS,).
        running: weights of running flows at the bin of their attained size, shape (BINS,).

    Returns:
        A histogram of the distribution's shape; its total is a resolution, not a number of flows. Empty if nothing
        was observed.
    """
    observed = finished + running
    reached = np.cumsum(observed[::-1])[::-1]
    if reached[0] <= 0:
        return LogHistogram()
    ended = finished.copy()
    last = int(np.flatnonzero(observed)[-1])
    ended[last] = observed[last]
    with np.errstate(invalid="ignore", divide="ignore"):
        ends_here = np.where(reached > 0, ended / reached, 0.0)
    ends_here = np.clip(ends_here, 0.0, 1.0)
    alive = np.concatenate(([1.0], np.cumprod(1.0 - ends_here)[:-1]))
    share = alive * ends_here
    return LogHistogram(np.rint(share / share.sum() * _RESOLUTION).astype(np.int64))
