"""One face for the two kernels, so that the engine need not know which one runs."""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from simulator import fabric, star
from simulator.arrays import (
    ACTIVE,
    DUE,
    EVENTS,
    FREE,
    NEXT,
    NO_SLOT,
    ONE_LINK,
    OUT,
    OUTPUT_FULL,
    PEAK,
    USED,
    Arrivals,
    Finished,
    Ints,
    Paths,
    Rule,
)
from simulator.sharing import Sharing

_SLOTS = 1024  # room for active flows at first; it doubles when needed


class Kernel(Protocol):
    """The compiled state of a run and what can be done with it."""

    rule: Rule

    @property
    def state(self) -> "star.Star | fabric.Fabric":
        """Flows and counters."""

    @property
    def state_bytes(self) -> int:
        """Memory of the whole state."""

    def advance(self, arrivals: Arrivals, until: float, out: Finished) -> bool:
        """Run to `until`; False: the output is full, empty it and go on."""

    def settle(self) -> None:
        """Bring `state.remaining` up to now."""

    def rank_all(self) -> None:
        """Find all levels anew (after `settle`)."""

    def active_slots(self) -> Ints:
        """Slots of the flows under way."""

    def levels_of(self, slots: Ints) -> Ints:
        """Their levels."""

    def paths_of(self, slots: Ints) -> Paths | None:
        """Their paths; None where all share one link."""

    def move(self, slot: int, path: Paths | None) -> None:
        """Put a flow on another path (None: it keeps its own) and where its verdict says (after `settle`)."""

    def by_flow(self) -> "FabricKernel":
        """A kernel with the same flows, in which each has a rate of its own, so that it can be capped."""


class StarKernel:
    """One bottleneck of `goodput` payload bytes per second."""

    def __init__(self, rule: Rule, levels: int, goodput: float) -> None:
        self.rule = rule
        self.state = star.Star.idle(levels, _SLOTS)
        self._goodput = goodput

    @property
    def state_bytes(self) -> int:
        """Memory of the whole state."""
        return _bytes(self.state)

    def advance(self, arrivals: Arrivals, until: float, out: Finished) -> bool:
        """Run to `until`; False: the output is full, empty it and go on."""
        while (result := star.advance(self.state, self.rule, self._goodput, arrivals, until, out)) == NO_SLOT:
            self.state = self.state.grown()
        return result != OUTPUT_FULL

    def settle(self) -> None:
        """Bring `state.remaining` up to now."""
        star.settle(self.state, self.rule)

    def rank_all(self) -> None:
        """Find all levels anew (after `settle`)."""
        star.rank_all(self.state, self.rule)

    def active_slots(self) -> Ints:
        """Slots of the flows under way."""
        return self.state.heap[: self.state.counters[ACTIVE]].copy()

    def levels_of(self, slots: Ints) -> Ints:
        """Their levels."""
        return self.state.level[slots]

    def paths_of(self, slots: Ints) -> Paths | None:
        """None: all share one link."""
        return None

    def move(self, slot: int, path: Paths | None) -> None:
        """Put a flow where its verdict says (after `settle`)."""
        star.rank_all(self.state, self.rule)

    def by_flow(self) -> "FabricKernel":
        """The link as a fabric of one (after `settle`); here all flows of a level share a clock, none can be slower."""
        old, slots = self.state, self.active_slots()
        new = FabricKernel(self.rule, len(old.clock), np.array([self._goodput]), max(len(old.size), _SLOTS))
        state, n = new.state, len(slots)
        for name in ("size", "remaining", "start", "fixed", "host", "destination", "flow"):
            getattr(state, name)[:n] = getattr(old, name)[slots]
        state.synced[:n] = state.now[0] = old.now[0]
        state.counters[:] = old.counters
        state.counters[FREE], state.counters[DUE], state.counters[USED] = len(state.size) - n, 0, n
        new.sharing.path[:n] = ONE_LINK
        fabric.enter_all(state, new.sharing, self.rule)
        state.peers[:n], state.queued[:n] = old.peers[slots], old.queued[slots]  # nobody has met anybody by this
        return new


class FabricKernel:
    """Links of given capacities in payload bytes per second."""

    def __init__(self, rule: Rule, levels: int, capacity: npt.NDArray[np.float64], slots: int = _SLOTS) -> None:
        self.rule = rule
        self.state = fabric.Fabric.idle(slots)
        self.sharing = Sharing.idle(capacity, levels, slots)

    @property
    def state_bytes(self) -> int:
        """Memory of the whole state."""
        return _bytes(self.state) + _bytes(self.sharing)

    def advance(self, arrivals: Arrivals, until: float, out: Finished) -> bool:
        """Run to `until`; False: the output is full, empty it and go on."""
        while (result := fabric.advance(self.state, self.sharing, self.rule, arrivals, until, out)) == NO_SLOT:
            self.state, self.sharing = self.state.grown(), self.sharing.grown()
        return result != OUTPUT_FULL

    def settle(self) -> None:
        """Bring `state.remaining` up to now."""
        fabric.settle(self.state, self.sharing)

    def rank_all(self) -> None:
        """Find all levels anew (after `settle`)."""
        fabric.rank_all(self.state, self.sharing, self.rule)

    def active_slots(self) -> Ints:
        """Slots of the flows under way."""
        return np.flatnonzero(self.state.flow >= 0)

    def levels_of(self, slots: Ints) -> Ints:
        """Their levels."""
        return self.sharing.level[slots]

    def paths_of(self, slots: Ints) -> Paths | None:
        """Their paths."""
        return self.sharing.path[slots]

    def move(self, slot: int, path: Paths | None) -> None:
        """Put a flow on another path (None: it keeps its own) and where its verdict says (after `settle`)."""
        taken = self.sharing.path[slot].copy() if path is None else path
        fabric.move(self.state, self.sharing, self.rule, slot, taken)

    def by_flow(self) -> "FabricKernel":
        """This one."""
        return self


def events(kernel: Kernel) -> int:
    """Arrivals, ends and changes of level so far."""
    return int(kernel.state.counters[EVENTS])


def peak(kernel: Kernel) -> int:
    """Most flows that were active at once."""
    return int(kernel.state.counters[PEAK])


def consumed(kernel: Kernel) -> int:
    """How many of the arrivals it was given have started."""
    return int(kernel.state.counters[NEXT])


def take_output(kernel: Kernel) -> int:
    """How many flows the output holds; the next `advance` writes from its beginning."""
    n = int(kernel.state.counters[OUT])
    kernel.state.counters[OUT] = 0
    return n


def _bytes(arrays: "star.Star | fabric.Fabric | Sharing") -> int:
    return sum(np.asarray(array).nbytes for array in arrays)
