"""Which thresholds may leave central: a proposal becomes valid thresholds near the incumbent, or is refused.

What proposes may be wrong in any way, so nothing is taken for granted about the object.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from fabricpilot.errors import FabricpilotError
from fabricpilot.levels import Thresholds


class InadmissibleError(FabricpilotError):
    """A proposal that is no vector of thresholds; the text says why."""


@dataclass(frozen=True)
class Bounds:
    """What thresholds may be.

    Attributes:
        lowest_bytes: least threshold; below one segment thresholds tell flows from nothing.
        highest_bytes: greatest threshold; beyond the largest flows a level stays empty.
        max_step: factor by which a threshold may differ from the incumbent's.
    """

    lowest_bytes: int
    highest_bytes: int
    max_step: float


def admissible(proposed: object, levels: int, incumbent: Thresholds, bounds: Bounds) -> Thresholds:
    """The proposal, each value moved into its bounds.

    Args:
        proposed: `Thresholds`, or any iterable of K-1 numbers.
        levels: K of the group.
        incumbent: what the hosts use now.
        bounds: what is allowed.

    Raises:
        InadmissibleError: not K-1 finite numbers in ascending order.
    """
    values = _numbers(proposed)
    if len(values) != levels - 1:
        raise InadmissibleError(f"{len(values)} thresholds for K = {levels}, which needs {levels - 1}")
    if not all(map(math.isfinite, values)):
        raise InadmissibleError(f"thresholds {values} are not all finite")
    if any(low >= high for low, high in pairwise(values)):
        raise InadmissibleError(f"thresholds {values} do not ascend")
    moved: list[int] = []
    for value, now in zip(values, incumbent.bytes, strict=True):
        low = max(bounds.lowest_bytes, math.ceil(now / bounds.max_step))
        high = min(bounds.highest_bytes, math.floor(now * bounds.max_step))
        # An incumbent beyond the bounds (fixed by an operator) may stay where it is.
        within = min(max(value, min(low, now)), max(high, now))
        moved.append(max(round(within), moved[-1] + 1 if moved else 1))
    return Thresholds.of(moved)


def _numbers(proposed: object) -> list[float]:
    given = proposed.bytes if isinstance(proposed, Thresholds) else proposed
    if not isinstance(given, Iterable) or isinstance(given, str | bytes):
        raise InadmissibleError(f"a {type(proposed).__name__} is no list of thresholds")
    try:
        return [float(value) for value in given]
    except (TypeError, ValueError, OverflowError) as error:
        raise InadmissibleError(f"thresholds that are not numbers: {error}") from error
