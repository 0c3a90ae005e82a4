"""Levels, thresholds and DSCP code points: the few numbers that both kernel and central act on.

K strict priorities, level 0 served first; K-1 ascending byte counts separate them. Everything that
accepts thresholds goes through `Thresholds`, so that no other place has to check them.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fabricpilot.errors import UsageError

MIN_LEVELS = 2
MAX_LEVELS = 8  # three bits of 802.1p, and what common switch ASICs have
DEFAULT_LEVELS = 4

MAX_THRESHOLD_BYTES = 2**62  # far beyond any flow, and safe in signed 64-bit arithmetic
MAX_DSCP = 63


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


# Used until anything better was learned or configured: log-spaced between a few packets and the size
# at which common workloads turn from many short to few long flows.
_FIRST_DEFAULT_BYTES = 20_480
_LAST_DEFAULT_BYTES = 8 << 20


def default_thresholds(levels: int) -> Thresholds:
    """Log-spaced thresholds for K levels, for a host that was told nothing.

    Raises:
        UsageError: `levels` outside 2..8.
    """
    check_levels(levels)
    if levels == MIN_LEVELS:
        return Thresholds((_FIRST_DEFAULT_BYTES,))
    ratio = _LAST_DEFAULT_BYTES / _FIRST_DEFAULT_BYTES
    return Thresholds.of(round(_FIRST_DEFAULT_BYTES * ratio ** (i / (levels - 2))) for i in range(levels - 1))


def default_dscp(levels: int) -> tuple[int, ...]:
    """One class selector (RFC 2474) per level, so that 802.1p priority falls with the level.

    K = 4 gives CS4, CS3, CS2, CS1. Only K = 8 has to use CS0, for its last level; unmarked traffic is
    otherwise told apart from ours.
    """
    check_levels(levels)
    return tuple(8 * (min(levels, 7) - level) for level in range(levels))


def check_levels(levels: int) -> None:
    """Raise `UsageError` unless K is 2 to 8."""
    if not MIN_LEVELS <= levels <= MAX_LEVELS:
        raise UsageError(f"levels = {levels}; the number of levels must be {MIN_LEVELS} to {MAX_LEVELS}")


def check_dscp(dscp: Sequence[int], levels: int) -> None:
    """Raise `UsageError` unless `dscp` has one distinct code point 0..63 per level."""
    if len(dscp) != levels or len(set(dscp)) != levels or any(not 0 <= d <= MAX_DSCP for d in dscp):
        raise UsageError(f"dscp = {list(dscp)}; give {levels} distinct code points from 0 to {MAX_DSCP}, one per level")
