"""Kernel for one bottleneck: any number of senders into one link, every event in O(log flows).

The engine uses it where all flows meet in one link that is nowhere faster than their other links (the star with one
receiver); `fabric` handles the rest, and a test holds that both agree. How it works:

1. Only the highest occupied level is served. Inside it the flows share equally (processor sharing), or one at a time is
   served in order of arrival (FIRST_COME) or of remaining bytes (SHORTEST).
2. With equal sharing each level has a clock that counts the bytes each of its flows has been served. A flow that still
   needs b bytes to its next boundary (end, or change of level) has the tag clock + b; clocks of levels that are not
   served stand still, so no other flow has to be touched at an event.
3. One binary heap orders all flows by (level, tag); its top is the flow of the next boundary.
"""

from typing import NamedTuple

import numpy as np

from simulator.arrays import (
    ACTIVE,
    DONE,
    EVENTS,
    FREE,
    NEXT,
    NO_SLOT,
    OUT,
    OUTPUT_FULL,
    PEAK,
    Arrivals,
    Finished,
    Floats,
    Ints,
    Rule,
    all_free,
    doubled,
    zeros,
)
from simulator.compiled import compiled, inner
from simulator.rank import place, standing
from simulator.schemes import SHARED, SHORTEST


class Star(NamedTuple):
    """All state of the link.

    Slots (shape (capacity,)) hold active flows: size, remaining (at the last event that touched the flow), boundary
    (remaining bytes at which the level changes), tag and level (the heap's key), fixed (level of a verdict, or -1),
    peers, queued, host, destination, flow (number), start. Levels (shape (levels,)): clock, population and owed, the
    sum of its flows' tags and boundaries. The heap and the stack of free slots hold slot numbers.
    """

    size: Floats
    remaining: Floats
    boundary: Floats
    tag: Floats
    start: Floats
    queued: Floats
    level: Ints
    fixed: Ints
    peers: Ints
    host: Ints
    destination: Ints
    flow: Ints
    heap: Ints
    free: Ints
    clock: Floats
    owed: Floats
    population: Ints
    now: Floats  # shape (1,)
    counters: Ints

    @classmethod
    def idle(cls, levels: int, capacity: int) -> "Star":
        """An idle link with `levels` levels and room for `capacity` active flows."""
        state: Star = zeros(
            cls,
            capacity,
            free=all_free(capacity),
            clock=np.zeros(levels),
            owed=np.zeros(levels),
            population=np.zeros(levels, np.int64),
            now=np.zeros(1),
            counters=np.zeros(8, np.int64),
        )
        state.counters[FREE] = capacity
        return state

    def grown(self) -> "Star":
        """The same state with room for twice as many active flows."""
        larger: Star = doubled(self, self._fields[: self._fields.index("free")])
        return larger


@inner
def _before(level: Ints, tag: Floats, a: int, b: int) -> bool:
    return bool(level[a] < level[b] or (level[a] == level[b] and tag[a] < tag[b]))


@inner
def _sift_down(heap: Ints, n: int, level: Ints, tag: Floats, at: int) -> None:
    slot = heap[at]
    while True:
        child = 2 * at + 1
        if child >= n:
            break
        if child + 1 < n and _before(level, tag, heap[child + 1], heap[child]):
            child += 1
        if not _before(level, tag, heap[child], slot):
            break
        heap[at] = heap[child]
        at = child
    heap[at] = slot


@inner
def _sift_up(heap: Ints, level: Ints, tag: Floats, at: int) -> None:
    slot = heap[at]
    while at > 0:
        parent = (at - 1) // 2
        if not _before(level, tag, slot, heap[parent]):
            break
        heap[at] = heap[parent]
        at = parent
    heap[at] = slot


@inner
def _serve(s: Star, slot: int, sent_bytes: float, shared: int, order: int) -> None:
    """Time passes for the flows in service, whose first is in `slot`: none reaches its next boundary in it."""
    level = s.level[slot]
    if level < shared:
        s.clock[level] += sent_bytes / s.population[level]
        return
    s.remaining[slot] = max(s.remaining[slot] - sent_bytes, s.boundary[slot])
    if order == SHORTEST:
        s.tag[slot] = s.remaining[slot]


