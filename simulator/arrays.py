"""The arrays that pass between the engine and its compiled kernels.

Named tuples of numpy arrays: compiled code reads and writes them in place, and Python sees the result without a copy.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Paths = npt.NDArray[np.int32]

HOP_BITS = 2
HOPS = 1 << HOP_BITS  # most links on a path
ONE_LINK: Paths = np.array([0] + [-1] * (HOPS - 1), np.int32)  # the path of all flows where there is one bottleneck

# What a kernel's `advance` returns: all done, or what the engine has to do before it calls again.
DONE, OUTPUT_FULL, NO_SLOT = range(3)

# Entries of a kernel's counters: active flows, free slots, next arrival, finished flows in the output, events so far,
# most flows at once; only in `fabric`: flows in its heap, bound of the slots ever used.
ACTIVE, FREE, NEXT, OUT, EVENTS, PEAK, DUE, USED = range(8)


class Rule(NamedTuple):
    """How flows are ranked; see `rank`.

    `thresholds` are bytes, float64, shape (hosts, K-1), one row per sending host. `queue_bytes` stand in a queue that
    several flows share. From level `turns` on flows are served one at a time, in order of arrival.
    """

    order: int
    basis: int
    thresholds: Floats
    buffer_bytes: float
    queue_bytes: float
    turns: int


class Arrivals(NamedTuple):
    """Flows to come, in order of start; shape (n,), `path` (n, hops) of link numbers, -1 where a path is shorter."""

    start: Floats
    size: Floats
    host: Ints
    destination: Ints
    path: Paths
    first_flow: int  # number of the first of them

    @classmethod
    def none(cls, first_flow: int = 0, hops: int = 1) -> "Arrivals":
        """No arrivals."""
        empty = np.zeros(0)
        none = np.zeros(0, np.int64)
        return cls(empty, empty, none, none, np.zeros((0, hops), np.int32), first_flow)


class Finished(NamedTuple):
    """Room for flows that ended; shape (room,).

    `peers`: most other flows it met in its level when it entered one. `queued`: most bytes that stood before it then;
    see `rank.standing`.
    """

    flow: Ints
    start: Floats
    size: Floats
    fct: Floats  # of the fluid model, seconds, without latency
    peers: Ints
    queued: Floats
    host: Ints
    destination: Ints

    @classmethod
    def room(cls, flows: int) -> "Finished":
        """Room for so many flows."""
        return cls(
            flow=np.zeros(flows, np.int64),
            start=np.zeros(flows),
            size=np.zeros(flows),
            fct=np.zeros(flows),
            peers=np.zeros(flows, np.int64),
            queued=np.zeros(flows),
            host=np.zeros(flows, np.int64),
            destination=np.zeros(flows, np.int64),
        )


def zeros(kind: Any, entries: int, **others: npt.NDArray[Any]) -> Any:
    """A named tuple `kind` of arrays with `entries` zeros each, `others` as given; types follow its annotations."""
    types = {Floats: np.float64, Ints: np.int64}
    hints = kind.__annotations__
    return kind(**others, **{name: np.zeros(entries, types[hints[name]]) for name in hints if name not in others})


def all_free(slots: int) -> Ints:
    """The stack of free slots before any is taken: the lowest number on top."""
    return np.arange(slots - 1, -1, -1, dtype=np.int64)


def doubled(state: Any, per_slot: Iterable[str], empty: Mapping[str, float] | None = None) -> Any:
    """The same state with room for twice as many flows.

    The arrays `per_slot` are continued with zeros or what `empty` says. Where the state has a stack `free`, the new
    slots go on it.
    """
    empty = empty or {}
    longer = {
        name: np.concatenate([array, np.full_like(array, empty.get(name, 0))])
        for name, array in ((name, getattr(state, name)) for name in per_slot)
    }
    if "free" in state._fields:
        slots, kept = len(state.free), int(state.counters[FREE])
        longer["free"] = np.concatenate([state.free[:kept], slots + all_free(slots), np.zeros(slots - kept, np.int64)])
        state.counters[FREE] = kept + slots
    return state._replace(**longer)
