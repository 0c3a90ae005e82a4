"""What the threshold agent sees, as pure functions: AuTO's 700 features, and a compact summary of any number of flows.

All features lie in [0, 1]. Sizes and times are on a log scale, because both span six orders of magnitude.
"""

import numpy as np
import numpy.typing as npt

from simulator.arrays import Floats, Ints
from simulator.results import FlowResults
from simulator.statistics import BUCKETS

Features = npt.NDArray[np.float32]

PAPER_FLOWS = 100
PAPER_FEATURES = 7  # source, destination, source port, destination port, protocol, FCT, size

SIZE_BINS = 24  # of the compact size histogram, one per factor of two from 64 bytes
_FIRST_BIN = 6
_MAX_SIZE_LOG2 = 30.0  # 1 GiB
_FCT_DECADES = (-6.0, 2.0)  # 1 us to 100 s
_MAX_SLOWDOWN_LOG2 = 10.0
_BUCKET_ENDS = np.array([high for _, high in BUCKETS])


def log_size(size_bytes: Floats) -> Floats:
    """Sizes from 1 byte to 1 GiB as [0, 1]."""
    scaled: Floats = np.clip(np.log2(np.maximum(size_bytes, 1.0)) / _MAX_SIZE_LOG2, 0.0, 1.0)
    return scaled


def log_time(seconds: Floats) -> Floats:
    """Times from 1 us to 100 s as [0, 1]."""
    low, high = _FCT_DECADES
    scaled: Floats = np.clip((np.log10(np.maximum(seconds, 1e-12)) - low) / (high - low), 0.0, 1.0)
    return scaled


def paper(results: FlowResults, ports: Ints, hosts: int) -> Features:
    """AuTO's state: the last 100 finished flows x 7 features, zero-padded, flat; shape (700,).

    Args:
        results: finished short flows of the step.
        ports: source port of each, shape (n,).
        hosts: how many there are, to scale addresses.
    """
    last = slice(max(len(results) - PAPER_FLOWS, 0), len(results))
    rows = np.zeros((PAPER_FLOWS, PAPER_FEATURES), np.float32)
    n = len(results.flow[last])
    rows[:n, 0] = results.host[last] / hosts
    rows[:n, 1] = results.destination[last] / hosts
    rows[:n, 2] = ports[last] / 65_536
    rows[:n, 3] = 5001 / 65_536  # all requests are to one service
    rows[:n, 4] = 6 / 255  # TCP
    rows[:n, 5] = log_time(results.fct_s[last])
    rows[:n, 6] = log_size(results.size_bytes[last])
    return rows.ravel()


def compact_length(levels: int) -> int:
    """Length of the compact observation for K levels."""
    return SIZE_BINS + 2 * len(BUCKETS) + 1 + levels - 1


def compact(results: FlowResults, load: float, thresholds: Floats) -> Features:
    """A summary of the step: shape (compact_length(K),).

    Size histogram (24, shares), share of flows per size bucket (5), log mean slowdown per bucket (5), offered load
    (1, at most 1), thresholds in force (K-1).
    """
    sizes, slowdown = results.size_bytes, results.slowdown
    bins = np.clip(np.log2(np.maximum(sizes, 1.0)).astype(np.int64) - _FIRST_BIN, 0, SIZE_BINS - 1)
    bucket = np.searchsorted(_BUCKET_ENDS, sizes)
    flows = np.bincount(bucket, minlength=len(BUCKETS))
    total = np.bincount(bucket, slowdown, minlength=len(BUCKETS))
    slow = np.log2(np.where(flows > 0, total, 1.0) / np.maximum(flows, 1)) / _MAX_SLOWDOWN_LOG2
    everything = max(len(sizes), 1)
    parts = (
        np.bincount(bins, minlength=SIZE_BINS) / everything,
        flows / everything,
        slow,
        [load],
        log_size(thresholds),
    )
    features: Features = np.concatenate(parts).clip(0.0, 1.0).astype(np.float32)
    return features
