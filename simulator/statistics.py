"""Statistics of finished flows: exact, or streamed into sketches whose size does not grow with the number of flows.

Flows fall into size classes (half decades from 1 KB to 100 MB); each keeps count, sums and one DDSketch of FCT and one
of slowdown (Masson et al., VLDB 2019; relative error 1 %). Means are exact either way. Classes are joined into the
buckets that tables show.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from ddsketch import DDSketch

from fabricpilot.errors import UsageError
from simulator.arrays import Floats
from simulator.results import FlowResults

CLASS_EDGES_BYTES = tuple(float(round(10 ** (3 + i / 2))) for i in range(11))  # upper edges, half decades
BUCKETS: tuple[tuple[str, float], ...] = (  # name and upper edge of what tables show
    ("<= 10 KB", 1e4),
    ("<= 100 KB", 1e5),
    ("<= 1 MB", 1e6),
    ("<= 10 MB", 1e7),
    ("> 10 MB", float("inf")),
)

_ACCURACY = 0.01
_FINE = 500  # values are rounded to 1/500 of a natural logarithm before they enter a sketch: 0.1 %


@dataclass(frozen=True)
class Group:
    """Statistics of some flows; times in microseconds. All but `flows` are NaN-free only where `flows` is above 0."""

    name: str
    flows: int
    mean_us: float
    p50_us: float
    p99_us: float
    mean_slowdown: float
    p50_slowdown: float
    p99_slowdown: float


@dataclass(frozen=True)
class Summary:
    """Statistics of a run: all flows, the table's buckets, and finer size classes; groups without flows left out."""

    overall: Group
    buckets: tuple[Group, ...]
    classes: tuple[Group, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the overall numbers, `buckets` and `classes`."""
        overall = asdict(self.overall)
        del overall["name"]
        return overall | {"buckets": [asdict(b) for b in self.buckets], "classes": [asdict(c) for c in self.classes]}


class FlowStatistics:
    """Takes finished flows in any number of parts.

    Args:
        exact: keep every flow; percentiles are then exact and `results` has all flows.
    """

    def __init__(self, exact: bool = False) -> None:
        self._parts: list[FlowResults] | None = [] if exact else None
        self._classes = [_Sketches() for _ in range(len(CLASS_EDGES_BYTES) + 1)]

    def add(self, results: FlowResults) -> None:
        """Count these flows."""
        if self._parts is not None:
            self._parts.append(results)
            return
        fct_us, slowdown = results.fct_s * 1e6, results.slowdown
        which = np.searchsorted(CLASS_EDGES_BYTES, results.size_bytes, side="left")
        for index in np.unique(which):
            inside = which == index
            self._classes[index].add(fct_us[inside], slowdown[inside])

    @property
    def results(self) -> FlowResults:
        """All flows in order of start.

        Raises:
            UsageError: they were not kept.
        """
        if self._parts is None:
            raise UsageError("single flows were not kept; ask for exact statistics")
        return FlowResults.joined(self._parts).in_order_of_start()

    def summary(self) -> Summary:
        """What was counted so far.

        Raises:
            UsageError: no flow has finished.
        """
        names = [f"<= {edge:.0f} B" for edge in CLASS_EDGES_BYTES] + [f"> {CLASS_EDGES_BYTES[-1]:.0f} B"]
        edges = [*CLASS_EDGES_BYTES, float("inf")]
        if self._parts is not None:
            flows = FlowResults.joined(self._parts) if self._parts else None
            if flows is None or len(flows) == 0:
                raise UsageError("no flow has finished; run longer")
            everything = _exact("all", flows, 0.0, float("inf"))
            buckets = [_exact(name, flows, low, high) for name, low, high in _between(BUCKETS)]
            classes = [_exact(name, flows, low, high) for name, low, high in _between(zip(names, edges, strict=True))]
        else:
            everything = _Sketches.joined(self._classes).group("all")
            if everything.flows == 0:
                raise UsageError("no flow has finished; run longer")
            buckets = []
            for name, low, high in _between(BUCKETS):
                inside = [c for c, edge in zip(self._classes, edges, strict=True) if low < edge <= high]
                buckets.append(_Sketches.joined(inside).group(name))
            classes = [c.group(name) for c, name in zip(self._classes, names, strict=True)]
        return Summary(everything, tuple(g for g in buckets if g.flows), tuple(g for g in classes if g.flows))


class _Sketches:
    """Count, sums and sketches of one size class."""

    def __init__(self) -> None:
        self.flows = 0
        self.fct_sum_us = 0.0
        self.slowdown_sum = 0.0
        self.fct = DDSketch(_ACCURACY)
        self.slowdown = DDSketch(_ACCURACY)

    def add(self, fct_us: Floats, slowdown: Floats) -> None:
        self.flows += len(fct_us)
        self.fct_sum_us += float(fct_us.sum())
        self.slowdown_sum += float(slowdown.sum())
        _into(self.fct, fct_us)
        _into(self.slowdown, slowdown)

    @classmethod
    def joined(cls, parts: "list[_Sketches]") -> "_Sketches":
        whole = cls()
        for part in parts:
            whole.flows += part.flows
            whole.fct_sum_us += part.fct_sum_us
            whole.slowdown_sum += part.slowdown_sum
            whole.fct.merge(part.fct)
            whole.slowdown.merge(part.slowdown)
        return whole

    def group(self, name: str) -> Group:
        n = max(self.flows, 1)
        at = [sketch.get_quantile_value(q) or 0.0 for sketch in (self.fct, self.slowdown) for q in (0.5, 0.99)]
        return Group(name, self.flows, self.fct_sum_us / n, at[0], at[1], self.slowdown_sum / n, at[2], at[3])


def _into(sketch: DDSketch, values: Floats) -> None:
    """Add many values at once: those that agree to 0.1 % as one with a weight."""
    steps, counts = np.unique(np.rint(np.log(values) * _FINE), return_counts=True)
    for step, count in zip(steps, counts, strict=True):
        sketch.add(float(np.exp(step / _FINE)), float(count))


def _exact(name: str, flows: FlowResults, low: float, high: float) -> Group:
    inside: npt.NDArray[np.bool_] = (flows.size_bytes > low) & (flows.size_bytes <= high)
    n = int(inside.sum())
    if n == 0:
        return Group(name, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    fct_us, slowdown = flows.fct_s[inside] * 1e6, flows.slowdown[inside]
    p50_us, p99_us = np.percentile(fct_us, (50, 99))
    p50, p99 = np.percentile(slowdown, (50, 99))
    return Group(
        name, n, float(fct_us.mean()), float(p50_us), float(p99_us), float(slowdown.mean()), float(p50), float(p99)
    )


def _between(named_edges: Any) -> list[tuple[str, float, float]]:
    """(name, lower edge, upper edge) of consecutive upper edges."""
    low, spans = 0.0, []
    for name, high in named_edges:
        spans.append((name, low, high))
        low = high
    return spans
