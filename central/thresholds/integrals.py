"""Exact integrals of a piecewise-linear size distribution: everything the queueing formulas need of it.

`mlps.py` needs, of a flow size S, the survival function G(t) = P(S > t), its first two antiderivatives, the truncated
second moment E[min(S, t)^2] and weighted moments of the sizes in an interval. Between two points of the CDF each of
them is a polynomial (or a logarithm), so all are exact, atoms included: tabulate them once at the points, and look up.

Sizes are in units of the mean flow size, so that the arrival rate equals the load and no number is far from 1.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simulator.workloads.distribution import SizeDistribution

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Weight:
    """w(x) = (x + base)^-order; order 0, 1 or 2, x and base in mean flow sizes."""

    order: int = 0
    base: float = 0.0


class SizeIntegrals:
    """Integrals of one distribution; arguments and results in units of its mean, any shape, shape kept.

    Attributes:
        unit_bytes: the mean flow size in bytes; multiply sizes by it to get bytes.
        points: float64 (n + 1,), 0 and the distinct sizes above 0, ascending.
    """

    def __init__(self, sizes: SizeDistribution) -> None:
        self.unit_bytes = sizes.mean_bytes
        bytes_at = np.unique(np.concatenate(([0.0], sizes.sizes_bytes)))
        self.points: Floats = bytes_at / self.unit_bytes
        width = np.diff(self.points)
        right = 1.0 - sizes.cdf_at(bytes_at)  # G at each point
        left = 1.0 - _cdf_before(sizes, bytes_at)  # G just before it
        right[-1] = 0.0
        self._survival = right
        self._slope = np.append((left[1:] - right[:-1]) / width, 0.0)  # of G, up to the next point
        self._atom = np.append(0.0, left[1:] - right[1:])
        # Tail integrals, summed from the far end so that small tails keep their digits.
        tail = _sum_to_end(width * (right[:-1] + left[1:]) / 2)
        double = _sum_to_end(width * tail[1:] + width**2 * (right[:-1] / 6 + left[1:] / 3))
        self._tail, self._double_tail = tail, double
        low = self.points[:-1]
        second = 2 * width * (right[:-1] * (low / 2 + width / 6) + left[1:] * (low / 2 + width / 3))
        self._second = np.concatenate(([0.0], np.cumsum(second)))

    @property
    def largest(self) -> float:
        """The largest size."""
        return float(self.points[-1])

    @property
    def largest_bytes(self) -> float:
        """The same in bytes."""
        return self.largest * self.unit_bytes

    @property
    def smallest(self) -> float:
        """Infimum of the sizes that occur; 0 where they go down to 0."""
        reached = int(np.argmax(self._survival < 1.0))
        return float(self.points[max(reached - 1, 0) if self._slope[reached - 1] < 0 else reached])

    def grid_ratio(self, n: int) -> float:
        """Factor between two neighbours of `grid` before they are moved."""
        return float((self.largest / self._lowest) ** (1 / (n - 1)))

    def grid(self, n: int) -> Floats:
        """`n` sizes to try as thresholds, ascending, the last one the largest size.

        Log-spaced, but each (save the ends) moved to the strongest bend of the CDF that is nearer to it than to its
        neighbours: the best thresholds often stand just at one, and the cost rises steeply on both sides.
        """
        even = np.geomspace(self._lowest, self.largest, n)
        density = -self._slope
        bend = np.abs(np.diff(density)) * self.points[1:]  # flows per unit of log size
        bend += self._atom[1:] * n  # an atom is the strongest bend of all
        half = math.sqrt(self.grid_ratio(n))
        owner = np.searchsorted(even * half, self.points[1:], side="left")
        for at in np.argsort(bend):  # the strongest comes last
            if 0 < owner[at] < n - 1:
                even[owner[at]] = self.points[1 + at]
        return even

    @property
    def _lowest(self) -> float:
        """A size below which no threshold makes a difference: a byte, or half the smallest size."""
        return min(max(self.smallest / 2, 1 / self.unit_bytes), self.largest / 2)

    def survival(self, x: Floats) -> Floats:
        """G(x) = P(S > x)."""
        k, rest = self._locate(x)
        value: Floats = self._survival[k] + rest * self._slope[k]
        return value

    def tail(self, x: Floats) -> Floats:
        """Integral of G from x to infinity, or E[max(S - x, 0)]; then 1 - tail at x is E[min(S, x)]."""
        k, rest = self._locate(x)
        value: Floats = self._tail[k] - rest * (self._survival[k] + rest * self._slope[k] / 2)
        return value

    def double_tail(self, x: Floats) -> Floats:
        """Integral of `tail` from x to infinity."""
        k, rest = self._locate(x)
        cubic = self._survival[k] / 2 + rest * self._slope[k] / 6
        value: Floats = self._double_tail[k] - rest * (self._tail[k] - rest * cubic)
        return value

    def second_moment(self, x: Floats) -> Floats:
        """E[min(S, x)^2] = integral of 2 t G(t) from 0 to x."""
        k, rest = self._locate(x)
        low, height, slope = self.points[k], self._survival[k], self._slope[k]
        growth = 2 * low * height + rest * (height + low * slope + rest * slope * 2 / 3)
        value: Floats = self._second[k] + rest * growth
        return value

    def moments_beyond(self, x: Floats, weight: Weight) -> tuple[Floats, Floats, Floats]:
        """E[w(S) S^p; S > x] for p = 0, 1, 2. Where order > 0 and base = 0, x must be above 0."""
        low, high = self.points[:-1], self.points[1:]
        density = -self._slope[:-1]
        k, _ = self._locate(x)
        inside = k < len(density)  # false at and beyond the largest size
        segment = np.minimum(k, len(density) - 1)
        result = []
        for power in range(3):
            with np.errstate(invalid="ignore"):  # see _piece: only the first element, which is not used
                pieces = density * _piece(low, high, power, weight) + self._atom[1:] * _at(high, power, weight)
            after = _sum_to_end(pieces)[1:]
            part = density[segment] * _piece(np.minimum(x, high[segment]), high[segment], power, weight)
            atom = self._atom[segment + 1] * _at(high[segment], power, weight)
            result.append(np.where(inside, part + atom + after[segment], 0.0))
        return result[0], result[1], result[2]

    def _locate(self, x: Floats) -> tuple[npt.NDArray[np.intp], Floats]:
        """Segment that starts at or before x, and the distance from its start; at most the largest size."""
        bounded = np.minimum(x, self.points[-1])
        k = np.searchsorted(self.points, bounded, side="right") - 1
        return k, bounded - self.points[k]


def _cdf_before(sizes: SizeDistribution, x: Floats) -> Floats:
    """P(S < x): the CDF's limit from the left at each x."""
    first = np.searchsorted(sizes.sizes_bytes, x, side="left")
    exact = (first < len(sizes.cdf)) & (sizes.sizes_bytes[np.minimum(first, len(sizes.cdf) - 1)] == x)
    before = np.where(first == 0, 0.0, sizes.cdf[np.minimum(first, len(sizes.cdf) - 1)])
    return np.where(exact, before, sizes.cdf_at(x))


def _sum_to_end(pieces: Floats) -> Floats:
    """For each point, the sum of all pieces after it; one longer than `pieces`, ending in 0."""
    return np.append(np.cumsum(pieces[::-1])[::-1], 0.0)


def _at(x: Floats, power: int, weight: Weight) -> Floats:
    """w(x) x^power."""
    result: Floats = x**power / (x + weight.base) ** weight.order
    return result


def _piece(low: Floats, high: Floats, power: int, weight: Weight) -> Floats:
    """Integral of w(x) x^power from low to high (0 <= low <= high)."""
    if weight.order == 0:
        result: Floats = (high ** (power + 1) - low ** (power + 1)) / (power + 1)
        return result
    if power > 0:  # x = (x + base) - base
        lighter = _piece(low, high, power - 1, Weight(weight.order - 1, weight.base))
        return lighter - weight.base * _piece(low, high, power - 1, weight) if weight.base > 0 else lighter
    with np.errstate(divide="ignore"):  # from 0 with no base it is infinite, and never asked for
        near, far = low + weight.base, high + weight.base
        return np.log(far / near) if weight.order == 1 else 1 / near - 1 / far
