"""What the threshold agent sees, as pure functions: AuTO's 700 features, and a compact summary of any number of flows.

All features lie in [0, 1]. Sizes and times are on a log scale, because both span six orders of magnitude. The compact
summary states sizes in units of their mean: how thresholds should stand does not change when all sizes grow alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fabricpilot.histogram import LogHistogram, bin_edges
from fabricpilot.levels import MAX_LEVELS, Thresholds
from simulator.arrays import Floats, Ints
from simulator.results import FlowResults
from simulator.statistics import BUCKETS

Features = npt.NDArray[np.float32]

PAPER_FLOWS = 100
PAPER_FEATURES = 7  # source, destination, source port, destination port, protocol, FCT, size

SIZE_BINS = 32  # one per factor of two, from 2^-18 to 2^14 mean sizes
_BELOW_MEAN_LOG2 = 18.0
COMPACT = 2 * SIZE_BINS + 2 + (MAX_LEVELS - 1) + 2 + (MAX_LEVELS - 1) + len(BUCKETS) + 3
LEVELS_AT = slice(2 * SIZE_BINS + 2, 2 * SIZE_BINS + 2 + MAX_LEVELS - 1)  # of the compact summary: `level_mask`

_MAX_SIZE_LOG2 = 30.0  # 1 GiB
_FCT_DECADES = (-6.0, 2.0)  # 1 us to 100 s
_MAX_SLOWDOWN_LOG2 = 10.0
_MOST_LOAD = 0.99


@dataclass(frozen=True)
class Experience:
    """What finished flows experienced.

    Attributes:
        slowdown: mean per bucket (`simulator.statistics.BUCKETS`), 0 where no flow finished.
        mean_slowdown: of all.
        p99_slowdown: of all.
    """

    slowdown: Sequence[float]
    mean_slowdown: float
    p99_slowdown: float

    @classmethod
    def of(cls, results: FlowResults) -> "Experience":
        """Of simulated flows; at least one."""
        slowdown, found, low = results.slowdown, [], 0.0
        for _, high in BUCKETS:
            inside = (results.size_bytes > low) & (results.size_bytes <= high)
            found.append(float(slowdown[inside].mean()) if inside.any() else 0.0)
            low = high
        return cls(found, float(slowdown.mean()), float(np.percentile(slowdown, 99)))


def log_size(size_bytes: Floats) -> Floats:
    """Sizes from 1 byte to 1 GiB as [0, 1]."""
    scaled: Floats = np.clip(np.log2(np.maximum(size_bytes, 1.0)) / _MAX_SIZE_LOG2, 0.0, 1.0)
    return scaled


def log_time(seconds: Floats) -> Floats:
    """Times from 1 us to 100 s as [0, 1]."""
    low, high = _FCT_DECADES
    scaled: Floats = np.clip((np.log10(np.maximum(seconds, 1e-12)) - low) / (high - low), 0.0, 1.0)
    return scaled


def relative(size_bytes: npt.ArrayLike, mean_bytes: float) -> Floats:
    """Sizes from 2^-18 to 2^14 of the mean as [0, 1], on a log scale."""
    octaves = np.log2(np.maximum(np.asarray(size_bytes, np.float64), 1e-3) / mean_bytes)
    scaled: Floats = np.clip((octaves + _BELOW_MEAN_LOG2) / SIZE_BINS, 0.0, 1.0)
    return scaled


def level_mask(levels: int) -> Features:
    """1 for each of the K-1 thresholds there are, then 0; shape (7,)."""
    return (np.arange(MAX_LEVELS - 1) < levels - 1).astype(np.float32)


def mean_bytes(sizes: LogHistogram) -> float:
    """Mean of a size histogram, uniform inside its bins; 1 when it is empty."""
    edges = bin_edges()
    return float(sizes.counts @ ((edges[1:] + edges[:-1]) / 2) / sizes.total) if sizes.total else 1.0


def paper(results: FlowResults, ports: Ints, hosts: int) -> Features:
    """AuTO's state: the last 100 finished flows x 7 features, zero-padded, flat; shape (700,).

    Args:
        results: finished short flows of the step.
        ports: source port of each, shape (n,).
        hosts: how many there are, to scale addresses.
    """
    last = slice(max(len(results) - PAPER_FLOWS, 0), len(results))
    n = len(results.flow[last])
    service, tcp = np.full(n, 5001.0), np.full(n, 6.0)  # all requests are to one service
    addresses = (results.host[last] / hosts, results.destination[last] / hosts)
    return paper_rows(*addresses, ports[last], service, tcp, results.fct_s[last], results.size_bytes[last])


def paper_rows(
    source: Floats,
    destination: Floats,
    source_port: npt.ArrayLike,
    destination_port: npt.ArrayLike,
    protocol: npt.ArrayLike,
    fct_s: Floats,
    size_bytes: Floats,
) -> Features:
    """The 700 features of at most 100 flows, each argument of shape (n,); addresses are in [0, 1] already."""
    rows = np.zeros((PAPER_FLOWS, PAPER_FEATURES), np.float32)
    columns = (
        source,
        destination,
        np.asarray(source_port) / 65_536,
        np.asarray(destination_port) / 65_536,
        np.asarray(protocol) / 255,
        log_time(fct_s),
        log_size(size_bytes),
    )
    rows[: len(size_bytes)] = np.stack(columns, axis=1)
    return rows.ravel()


def compact(
    sizes: LogHistogram, load: float, rate_bps: float, thresholds: Thresholds, experience: Experience | None
) -> Features:
    """A summary of any number of flows for any K: shape (COMPACT,) = (90,).

    | index | meaning |
    |---|---|
    | 0-31 | share of flows per factor of two in size, from 2^-18 mean sizes |
    | 32-63 | share of their bytes in the same bins |
    | 64, 65 | offered load; log2 of 1 / (1 - load), over 7 |
    | 66-72 | 1 for each of the K-1 thresholds there are, else 0 |
    | 73, 74 | mean size (log); its time on the link (log) |
    | 75-81 | thresholds in force in mean sizes (`relative`); 1 where there is none |
    | 82-86 | log2 of the mean slowdown per size bucket, over 10; 0 where no flow finished |
    | 87, 88 | the same of the mean slowdown and of its 99th percentile over all flows |
    | 89 | 1 if the slowdowns are known |

    Args:
        sizes: of finished flows.
        load: payload over link rate.
        rate_bps: of the link; 0: unknown.
        thresholds: in force.
        experience: what flows experienced under them, if known.
    """
    mean = mean_bytes(sizes)
    occupied = np.flatnonzero(sizes.counts)
    edges = bin_edges()
    middles = (edges[occupied] + edges[occupied + 1]) / 2
    flows = sizes.counts[occupied].astype(np.float64)
    # Each small bin is shared between the two features it lies between, so that nothing jumps as the mean moves.
    at = relative(middles, mean) * (SIZE_BINS - 1)
    low = np.minimum(at.astype(np.int64), SIZE_BINS - 2)
    shares = []
    for weight in (flows, flows * middles):
        part = weight / max(weight.sum(), 1e-300)
        upper = part * (at - low)
        shares.append(
            np.bincount(low, part - upper, minlength=SIZE_BINS) + np.bincount(low + 1, upper, minlength=SIZE_BINS)
        )
    busy = min(max(load, 0.0), _MOST_LOAD)
    in_force = np.ones(MAX_LEVELS - 1)
    in_force[: thresholds.levels - 1] = relative(thresholds.bytes, mean)
    seen = experience or Experience((0.0,) * len(BUCKETS), 0.0, 0.0)
    slow = np.array([*seen.slowdown, seen.mean_slowdown, seen.p99_slowdown], np.float64)
    parts: tuple[npt.ArrayLike, ...] = (
        *shares,
        [busy, -np.log2(1 - busy) / 7],
        level_mask(thresholds.levels),
        [float(log_size(np.array(mean))), float(log_time(np.array(mean * 8 / rate_bps))) if rate_bps > 0 else 0.0],
        in_force,
        np.log2(np.maximum(slow, 1.0)) / _MAX_SLOWDOWN_LOG2,
        [float(experience is not None)],
    )
    features: Features = np.clip(np.concatenate([np.asarray(part) for part in parts]), 0.0, 1.0).astype(np.float32)
    return features
