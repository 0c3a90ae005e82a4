"""A trace: which flow of what size starts when, from which host to which.

Every generator and importer returns one, and the engine runs one.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fabricpilot.errors import UsageError


@dataclass(frozen=True, eq=False)
class Trace:
    """Flows in order of their start; all arrays have shape (n,).

    Attributes:
        start_s: float64, non-decreasing, seconds from the beginning.
        size_bytes: int64, payload bytes, at least 1.
        source: int32, number of the sending host (0 where not given).
        destination: int32, number of the receiving host (0 where not given).

    Raises:
        UsageError: no flows, arrays of different length, not finite, not ascending, or sizes below 1 byte.
    """

    start_s: npt.NDArray[np.float64]
    size_bytes: npt.NDArray[np.int64]
    source: npt.NDArray[np.int32]
    destination: npt.NDArray[np.int32]

    def __post_init__(self) -> None:
        n = len(self.start_s)
        if n == 0:
            raise UsageError("the trace holds no flows; at least one is needed")
        if any(a.shape != (n,) for a in (self.size_bytes, self.source, self.destination)):
            raise UsageError("a trace needs one start, size, source and destination per flow")
        if not np.isfinite(self.start_s).all():
            raise UsageError("a start time of the trace is not a finite number")
        if (np.diff(self.start_s) < 0).any() or self.start_s[0] < 0:
            raise UsageError("start times of a trace must ascend from 0")
        if int(self.size_bytes.min()) < 1:
            raise UsageError(f"a flow of {int(self.size_bytes.min())} bytes; every flow has at least 1")
        if int(min(self.source.min(), self.destination.min())) < 0:
            raise UsageError("host numbers of a trace must not be negative")

    @classmethod
    def of(
        cls,
        start_s: npt.ArrayLike,
        size_bytes: npt.ArrayLike,
        source: npt.ArrayLike | None = None,
        destination: npt.ArrayLike | None = None,
    ) -> "Trace":
        """A trace from any arrays of one length, sorted by start (ties keep their order)."""
        start = np.asarray(start_s, np.float64)
        order = np.argsort(start, kind="stable")
        hosts = [
            np.zeros(len(start), np.int32) if h is None else np.asarray(h, np.int32) for h in (source, destination)
        ]
        return cls(start[order], np.asarray(size_bytes, np.int64)[order], hosts[0][order], hosts[1][order])

    def shifted(self, seconds: float) -> "Trace":
        """The same flows, all later by `seconds`."""
        return replace(self, start_s=self.start_s + seconds)

    def __len__(self) -> int:
        return len(self.start_s)

    @property
    def total_bytes(self) -> int:
        """Payload of all flows together."""
        return int(self.size_bytes.sum())

    def load(self, rate_bps: float) -> float:
        """Payload over what a link of `rate_bps` carries between the first and the last start."""
        span_s = float(self.start_s[-1] - self.start_s[0])
        return float("inf") if span_s == 0 else self.total_bytes * 8 / (span_s * rate_bps)
