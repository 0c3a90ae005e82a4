"""Levels, thresholds and DSCP code points: the few numbers that both kernel and central act on.

K strict priorities, level 0 served first; K-1 ascending byte counts separate them. Everything that
accepts thresholds goes through `Thresholds`, so that no other place has to check them.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from fabricpilot.errors import UsageError

MIN_LEVELS = 2
MAX_LEVELS = 8  # three bits of 802.1p, and what common switch ASICs have
DEFAULT_LEVELS = 4
TURNS_LEVELS = 3  # least for turns: short flows, the long flow whose turn it is, those that wait

MAX_THRESHOLD_BYTES = 2**62  # far beyond any flow, and safe in signed 64-bit arithmetic
MAX_DSCP = 63

DscpPreset = Literal["class-selectors", "802.1p"]


@dataclass(frozen=True)
class Thresholds:
    """K-1 strictly ascending positive byte counts; the level of a flow is how many of them it has reached.

    Raises:
        UsageError: wrong count, not ascending, not positive, or beyond `MAX_THRESHOLD_BYTES`.
    """

    bytes: tuple[int, ...]

    def __post_init__(self) -> None:
        given = self.bytes
        if not MIN_LEVELS <= len(given) + 1 <= MAX_LEVELS:
            raise UsageError(
                f"{len(given)} thresholds make {len(given) + 1} levels; "
                f"give {MIN_LEVELS - 1} to {MAX_LEVELS - 1} thresholds"
            )
        if any(isinstance(t, bool) or not isinstance(t, int) for t in given):
            raise UsageError(f"thresholds {list(given)} must be whole numbers of bytes")
        if given[0] < 1 or given[-1] > MAX_THRESHOLD_BYTES:
            raise UsageError(f"thresholds {list(given)} must lie between 1 and {MAX_THRESHOLD_BYTES} bytes")
        if any(low >= high for low, high in pairwise(given)):
            raise UsageError(f"thresholds {list(given)} must ascend strictly, for example 20480,1048576,8388608")

    @classmethod
    def of(cls, values: Iterable[int]) -> "Thresholds":
        """Thresholds from any iterable of byte counts."""
        return cls(tuple(values))

    @property
    def levels(self) -> int:
        """K, the number of levels these thresholds separate."""
        return len(self.bytes) + 1

    def level_of(self, attained_bytes: int) -> int:
        """The level of a flow that has sent `attained_bytes` so far (0 is served first)."""
        return bisect_right(self.bytes, attained_bytes)


# For a host that was told nothing: what the exact optimiser gives for web search at load 0.8, the mix of short and long
# flows that punishes wrong thresholds most. Objective slowdown, which keeps every level in use.
# fabricpilot thresholds --cdf websearch_dctcp_bytes_trafficgenerator --load 0.8 --objective slowdown --queues K
_DEFAULT_THRESHOLDS = {
    2: (1_781_062,),
    3: (322_402, 5_000_000),
    4: (135_134, 2_000_000, 10_000_000),
    5: (113_564, 1_604_586, 4_664_009, 10_000_000),
    6: (73_764, 555_965, 1_954_159, 4_829_083, 10_000_000),
    7: (37_829, 176_430, 834_211, 2_000_000, 4_829_083, 10_000_000),
    8: (11_841, 68_014, 200_428, 860_090, 2_000_000, 4_829_083, 10_000_000),
}


def default_thresholds(levels: int) -> Thresholds:
    """Thresholds for K levels for a host that was told nothing.

    Raises:
        UsageError: `levels` outside 2..8.
    """
    check_levels(levels)
    return Thresholds(_DEFAULT_THRESHOLDS[levels])


def default_dscp(levels: int) -> tuple[int, ...]:
    """One class selector (RFC 2474) per level, so that 802.1p priority falls with the level.

    K = 4 gives CS4, CS3, CS2, CS1. Only K = 8 has to use CS0, for its last level; unmarked traffic is
    otherwise told apart from ours.
    """
    check_levels(levels)
    return tuple(8 * (min(levels, 7) - level) for level in range(levels))


# What IEEE 802.1Q recommends for a port with K traffic classes ("Recommended priority to traffic class mappings"),
# turned round: for each class from the top, the lowest 802.1p priority a switch maps to it. Priority 1 (background)
# ranks below 0 (best effort). Levels marked so get a queue each on any switch that keeps to the table.
_PCP_BY_LEVEL = {
    2: (4, 1),
    3: (6, 4, 1),
    4: (6, 4, 2, 1),
    5: (7, 6, 4, 2, 1),
    6: (7, 6, 4, 2, 0, 1),
    7: (7, 6, 4, 3, 2, 0, 1),
    8: (7, 6, 5, 4, 3, 2, 0, 1),
}


def preset_dscp(preset: DscpPreset, levels: int) -> tuple[int, ...]:
    """The code points of a preset, one per level: class selectors, from whose upper bits a switch reads 802.1p.

    Args:
        preset: "class-selectors" (`default_dscp`), for switches whose queues follow the class selector; "802.1p", for
            switches that have K queues and map 802.1p priorities to them as IEEE 802.1Q recommends.
        levels: K.

    Raises:
        UsageError: `levels` outside 2..8.
    """
    if preset == "class-selectors":
        return default_dscp(levels)
    check_levels(levels)
    return tuple(8 * priority for priority in _PCP_BY_LEVEL[levels])


def check_levels(levels: int) -> None:
    """Raise `UsageError` unless K is 2 to 8."""
    if not MIN_LEVELS <= levels <= MAX_LEVELS:
        raise UsageError(f"levels = {levels}; the number of levels must be {MIN_LEVELS} to {MAX_LEVELS}")


def check_dscp(dscp: Sequence[int], levels: int) -> None:
    """Raise `UsageError` unless `dscp` has one distinct code point 0..63 per level."""
    if len(dscp) != levels or len(set(dscp)) != levels or any(not 0 <= d <= MAX_DSCP for d in dscp):
        raise UsageError(f"dscp = {list(dscp)}; give {levels} distinct code points from 0 to {MAX_DSCP}, one per level")
