"""Mean response time in M/G/1 of K strict priorities by bytes sent, by size, or by both, for any size distribution.

The model of a link whose levels depend on bytes sent and on bytes that wait in the send buffer. A flow of size S that
has sent y bytes shows min(S, y + B): B is what the buffer makes visible. With thresholds a[1] < a[2] < ... it is in the
level of (a[i-1], a[i]] that holds what it shows; a level is served only while those before it are empty, and the flows
inside a level share the link equally. B = 0 is multilevel processor sharing (MLPS), what PIAS and AuTO do; B = infinity
are classes of known sizes. `exact.py` minimises what this file computes.

Source of B = 0: L. Kleinrock, Queueing Systems vol. II (1976), section 4.7; the bulk-arrival equation is from
Kleinrock, Muntz and Rodemich, "The processor-sharing queueing model for time-shared systems with bulk arrivals",
Networks 1 (1971). The same argument holds for any B.

With arrival rate l (sizes in units of their mean, so l = load), G(t) = P(S > t) and s(t) what a flow is served in the
levels up to t,

    s(t) = S if S <= t, else max(t - B, 0)          B = 0: min(S, t);   B = infinity: S if S <= t, else 0
    rho(t) = l E[s(t)],     W(t) = l E[s(t)^2] / (2 (1 - rho(t))),     a' = max(a - B, 0)

a flow of size x in (a, b] ends in the level of (a, b] and has the mean response time

    T(x) = (W(a) + a') / (1 - rho(a)) + alpha(x - a') / (1 - rho(a))

The first term is the end of the busy period of the levels before. Seen by level (a, b], whose clock stands still during
those busy periods, flows arrive in batches, one per busy period; each wants the service x - a' if x <= b, or b' - a'
before it sinks further. `alpha` is the response time of processor sharing with batch arrivals. With
c = l / (1 - rho(a)) and the share of all flows that want more than u of this level,

    H(u) = G(b) [u < b' - a'] + P(max(a, a' + u) < S <= b)                    B = 0: G(a + u) up to b - a

    alpha'(u) = (1 - rho(a)) / (1 - rho(b)) + 2 c (W(a) + a') z(u)
    z(u) = H(u) + c Int_0^{b-a'-u} z(v) H(u+v) dv + c Int_0^u z(v) H(u-v) dv,      0 <= u < b - a'

(Kleinrock's equation, with the constant part of its solution split off; 2 c H(0) (W(a)+a') is the mean number of other
flows in a flow's batch.) The rows of both integral operators sum to at most (rho(b) - rho(a)) / (1 - rho(a)) < 1, so z
exists and is unique.

z is computed by a Galerkin method with one constant per cell: cells widen in proportion to the size, where z varies
less and less; all matrix entries are exact second differences of a twice integrated H, so steps of the CDF (atoms)
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


@dataclass(frozen=True, eq=False)
class Link:
    """What the formulas are about: flow sizes, load, and the bytes B a flow shows beyond those it has sent.

    All sizes are in units of the mean flow size; `load` is arrival rate x mean size, 0 < load < 1.
    """

    sizes: SizeIntegrals
    load: float
    visible: float = 0.0

    def idle(self, bound: Floats) -> Floats:
        """1 - rho: the share of time without work in the levels up to `bound`; shape kept."""
        hidden: Floats = np.minimum(bound, self.visible) * self.sizes.survival(bound)
        return 1 - self.load * (1 - self.sizes.tail(bound) - hidden)

    def wait(self, bound: Floats) -> Floats:
        """W: mean wait for the end of the work in the levels up to `bound` before their newcomers; shape kept."""
        hidden = (bound**2 - self.served_beyond(bound) ** 2) * self.sizes.survival(bound)
        wait: Floats = self.load * (self.sizes.second_moment(bound) - hidden) / (2 * self.idle(bound))
        return wait

    def served_beyond(self, bound: Floats) -> Floats:
        """What a flow larger than `bound` is served in the levels up to it; shape kept."""
        return np.maximum(bound - self.visible, 0.0)


def first_level_cost(link: Link, bounds: Floats, criterion: Criterion) -> Floats:
    """The flows that end in level (0, b]: plain processor sharing, T(x) = x / (1 - rho(b)); shape of `bounds`."""
    all_flows = link.sizes.moments_beyond(np.full_like(bounds, _NOTHING), criterion.weight)
    beyond = link.sizes.moments_beyond(np.maximum(bounds, _NOTHING), criterion.weight)
    moments = [total - rest for total, rest in zip(all_flows, beyond, strict=True)]
    return _expand(np.full_like(bounds, criterion.weight.base), 1 / link.idle(bounds), moments, criterion)


def level_costs(link: Link, lower: Floats, upper: Floats, criterion: Criterion, cells: int) -> Floats:
    """What the flows that end in each level (lower, upper] add to the criterion.

    Args:
        link: sizes, load and what flows show.
        lower: shape (n,), above 0.
        upper: shape (n,), above `lower`.
        criterion: what is averaged.
        cells: cells per level; the error falls with their square.

    Returns:
        Shape (n,); the sum over the levels of a threshold vector, first level included, is the criterion.
    """
    curve = response_in_levels(link, lower, upper, cells)
    moments = [m[:, :-1] - m[:, 1:] for m in link.sizes.moments_beyond(curve.edges, criterion.weight)]
    # T(x) = at + slope (x - start) within a cell.
    constant = curve.at[:, :-1] - curve.slope * curve.edges[:, :-1] + criterion.weight.base
    cost: Floats = _expand(constant, curve.slope, moments, criterion).sum(axis=1)
    return cost


def last_level_in_turns(link: Link, lower: Floats) -> tuple[Floats, Floats]:
    """Constant and slope of T(x) for sizes x beyond `lower` whose flows are served one at a time, the oldest first.

    A flow waits for all that came before it, W of all flows, and what comes later overtakes it in the levels before
    only (Kleinrock, section 4.7, first come first served): T(x) = (W + x) / (1 - rho(a)). Shapes of `lower`.
    """
    idle = link.idle(lower)
    return link.wait(np.array(link.sizes.largest)) / idle, 1 / idle


def turns_cost(link: Link, lower: Floats, criterion: Criterion) -> Floats:
    """What the flows beyond `lower` add to the criterion where these take turns; shape of `lower`."""
    constant, slope = last_level_in_turns(link, lower)
    moments = list(link.sizes.moments_beyond(lower, criterion.weight))
    return _expand(constant + criterion.weight.base, slope, moments, criterion)


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


def response_in_levels(link: Link, lower: Floats, upper: Floats, cells: int) -> LevelResponse:
    """Solve the batch-arrival equation in each level (lower, upper], lower > 0; see the head of this file.

    Where sizes show, a fourth of the cells is for the service before the first size of the level ends.
    """
    served = link.served_beyond(lower)
    inner = cells // 4 if link.visible > 0 else 0
    edges: Floats = lower[:, None] * (upper / lower)[:, None] ** np.linspace(0.0, 1.0, cells - inner + 1)
    edges[:, -1] = upper
    before = np.linspace(served, lower, inner + 1, axis=1)[:, :-1]
    u = np.concatenate((before, edges), axis=1) - served[:, None]
    idle, wait = link.idle(lower), link.wait(lower) + served
    z = _batch_part(link.sizes, link.load / idle, u, _Wanted.of(link, lower, upper))
    slope = (1 / link.idle(upper))[:, None] + (2 * link.load * wait / idle**2)[:, None] * z
    steps = np.cumsum(slope * np.diff(u, axis=1), axis=1)
    at = (wait / idle)[:, None] + np.concatenate((np.zeros((len(lower), 1)), steps), axis=1)
    return LevelResponse(edges, at[:, inner:], slope[:, inner:])


@dataclass(frozen=True, eq=False)
class _Wanted:
    """H(u) of n levels, integrated once and twice; all arrays of shape (n,).

    Attributes:
        sinking: G(b), the flows that sink further, which want `whole` = b' - a' each.
        ending: P(a < S <= b), the flows that end here, which want `least` = a - a' each at least.
        lower: a; the largest of those that end wants `least` + `spread`, `spread` = b - a.
    """

    sinking: Floats
    whole: Floats
    ending: Floats
    least: Floats
    lower: Floats
    spread: Floats

    @classmethod
    def of(cls, link: Link, lower: Floats, upper: Floats) -> "_Wanted":
        served, beyond = link.served_beyond(lower), link.sizes.survival(upper)
        ending = link.sizes.survival(lower) - beyond
        return cls(beyond, link.served_beyond(upper) - served, ending, lower - served, lower, upper - lower)

    def once(self, sizes: SizeIntegrals, u: Floats) -> Floats:
        """Int_0^u H, 0 <= u <= b - a'; shape (n, ...)."""
        sinking, whole, ending, least, lower, _ = self._shaped(u)
        within = np.maximum(u - least, 0.0)
        ends = sizes.tail(lower) - sizes.tail(lower + within) - sinking * within
        total: Floats = sinking * np.minimum(u, whole) + ending * np.minimum(u, least) + ends
        return total

    def twice(self, sizes: SizeIntegrals, v: Floats) -> Floats:
        """Int_0^v Int_0^s H dr ds, 0 for v below 0; shape (n, ...)."""
        sinking, whole, ending, least, lower, spread = self._shaped(v)
        v = np.maximum(v, 0.0)
        within = np.clip(v - least, 0.0, spread)
        at_start = sizes.tail(lower)
        ends = (
            sizes.double_tail(lower + within) - sizes.double_tail(lower) + within * at_start - sinking * within**2 / 2
        )
        in_all = at_start - sizes.tail(lower + spread) - sinking * spread
        ends += np.maximum(v - least - spread, 0.0) * in_all
        total: Floats = sinking * _steps(v, whole) + ending * _steps(v, least) + ends
        return total

    def _shaped(self, like: Floats) -> list[Floats]:
        """All attributes with as many axes as `like`."""
        axes = (slice(None),) + (None,) * (like.ndim - 1)
        values = (self.sinking, self.whole, self.ending, self.least, self.lower, self.spread)
        return [value[axes] for value in values]


