"""Between central's words and the agent's numbers: summary -> state, action -> thresholds. Pure functions.

Actions are shifts of thresholds on a log scale around a base: threshold k is base[k] * exp(reach * action[k]), sorted,
so every action is a valid vector, and 0 is the base. One network serves every K: there are always seven elements, and
those beyond K-1 mean nothing (mask 0, base at infinity). Bases:

    exact   the exact optimiser's thresholds for the sizes and load reported: learning starts where computing ends
    split   as many flows end in each level: needs no model
    middle  the middle of 1 KB to 100 MB for all: actions are absolute, as AuTO's are

Encodings: `compact` (90 features of `simulator.envs.observations` and the base), or `paper` (AuTO's 700).
"""

import ipaddress
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from central.policy.base import GroupSummary
from central.thresholds import exact
from central.thresholds.optimum import ascending, usable_load
from fabricpilot.histogram import LogHistogram, bin_middles
from fabricpilot.levels import MAX_LEVELS, Thresholds, default_thresholds
from simulator.arrays import Floats
from simulator.envs import observations
from simulator.envs.observations import COMPACT, PAPER_FEATURES, PAPER_FLOWS, Experience
from simulator.envs.thresholds import HIGHEST_BYTES, LOWEST_BYTES
from simulator.schemes import equal_split
from simulator.workloads.distribution import SizeDistribution

Singles = npt.NDArray[np.float32]
Base = Literal["exact", "split", "between", "middle"]
Kind = Literal["compact", "paper"]

ACTIONS = MAX_LEVELS - 1
_RESOLUTION = 2**40  # counts in a histogram that is a distribution
_MOST_BYTES = 2.0**50  # of a threshold: beyond any flow


@dataclass(frozen=True)
class Encoding:
    """How an agent sees and acts.

    Attributes:
        kind: which state.
        base: what actions are relative to.
        reach: natural logarithm of the largest shift: 2.1 moves a threshold within a factor of 8. The base `middle`
            has its own, which covers all from 1 KB to 100 MB.
        objective: of the exact base, a key of `central.thresholds.optimum.OBJECTIVES`.
    """

    kind: Kind = "compact"
    base: Base = "exact"
    reach: float = 2.1
    objective: str = "fct"

    @property
    def features(self) -> int:
        """Length of a state."""
        return PAPER_FLOWS * PAPER_FEATURES if self.kind == "paper" else COMPACT + ACTIONS

    @property
    def span(self) -> float:
        """The reach that holds for the base."""
        return math.log(HIGHEST_BYTES / LOWEST_BYTES) / 2 if self.base == "middle" else self.reach

    def base_for(self, summary: GroupSummary) -> Floats:
        """The base in bytes, shape (7,); infinite beyond K-1.

        Raises:
            UsageError: no flow sizes to derive it from.
        """
        base = np.full(ACTIONS, np.inf)
        used = slice(0, summary.levels - 1)
        if self.base == "middle":
            base[used] = math.sqrt(LOWEST_BYTES * HIGHEST_BYTES)
        elif self.base == "split":
            base[used] = _even(summary.sizes, summary)
        elif self.base == "between":
            base[used] = np.sqrt(_even(summary.sizes, summary) * _even(_by_bytes(summary.sizes), summary))
        else:
            counts = summary.sizes.counts
            found = _optimum(counts.tobytes(), round(usable_load(summary.load), 3), summary.levels, self.objective)
            base[used] = found.bytes
        return base

    def state_of(self, summary: GroupSummary, base: Floats) -> Singles:
        """The state, shape (features,)."""
        if self.kind == "paper":
            return _paper(summary)
        seen = summary.outcome
        experience = Experience(seen.slowdown, seen.mean_slowdown, seen.p99_slowdown) if seen else None
        thresholds = summary.thresholds
        if thresholds is None or thresholds.levels != summary.levels:
            thresholds = default_thresholds(summary.levels)
        told = observations.compact(summary.sizes, summary.load, summary.link_rate_bps, thresholds, experience)
        where = observations.relative(np.minimum(base, _MOST_BYTES), observations.mean_bytes(summary.sizes))
        return np.concatenate((told, np.where(np.isfinite(base), where, 1.0).astype(np.float32)))

    def thresholds_at(self, base: Floats, action: npt.ArrayLike) -> Thresholds:
        """The thresholds of an action in [-1, 1]^7, ascending whatever it is."""
        used = np.isfinite(base)
        moved = base[used] * np.exp(self.span * np.clip(np.asarray(action, np.float64)[used], -1, 1))
        return ascending(sorted(np.clip(moved, 1.0, _MOST_BYTES).tolist()))

    def action_at(self, base: Floats, thresholds: Thresholds) -> Singles:
        """The action that comes nearest to `thresholds`; 0 beyond K-1. Inverse of `thresholds_at` within the reach."""
        action = np.zeros(ACTIONS, np.float32)
        n = thresholds.levels - 1
        action[:n] = np.clip(np.log(np.array(thresholds.bytes) / base[:n]) / self.span, -1, 1)
        return action


def _even(sizes: LogHistogram, summary: GroupSummary) -> Floats:
    """Thresholds that put as much of `sizes` into each level, shape (K-1,)."""
    sizes_of = SizeDistribution.from_histogram(sizes, summary.group)
    return np.array(equal_split(sizes_of, summary.levels).bytes, np.float64)


def _by_bytes(sizes: LogHistogram) -> LogHistogram:
    """The distribution of the size of the flow that a byte belongs to."""
    if not sizes.total:
        return sizes
    share = sizes.counts * bin_middles()
    return LogHistogram(np.rint(share / share.sum() * _RESOLUTION).astype(np.int64))


def mask_of(levels: int) -> Singles:
    """1 for each action that means something with K levels."""
    return observations.level_mask(levels)


@lru_cache(maxsize=256)
def _optimum(counts: bytes, load: float, levels: int, objective: str) -> Thresholds:
    sizes = SizeDistribution.from_histogram(LogHistogram(np.frombuffer(counts, np.int64)), "reported sizes")
    return exact.optimise(sizes, load, levels, objective).thresholds


def _paper(summary: GroupSummary) -> Singles:
    """AuTO's state of the sample: addresses as shares of the IPv4 space (the last 32 bits of longer ones)."""
    flows = summary.sample[-PAPER_FLOWS:]
    ends = [[_place(text) for text in (f.source, f.destination)] for f in flows]
    table = np.array(
        [[f.source_port, f.destination_port, f.protocol, f.duration_us, f.size_bytes] for f in flows], np.float64
    ).reshape(-1, 5)
    addresses = np.array(ends, np.float64).reshape(-1, 2)
    return observations.paper_rows(
        addresses[:, 0], addresses[:, 1], table[:, 0], table[:, 1], table[:, 2], table[:, 3] / 1e6, table[:, 4]
    )


def _place(address: str) -> float:
    """Where an address lies among all, 0 to 1; what a host says may be none, and is 0 then."""
    try:
        return int(ipaddress.ip_address(address)) % 2**32 / 2**32
    except ValueError:
        return 0.0
