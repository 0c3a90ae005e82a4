"""Mergeable log-histograms of positive values (bytes, microseconds): what a report says of a distribution.

Eight bins per factor of two (bins 9 % wide), so a whole distribution is at most `BINS` small numbers however
many flows it holds, and histograms of many hosts add up. Only occupied bins travel on the wire.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

BINS_PER_OCTAVE = 8
BINS = 48 * BINS_PER_OCTAVE  # up to 2^48: 281 TB, or nine years in microseconds


class LogHistogram:
    """Counts per log-spaced bin; bin b holds values in [2^(b/8), 2^((b+1)/8))."""

    def __init__(self, counts: npt.NDArray[np.int64] | None = None) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(BINS, np.int64) if counts is None else counts

    @classmethod
    def of(cls, values: npt.ArrayLike) -> "LogHistogram":
        """Histogram of `values` (shape (n,)); values below 1 count as 1."""
        return cls(np.bincount(bin_of(values), minlength=BINS).astype(np.int64))

    @classmethod
    def from_sparse(cls, sparse: Mapping[int, int]) -> "LogHistogram":
        """Inverse of `sparse`.

        Raises:
            ValueError: a bin outside 0..BINS-1 or a negative count.
        """
        counts = np.zeros(BINS, np.int64)
        for index, count in sparse.items():
            if not 0 <= index < BINS or not 0 <= count < 2**62:
                raise ValueError(f"histogram bin {index} with count {count}")
            counts[index] = count
        return cls(counts)

    def sparse(self) -> dict[int, int]:
        """The occupied bins, {bin: count}."""
        return {int(b): int(self.counts[b]) for b in np.flatnonzero(self.counts)}

    def add(self, other: "LogHistogram") -> None:
        """Add the counts of `other` to this histogram."""
        self.counts += other.counts

    @property
    def total(self) -> int:
        """Number of values counted."""
        return int(self.counts.sum())

    def quantile(self, q: float) -> float:
        """Value (geometric middle of its bin) below which a share `q` of the values lies; NaN when empty."""
        total = self.total
        if total == 0:
            return float("nan")
        index = int(np.searchsorted(np.cumsum(self.counts), q * total, side="left"))
        return float(bin_middles()[min(index, BINS - 1)])


def bin_of(values: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Bin index of each value (shape kept)."""
    clipped = np.maximum(np.asarray(values, np.float64), 1.0)
    bins: npt.NDArray[np.int64] = np.minimum(np.floor(np.log2(clipped) * BINS_PER_OCTAVE), BINS - 1).astype(np.int64)
    return bins


def bin_edges() -> npt.NDArray[np.float64]:
    """Lower edges of all bins and the upper edge of the last, shape (BINS + 1,)."""
    edges: npt.NDArray[np.float64] = np.exp2(np.arange(BINS + 1, dtype=np.float64) / BINS_PER_OCTAVE)
    return edges


def bin_middles() -> npt.NDArray[np.float64]:
    """Geometric middle of every bin, shape (BINS,)."""
    middles: npt.NDArray[np.float64] = np.exp2((np.arange(BINS, dtype=np.float64) + 0.5) / BINS_PER_OCTAVE)
    return middles
