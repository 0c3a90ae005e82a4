"""Mean response time of multilevel processor sharing (MLPS) in M/G/1, for any flow-size distribution.

The model of a link that serves K strict priorities by attained service: flows arrive in a Poisson stream, a flow
with attained service in (a[i-1], a[i]] is in level i, a level is served only while those before it are empty, and the
flows inside a level share the link equally. `exact.py` minimises what this file computes.

Source: L. Kleinrock, Queueing Systems vol. II (1976), section 4.7; the bulk-arrival equation is from Kleinrock, Muntz
and Rodemich, "The processor-sharing queueing model for time-shared systems with bulk arrivals", Networks 1 (1971).

With arrival rate l (sizes in units of their mean, so l = load), G(t) = P(S > t), rho(a) = l E[min(S, a)] and
W(a) = l E[min(S, a)^2] / (2 (1 - rho(a))), a flow of size x that ends in level (a, b] has the mean response time

    T(x) = (W(a) + a) / (1 - rho(a)) + alpha(x - a) / (1 - rho(a))

The first term is the end of the busy period of the levels before. Seen by level (a, b], whose clock stands still
during those busy periods, flows arrive in batches, one per busy period. `alpha` is the response time of processor
sharing with batch arrivals. With c = l / (1 - rho(a)) and rho* = (rho(b) - rho(a)) / (1 - rho(a)),

    alpha'(u) = 1 / (1 - rho*) + 2 c (W(a) + a) z(u)
    z(u) = G(a+u) + c Int_0^{b-a-u} z(v) G(a+u+v) dv + c Int_0^u z(v) G(a+u-v) dv,      0 <= u < b - a

(Kleinrock's equation, with the constant part of its solution split off; 2 c G(a) (W(a)+a) is the mean number of
other flows in a flow's batch.) The rows of both integral operators sum to at most rho* < 1, so z exists and is unique.

z is computed by a Galerkin method with one constant per cell: cells widen in proportion to a + u, where z varies
less and less; all matrix entries are exact second differences of a twice integrated G, so steps of the CDF (atoms)
cost no accuracy beyond the cells' width. The weighted mean over the sizes is then exact for the piecewise linear T.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from central.thresholds.integrals import SizeIntegrals, Weight

Floats = npt.NDArray[np.float64]


# Where "all flows" starts for weights that are infinite at size 0, in mean flow sizes.
_NOTHING = 1e-12

_PLAIN = Weight()


@dataclass(frozen=True)
class Criterion:
    """E[w(S) (T(S) + base)^power]: what of the response time is averaged over the flows.

    The base is the weight's: time a flow takes besides its transmission, in the units of sizes.
    """

    weight: Weight = _PLAIN
    power: int = 1


def first_level_cost(sizes: SizeIntegrals, load: float, bounds: Floats, criterion: Criterion) -> Floats:
    """The flows that end in level (0, b]: plain processor sharing, T(x) = x / (1 - rho(b)); shape of `bounds`."""
    all_flows = sizes.moments_beyond(np.full_like(bounds, _NOTHING), criterion.weight)
    beyond = sizes.moments_beyond(np.maximum(bounds, _NOTHING), criterion.weight)
    moments = [total - rest for total, rest in zip(all_flows, beyond, strict=True)]
    return _expand(np.full_like(bounds, criterion.weight.base), 1 / (1 - _rho(sizes, load, bounds)), moments, criterion)


def level_costs(
    sizes: SizeIntegrals, load: float, lower: Floats, upper: Floats, criterion: Criterion, cells: int
) -> Floats:
    """What the flows that end in each level (lower, upper] add to the criterion.

    Args:
        sizes: the distribution, in units of its mean.
        load: arrival rate x mean size, 0 < load < 1.
        lower: shape (n,), above 0.
        upper: shape (n,), above `lower`.
        criterion: what is averaged.
        cells: cells per level; the error falls with their square.

    Returns:
        Shape (n,); the sum over the levels of a threshold vector, first level included, is the criterion.
    """
    curve = response_in_levels(sizes, load, lower, upper, cells)
    moments = [m[:, :-1] - m[:, 1:] for m in sizes.moments_beyond(curve.edges, criterion.weight)]
    # T(x) = at + slope (x - start) within a cell.
    constant = curve.at[:, :-1] - curve.slope * curve.edges[:, :-1] + criterion.weight.base
    cost: Floats = _expand(constant, curve.slope, moments, criterion).sum(axis=1)
    return cost


@dataclass(frozen=True, eq=False)
class LevelResponse:
    """T(x) inside n levels, piecewise linear over their cells.

    Attributes:
        edges: sizes at the cells' borders, shape (n, cells + 1).
        at: T there, shape (n, cells + 1); at the first border the limit from above.
        slope: T' inside each cell, shape (n, cells).
    """

    edges: Floats
    at: Floats
    slope: Floats


def response_in_levels(sizes: SizeIntegrals, load: float, lower: Floats, upper: Floats, cells: int) -> LevelResponse:
    """Solve the batch-arrival equation in each level (lower, upper], lower > 0; see the head of this file."""
    idle = 1 - _rho(sizes, load, lower)
    wait = load * sizes.second_moment(lower) / (2 * idle) + lower  # W(a) + a
    z, edges = _batch_part(sizes, load / idle, lower, upper, cells)
    slope = (1 / (1 - _rho(sizes, load, upper)))[:, None] + (2 * load * wait / idle**2)[:, None] * z
    steps = np.cumsum(slope * np.diff(edges, axis=1), axis=1)
    at = (wait / idle)[:, None] + np.concatenate((np.zeros((len(lower), 1)), steps), axis=1)
    return LevelResponse(edges, at, slope)


def _batch_part(sizes: SizeIntegrals, rate: Floats, lower: Floats, upper: Floats, cells: int) -> tuple[Floats, Floats]:
    """Cell means of z, shape (n, cells), and the cells' edges in sizes, shape (n, cells + 1)."""
    edges: Floats = lower[:, None] * (upper / lower)[:, None] ** np.linspace(0.0, 1.0, cells + 1)
    edges[:, -1] = upper
    u = edges - lower[:, None]
    length = (upper - lower)[:, None, None]
    base_tail = sizes.tail(lower)[:, None, None]
    base_double = sizes.double_tail(lower)[:, None, None]
    end_tail = sizes.tail(upper)[:, None, None]

    def twice_integrated(v: Floats) -> Floats:
        """Int_0^v Int_0^s G(a + r) [r < b - a] dr ds, for v of any sign; shape (n, ...)."""
        inside = np.clip(v, 0.0, length)
        value = sizes.double_tail(lower[:, None, None] + inside) - base_double + inside * base_tail
        return value + np.maximum(v - length, 0.0) * (base_tail - end_tail)

    plus = twice_integrated(u[:, :, None] + u[:, None, :])
    minus = twice_integrated(u[:, :, None] - u[:, None, :])
    width = np.diff(u, axis=1)
    kernel = np.diff(np.diff(plus - minus, axis=1), axis=2) / width[:, :, None]
    survival = -np.diff(sizes.tail(edges), axis=1) / width
    system = np.eye(cells) - rate[:, None, None] * kernel
    return _solve(system, survival), edges