@compiled
def advance(s: Star, rule: Rule, rate: float, arrivals: Arrivals, until: float, out: Finished) -> int:
    """Run every event up to the time `until` (seconds; infinite runs until all is done).

    `counters[NEXT]` is the next of `arrivals`; finished flows go to `out`, `counters[OUT]` of them. `rate` is in
    payload bytes per second. Returns DONE, OUTPUT_FULL (empty the output and call again) or NO_SLOT (enlarge the state
    and call again).
    """
    size, remaining, boundary, tag = s.size, s.remaining, s.boundary, s.tag
    level, fixed, peers, host = s.level, s.fixed, s.peers, s.host
    heap, clock, owed, population, counters = s.heap, s.clock, s.owed, s.population, s.counters
    order, basis, thresholds, buffer_bytes = rule.order, rule.basis, rule.thresholds, rule.buffer_bytes
    shared = rule.turns if order == SHARED else 0  # levels before it share, later ones serve one flow at a time
    start, arriving, last, room = arrivals.start, arrivals.size, len(arrivals.start), len(out.flow)
    now, n, i, events = s.now[0], counters[ACTIVE], counters[NEXT], counters[EVENTS]
    free_n, out_n, peak = counters[FREE], counters[OUT], counters[PEAK]
    result = DONE
    while True:
        if out_n >= room:
            result = OUTPUT_FULL
            break
        next_arrival = start[i] if i < last else np.inf
        boundary_at = np.inf
        slot = -1
        if n > 0:
            slot = heap[0]
            k = level[slot]
            if k < shared:
                boundary_at = now + max(tag[slot] - clock[k], 0.0) * population[k] / rate
            else:
                boundary_at = now + (remaining[slot] - boundary[slot]) / rate
        if min(boundary_at, next_arrival) > until or (n == 0 and i >= last):
            break
        events += 1
        if boundary_at <= next_arrival:  # the top flow ends or changes its level
            k = level[slot]
            if k < shared:
                clock[k] = tag[slot]
                owed[k] -= tag[slot] + boundary[slot]
            now = boundary_at
            remaining[slot] = boundary[slot]
            population[k] -= 1
            if population[k] == 0:
                clock[k] = owed[k] = 0.0  # nobody refers to them: start afresh, which keeps them precise
            if remaining[slot] <= 0.0:
                out.flow[out_n], out.start[out_n], out.size[out_n] = s.flow[slot], s.start[slot], size[slot]
                out.fct[out_n], out.peers[out_n] = now - s.start[slot], peers[slot]
                out.queued[out_n], out.host[out_n], out.destination[out_n] = (
                    s.queued[slot],
                    host[slot],
                    s.destination[slot],
                )
                out_n += 1
                s.free[free_n] = slot
                free_n += 1
                n -= 1
                heap[0] = heap[n]
                if n > 0:
                    _sift_down(heap, n, level, tag, 0)
                continue
        else:
            if free_n == 0:
                events -= 1
                result = NO_SLOT
                break
            if n > 0:
                _serve(s, slot, rate * (next_arrival - now), shared, order)
            now = next_arrival
            free_n -= 1
            slot = s.free[free_n]
            size[slot] = remaining[slot] = arriving[i]
            s.start[slot], s.flow[slot] = now, arrivals.first_flow + i
            host[slot], s.destination[slot] = arrivals.host[i], arrivals.destination[i]
            fixed[slot], peers[slot], s.queued[slot] = -1, 0, 0.0
            i += 1
        # The flow in `slot` enters a level.
        if fixed[slot] >= 0:
            k, bound = fixed[slot], 0.0
        else:
            k, bound = place(basis, thresholds[host[slot]], buffer_bytes, size[slot], remaining[slot])
        level[slot], boundary[slot] = k, max(bound, 0.0)
        if k < shared:  # one at a time, nobody else's packets stand in the queue
            peers[slot] = max(peers[slot], population[k])
            to_send = owed[k] - population[k] * clock[k]
            s.queued[slot] = max(s.queued[slot], standing(rule.queue_bytes, population[k], to_send))
        population[k] += 1
        if k < shared:
            tag[slot] = clock[k] + (remaining[slot] - boundary[slot])
            owed[k] += tag[slot] + boundary[slot]
        elif order == SHORTEST:
            tag[slot] = remaining[slot]
        else:
            tag[slot] = s.flow[slot]
        if n > 0 and heap[0] == slot:
            _sift_down(heap, n, level, tag, 0)
        else:
            heap[n] = slot
            n += 1
            peak = max(peak, n)
            _sift_up(heap, level, tag, n - 1)
    counters[ACTIVE], counters[NEXT], counters[EVENTS] = n, i, events
    counters[FREE], counters[OUT], counters[PEAK] = free_n, out_n, peak
    if result == DONE and until < np.inf and until > now:
        if n > 0:
            _serve(s, heap[0], rate * (until - now), shared, order)
        now = until
    s.now[0] = now
    return result


@compiled
def settle(s: Star, rule: Rule) -> None:
    """Write into `remaining` what every active flow still has to send at this moment."""
    shared = rule.turns if rule.order == SHARED else 0
    for i in range(s.counters[ACTIVE]):
        slot = s.heap[i]
        if s.level[slot] < shared:
            left = s.boundary[slot] + max(s.tag[slot] - s.clock[s.level[slot]], 0.0)
            s.remaining[slot] = min(left, s.size[slot])


@compiled
def rank_all(s: Star, rule: Rule) -> None:
    """Find every active flow's level anew, after thresholds or verdicts changed.

    Call `settle` with the old rule first.
    """
    n = s.counters[ACTIVE]
    shared = rule.turns if rule.order == SHARED else 0
    s.clock[:] = 0.0
    s.owed[:] = 0.0
    s.population[:] = 0
    for i in range(n):
        slot = s.heap[i]
        if s.fixed[slot] >= 0:
            k, bound = s.fixed[slot], 0.0
        else:
            row = rule.thresholds[s.host[slot]]
            k, bound = place(rule.basis, row, rule.buffer_bytes, s.size[slot], s.remaining[slot])
        s.level[slot], s.boundary[slot] = k, max(bound, 0.0)
        s.population[k] += 1
        if k < shared:
            s.tag[slot] = s.remaining[slot] - s.boundary[slot]
            s.owed[k] += s.remaining[slot]
        elif rule.order == SHORTEST:
            s.tag[slot] = s.remaining[slot]
        else:
            s.tag[slot] = s.flow[slot]
    for at in range(n // 2 - 1, -1, -1):
        _sift_down(s.heap, n, s.level, s.tag, at)
