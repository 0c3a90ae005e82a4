"""Long flows one after the other: the scheme `in-turn`.

Flows that share a link equally all end late; one after the other, the first end early and the last no later. So of the
long flows of a receiver one has the turn, a level above the last; the others wait in the last level, where they take
what the turn leaves. Nobody's end is seen for that, so the order is that of arrival:

1. fewer whole `turn_bytes` sent come first: a flow without end gives way after each of them, also to later ones
2. then those that have the turn already: a flow's packets change their level twice in its life
3. then the oldest; a flow has a turn unless one of its ends has a flow before it that has one

Why it pays, and the thresholds that go with it: `central/thresholds/exact.py`, docs/scenarios.md.
"""

from dataclasses import dataclass

import numpy as np

from central.lrla.flow_set import Bools, Choice, FlowSet, Ints
from central.lrla.rules import assign
from fabricpilot.levels import TURNS_LEVELS
from simulator.compiled import compiled


@dataclass(frozen=True)
class InTurn:
    """One long flow of a receiver at a time; routes as least-loaded.

    Attributes:
        turn_bytes: what a flow may send before others have their turn.
    """

    turn_bytes: float
    name: str = "in-turn"

    def decide(self, flows: FlowSet, asked: Ints) -> Choice:
        """Priority 1 for those whose turn it is."""
        return Choice(self._turns(flows)[asked].astype(np.int64), assign(flows, asked))

    def changed(self, flows: FlowSet) -> Ints:
        """Rows whose turn begins or ends now: to be decided on although nobody asked."""
        rows: Ints = np.flatnonzero(self._turns(flows) != (flows.priority > 0))
        return rows

    def _turns(self, flows: FlowSet) -> Bools:
        """Who has a turn, shape (n,)."""
        rounds = np.floor(flows.attained_bytes / self.turn_bytes)
        order = np.lexsort((-flows.age_s, flows.priority == 0, rounds))
        may = (flows.priorities >= TURNS_LEVELS) & ~flows.migration
        has = np.zeros(len(flows), np.bool_)
        _hand_out(order[may[order]], flows.source, flows.destination, np.zeros(flows.hosts, np.int64), has)
        return has


@compiled
def _hand_out(order: Ints, source: Ints, destination: Ints, ends: Ints, has: Bools) -> None:
    """Turns into `has`, in this order; `ends` (zeros, one per host): 1 sends in a turn, 2 receives, 3 does both."""
    for row in order:
        if ends[source[row]] & 1 == 0 and ends[destination[row]] & 2 == 0:
            ends[source[row]] |= 1
            ends[destination[row]] |= 2
            has[row] = True