def _solve(system: Floats, right: Floats) -> Floats:
    """Solutions of many small systems, shapes (n, cells, cells) and (n, cells), by elimination on all at once.

    The rows are diagonally dominant (see the head of this file), so no pivoting is needed. LAPACK, asked for one system
    after another, starts its threads for each; on a busy machine that took five times as long.
    """
    matrix = np.ascontiguousarray(system.transpose(1, 2, 0))
    z = right.T.copy()
    cells = len(z)
    for k in range(cells - 1):
        factor = matrix[k + 1 :, k] / matrix[k, k]
        matrix[k + 1 :, k + 1 :] -= factor[:, None] * matrix[k, k + 1 :]
        z[k + 1 :] -= factor * z[k]
    for k in reversed(range(cells)):
        z[k] = (z[k] - (matrix[k, k + 1 :] * z[k + 1 :]).sum(axis=0)) / matrix[k, k]
    return z.T


def _rho(sizes: SizeIntegrals, load: float, bound: Floats) -> Floats:
    """Load of the work done on flows up to `bound` bytes each."""
    return load * (1 - sizes.tail(bound))


def _expand(constant: Floats, slope: Floats, moments: list[Floats], criterion: Criterion) -> Floats:
    """E[w(S) (constant + slope S)^power] from the weighted moments of order 0, 1 and 2."""
    if criterion.power == 1:
        return constant * moments[0] + slope * moments[1]
    return constant**2 * moments[0] + 2 * constant * slope * moments[1] + slope**2 * moments[2]