def _steps(v: Floats, end: Floats) -> Floats:
    """Int_0^v Int_0^s [r < end] dr ds for v from 0."""
    inside = np.minimum(v, end)
    area: Floats = inside * v - inside**2 / 2
    return area


def _batch_part(sizes: SizeIntegrals, rate: Floats, u: Floats, wanted: _Wanted) -> Floats:
    """Cell means of z, shape (n, cells), for cells with the edges `u`, shape (n, cells + 1)."""
    plus = wanted.twice(sizes, u[:, :, None] + u[:, None, :])
    minus = wanted.twice(sizes, u[:, :, None] - u[:, None, :])
    width = np.diff(u, axis=1)
    kernel = np.diff(np.diff(plus - minus, axis=1), axis=2) / width[:, :, None]
    mean_wanted = np.diff(wanted.once(sizes, u), axis=1) / width
    system = np.eye(width.shape[1]) - rate[:, None, None] * kernel
    return _solve(system, mean_wanted)


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


def _expand(constant: Floats, slope: Floats, moments: list[Floats], criterion: Criterion) -> Floats:
    """E[w(S) (constant + slope S)^power] from the weighted moments of order 0, 1 and 2."""
    if criterion.power == 1:
        return constant * moments[0] + slope * moments[1]
    return constant**2 * moments[0] + 2 * constant * slope * moments[1] + slope**2 * moments[2]
