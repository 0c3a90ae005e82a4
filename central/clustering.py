"""Parts of a group whose hosts send alike: found from the sizes they report, so that each part gets its own thresholds.

The distance of two hosts is the earth mover's distance of their flow sizes on a log scale: how many octaves a flow of
the one must be moved, on average, to give the other's distribution (the area between the two distribution functions).
Published workloads of one kind are within 0.2 octaves of each other, of different kinds 1 to 12 apart, and a sample of
1,000 flows is within 0.35 of where it came from, one of 200 within 0.7.

Each part is represented by its most typical host. A host stays in its part unless it is beyond `LEAVE` or much nearer
to another one's, joins the nearest within `JOIN`, or begins a part of its own; parts whose representatives come close
are joined. Deterministic, and stable: estimates that wander by less than the margins change nothing.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fabricpilot.histogram import BINS_PER_OCTAVE

Floats = npt.NDArray[np.floating[Any]]

JOIN = 1.2  # octaves from a part's representative within which a host belongs to it
LEAVE = 1.5  # beyond which it no longer does
NEARER = 0.5  # by which another part must be nearer for a host to change
MERGE = 0.6  # octaves between representatives below which two parts are one
MIN_FLOWS = 250.0  # in a host's window below which it stays where it is
MAX_PARTS = 16


def divide(hosts: Mapping[str, Floats], before: Mapping[str, int]) -> dict[str, int]:
    """The part of each host: numbers from 0, kept from call to call.

    Args:
        hosts: flows per size bin of each host, shape (BINS,), more than none.
        before: the part of each host until now; 0 for one that is new.
    """
    if not hosts:
        return {}
    names = sorted(hosts)
    counts = np.array([hosts[name] for name in names], np.float32)
    shapes = np.cumsum(counts, axis=1) / counts.sum(axis=1, keepdims=True)
    own = np.array([before.get(name, 0) for name in names])
    typical = {int(part): _most_typical(shapes[own == part]) for part in np.unique(own)}
    away = {part: distance(shapes, one) for part, one in typical.items()}
    from_own = np.array([away[part][row] for row, part in enumerate(own.tolist())])
    from_nearest = np.min(list(away.values()), axis=0)
    stays = (from_own <= LEAVE) & (from_own <= from_nearest + NEARER)
    now = own.copy()
    free = max(before.values(), default=0) + 1
    for row in np.flatnonzero(~stays):
        distances = {part: float(distance(shapes[row], one)) for part, one in typical.items()}
        nearest = min(distances, key=lambda part: (distances[part], part))
        if distances[nearest] > JOIN and len(typical) < MAX_PARTS:
            nearest, free = free, free + 1
            typical[nearest] = shapes[row]
        now[row] = nearest
    return _joined(dict(zip(names, now.tolist(), strict=True)), typical)


def distance(shapes: Floats, one: Floats) -> Floats:
    """Octaves between distribution functions over the bins, shape (..., BINS), and one of shape (BINS,)."""
    octaves: Floats = np.abs(shapes - one).sum(axis=-1) / BINS_PER_OCTAVE
    return octaves


def _most_typical(shapes: Floats) -> Floats:
    """The one nearest to their mean: where a part falls into two, it is in one of them, and the other leaves."""
    nearest: Floats = shapes[np.argmin(distance(shapes, shapes.mean(axis=0)))]
    return nearest


def _joined(now: dict[str, int], typical: dict[int, Floats]) -> dict[str, int]:
    """Parts that have come close become the one with the lower number."""
    becomes: dict[int, int] = {}
    for number in sorted(set(now.values())):
        close = (kept for kept in becomes.values() if distance(typical[number], typical[kept]) < MERGE)
        becomes[number] = next(close, number)
    return {name: becomes[number] for name, number in now.items()}
