"""When flows start: arrival processes that turn a flow-size distribution and a load into a trace.

Load is payload over link rate, as PIAS and AuTO state it: arrivals per second = load x rate / (8 x mean size).
All randomness comes from the generator that is passed in, so one seed gives one trace.
"""

import math

import numpy as np
import numpy.typing as npt

from fabricpilot.errors import UsageError
from simulator.workloads.distribution import SizeDistribution
from simulator.workloads.trace import Trace

BURSTY_SIGMA = 2.0  # of log inter-arrival times; Homa and Aeolus use log-normal arrivals with sigma 2 for bursts


def poisson(
    distribution: SizeDistribution,
    load: float,
    rate_bps: float,
    rng: np.random.Generator,
    *,
    count: int | None = None,
    duration_s: float | None = None,
    overload: bool = False,
) -> Trace:
    """Poisson arrivals at `load` of a link of `rate_bps`.

    Give `count` (flows) or `duration_s`; hosts are all 0 (see `simulator.workloads.placement`).

    Raises:
        UsageError: load not positive, or at or over 1 without `overload`; count and duration both or neither; no flows.
    """
    gap_s = mean_gap_s(distribution, load, rate_bps, overload)
    if (count is None) == (duration_s is None):
        raise UsageError("give either a number of flows or a duration, not both and not neither")
    if count is not None:
        _check_count(count)
        start_s = np.cumsum(rng.exponential(gap_s, count))
    else:
        assert duration_s is not None
        _check_duration(duration_s)
        # Given their number, the arrivals of a Poisson process are uniform.
        start_s = np.sort(rng.uniform(0, duration_s, int(rng.poisson(duration_s / gap_s))))
        if len(start_s) == 0:
            raise UsageError(f"no flow arrives in {duration_s:g} s at load {load:g}; choose a longer duration")
    return Trace.of(start_s, distribution.sample(rng, len(start_s)))


def bursty(
    distribution: SizeDistribution,
    load: float,
    rate_bps: float,
    rng: np.random.Generator,
    *,
    count: int,
    sigma: float = BURSTY_SIGMA,
    overload: bool = False,
) -> Trace:
    """Arrivals with log-normal gaps (shape `sigma`), the same mean rate as `poisson`; larger `sigma`, longer bursts.

    Raises:
        UsageError: as `poisson`, or sigma not positive.
    """
    if not (math.isfinite(sigma) and sigma > 0):
        raise UsageError(f"sigma {sigma} of bursty arrivals must be a positive number")
    _check_count(count)
    gap_s = mean_gap_s(distribution, load, rate_bps, overload)
    gaps = rng.lognormal(math.log(gap_s) - sigma * sigma / 2, sigma, count)  # its mean is gap_s
    return Trace.of(np.cumsum(gaps), distribution.sample(rng, count))


def incast(
    senders: int,
    size_bytes: int,
    period_s: float,
    rounds: int,
    rng: np.random.Generator,
    *,
    jitter_s: float = 0.0,
    destination: int = 0,
) -> Trace:
    """`rounds` times, every `period_s`, hosts `destination+1 ...` all send `size_bytes` to `destination` at once.

    `jitter_s` spreads the starts of a round uniformly.

    Raises:
        UsageError: counts below 1, or times that are not positive (jitter: not negative).
    """
    if senders < 1 or rounds < 1 or size_bytes < 1:
        raise UsageError(f"incast of {senders} senders, {rounds} rounds, {size_bytes} bytes: each must be at least 1")
    _check_duration(period_s)
    if not (math.isfinite(jitter_s) and jitter_s >= 0):
        raise UsageError(f"incast jitter {jitter_s} s must be 0 or more")
    start_s = np.repeat(np.arange(rounds) * period_s, senders) + rng.uniform(0, jitter_s, rounds * senders)
    source: npt.NDArray[np.int32] = np.tile(np.arange(senders, dtype=np.int32) + destination + 1, rounds)
    return Trace.of(start_s, np.full(len(source), size_bytes), source, np.full(len(source), destination))


def mean_gap_s(distribution: SizeDistribution, load: float, rate_bps: float, overload: bool = False) -> float:
    """Mean seconds between arrivals that make `load` on a link of `rate_bps`.

    Raises:
        UsageError: load or rate not positive, or load at or over 1 without `overload`.
    """
    if not (math.isfinite(load) and load > 0):
        raise UsageError(f"load {load} must be a positive share of the link, for example 0.7")
    if load >= 1 and not overload:
        raise UsageError(f"load {load:g} is at or over 1, so queues grow without end; allow it with --overload")
    if not (math.isfinite(rate_bps) and rate_bps > 0):
        raise UsageError(f"link rate {rate_bps} bit/s must be positive")
    return distribution.mean_bytes * 8 / (load * rate_bps)


def _check_count(count: int) -> None:
    if count < 1:
        raise UsageError(f"{count} flows; at least 1 is needed")


def _check_duration(duration_s: float) -> None:
    if not (math.isfinite(duration_s) and duration_s > 0):
        raise UsageError(f"duration {duration_s} s must be a positive number of seconds")
