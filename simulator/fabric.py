"""Kernel for any fabric: flows with paths, rates from `sharing`, one heap of what happens next.

A flow sends at a constant rate between two events that touch it. Its next event (end, or change of level) is due at a
time known when its rate was set; an indexed heap holds these times and is corrected for the flows whose rate changed,
and only for those.
"""

from typing import NamedTuple

import numpy as np

from simulator.arrays import (
    ACTIVE,
    DONE,
    DUE,
    EVENTS,
    FREE,
    HOP_BITS,
    HOPS,
    NEXT,
    NO_SLOT,
    OUT,
    OUTPUT_FULL,
    PEAK,
    USED,
    Arrivals,
    Finished,
    Floats,
    Ints,
    Paths,
    Rule,
    all_free,
    doubled,
    zeros,
)
from simulator.compiled import compiled, inner
from simulator.rank import place, standing
from simulator.sharing import Sharing, join, leave, slide, update


class Fabric(NamedTuple):
    """All state but the rates.

    Slots (shape (slots,)): size, remaining at the time `synced`, boundary (remaining bytes at which the level changes),
    due (time of that), place in the heap (-1: the flow stands still), and as in `star.Star` the rest. A slot is in use
    where `flow` is not -1.
    """

    size: Floats
    remaining: Floats
    boundary: Floats
    synced: Floats
    due: Floats
    start: Floats
    queued: Floats
    fixed: Ints
    peers: Ints
    host: Ints
    destination: Ints
    flow: Ints
    at: Ints
    heap: Ints
    changed: Ints  # scratch
    new_rate: Floats  # scratch
    free: Ints
    now: Floats  # shape (1,)
    counters: Ints

    @classmethod
    def idle(cls, slots: int) -> "Fabric":
        """No flows, room for `slots`."""
        state: Fabric = zeros(cls, slots, free=all_free(slots), now=np.zeros(1), counters=np.zeros(8, np.int64))
        state.flow[:] = state.at[:] = -1
        state.counters[FREE] = slots
        return state

    def grown(self) -> "Fabric":
        """The same state with room for twice as many active flows."""
        larger: Fabric = doubled(self, self._fields[: self._fields.index("free")], {"flow": -1, "at": -1})
        return larger


@inner
def _up(heap: Ints, at: Ints, due: Floats, i: int) -> None:
    slot = heap[i]
    while i > 0:
        parent = (i - 1) // 2
        if due[heap[parent]] <= due[slot]:
            break
        heap[i] = heap[parent]
        at[heap[i]] = i
        i = parent
    heap[i] = slot
    at[slot] = i


@inner
def _down(heap: Ints, n: int, at: Ints, due: Floats, i: int) -> None:
    slot = heap[i]
    while True:
        child = 2 * i + 1
        if child >= n:
            break
        if child + 1 < n and due[heap[child + 1]] < due[heap[child]]:
            child += 1
        if due[slot] <= due[heap[child]]:
            break
        heap[i] = heap[child]
        at[heap[i]] = i
        i = child
    heap[i] = slot
    at[slot] = i


@inner
def _unschedule(f: Fabric, slot: int) -> None:
    i = f.at[slot]
    if i < 0:
        return
    f.counters[DUE] -= 1
    n = f.counters[DUE]
    f.at[slot] = -1
    if i < n:
        f.heap[i] = f.heap[n]
        f.at[f.heap[i]] = i
        _up(f.heap, f.at, f.due, i)
        _down(f.heap, n, f.at, f.due, f.at[f.heap[i]])


@inner
def _sync(f: Fabric, x: Sharing, slot: int) -> None:
    sent = x.rate[slot] * (f.now[0] - f.synced[slot])
    f.remaining[slot] = max(f.remaining[slot] - sent, f.boundary[slot])
    f.synced[slot] = f.now[0]


@inner
def _apply_rates(f: Fabric, x: Sharing) -> None:
    """Take over the rates of the flows that `sharing` changed, and when their next events are due."""
    n = update(x, f.changed, f.new_rate)
    rate, remaining, boundary, synced = x.rate, f.remaining, f.boundary, f.synced
    heap, at, due, now = f.heap, f.at, f.due, f.now[0]
    scheduled = f.counters[DUE]
    for i in range(n):
        slot = f.changed[i]
        left = max(remaining[slot] - rate[slot] * (now - synced[slot]), boundary[slot])
        remaining[slot] = left
        synced[slot] = now
        rate[slot] = f.new_rate[i]
        place_in_heap = at[slot]
        if rate[slot] > 0.0:
            before = due[slot]
            due[slot] = now + (left - boundary[slot]) / rate[slot]
            if place_in_heap < 0:
                heap[scheduled] = slot
                scheduled += 1
                _up(heap, at, due, scheduled - 1)
            elif due[slot] < before:
                _up(heap, at, due, place_in_heap)
            else:
                _down(heap, scheduled, at, due, place_in_heap)
        elif place_in_heap >= 0:
            at[slot] = -1
            scheduled -= 1
            if place_in_heap < scheduled:
                moved = heap[scheduled]
                heap[place_in_heap] = moved
                at[moved] = place_in_heap
                _up(heap, at, due, place_in_heap)
                _down(heap, scheduled, at, due, at[moved])
    f.counters[DUE] = scheduled


@inner
def _to_send(f: Fabric, x: Sharing, link: int, level: int, enough: float) -> float:
    """What the flows of a link and level still have to send together; not counted further once it is `enough`."""
    total, entry = 0.0, x.head[link, level]
    while entry >= 0 and total < enough:
        slot = entry >> HOP_BITS
        sent = x.rate[slot] * (f.now[0] - f.synced[slot])
        total += max(f.remaining[slot] - sent, f.boundary[slot])
        entry = x.next[entry]
    return total


@inner
def _place(f: Fabric, rule: Rule, slot: int) -> int:
    """The level a flow belongs to; notes where it changes next."""
    level: int = f.fixed[slot]
    bound = 0.0
    if level < 0:
        row = rule.thresholds[f.host[slot]]
        level, bound = place(rule.basis, row, rule.buffer_bytes, f.size[slot], f.remaining[slot])
    f.boundary[slot] = max(bound, 0.0)
    return level


@inner
def _enter_level(f: Fabric, x: Sharing, rule: Rule, slot: int, level: int) -> None:
    x.level[slot] = level
    for hop in range(HOPS):
        link = x.path[slot, hop]
        if link >= 0:
            f.peers[slot] = max(f.peers[slot], x.flows[link, level])
            most = standing(rule.queue_bytes, x.flows[link, level], np.inf)
            if most > f.queued[slot]:
                to_send = _to_send(f, x, link, level, most)
                f.queued[slot] = max(f.queued[slot], standing(rule.queue_bytes, x.flows[link, level], to_send))
    join(x, slot)


@compiled
def advance(f: Fabric, x: Sharing, rule: Rule, arrivals: Arrivals, until: float, out: Finished) -> int:
    """Run every event up to the time `until`; as `star.advance`."""
    c = f.counters
    last, room = len(arrivals.start), len(out.flow)
    while True:
        if c[OUT] >= room:
            return OUTPUT_FULL
        next_arrival = arrivals.start[c[NEXT]] if c[NEXT] < last else np.inf
        due = np.inf
        if c[DUE] > 0:
            due = max(f.due[f.heap[0]], f.now[0])
        if min(due, next_arrival) > until or (c[DUE] == 0 and c[NEXT] >= last):
            if until < np.inf:
                f.now[0] = max(f.now[0], until)
            return DONE
        if due <= next_arrival:
            c[EVENTS] += 1
            slot = f.heap[0]
            f.now[0] = due
            f.synced[slot] = due
            f.remaining[slot] = f.boundary[slot]
            level = _place(f, rule, slot) if f.remaining[slot] > 0.0 else -1
            if level >= 0 and slide(x, slot, level):
                f.due[slot] = due + (f.remaining[slot] - f.boundary[slot]) / x.rate[slot]
                _down(f.heap, c[DUE], f.at, f.due, 0)
                continue
            _unschedule(f, slot)
            leave(x, slot)
            if level >= 0:
                _enter_level(f, x, rule, slot, level)
            else:
                i = c[OUT]
                out.flow[i], out.start[i], out.size[i] = f.flow[slot], f.start[slot], f.size[slot]
                out.fct[i], out.peers[i] = due - f.start[slot], f.peers[slot]
                out.queued[i], out.host[i], out.destination[i] = f.queued[slot], f.host[slot], f.destination[slot]
                c[OUT] += 1
                f.flow[slot] = -1
                x.level[slot] = -1
                f.free[c[FREE]] = slot
                c[FREE] += 1
                c[ACTIVE] -= 1
        else:
            if c[FREE] == 0:
                return NO_SLOT
            c[EVENTS] += 1
            f.now[0] = next_arrival
            c[FREE] -= 1
            slot = f.free[c[FREE]]
            i = c[NEXT]
            c[NEXT] += 1
            c[ACTIVE] += 1
            c[PEAK] = max(c[PEAK], c[ACTIVE])
            c[USED] = max(c[USED], slot + 1)
            f.size[slot] = f.remaining[slot] = arrivals.size[i]
            f.start[slot] = f.synced[slot] = next_arrival
            f.flow[slot] = arrivals.first_flow + i
            f.host[slot], f.destination[slot] = arrivals.host[i], arrivals.destination[i]
            f.fixed[slot], f.peers[slot], f.queued[slot] = -1, 0, 0.0
            x.cap[slot] = np.inf
            for hop in range(HOPS):
                x.path[slot, hop] = arrivals.path[i, hop]
            _enter_level(f, x, rule, slot, _place(f, rule, slot))
        _apply_rates(f, x)


@compiled
def settle(f: Fabric, x: Sharing) -> None:
    """Write into `remaining` what every active flow still has to send at this moment."""
    for slot in range(f.counters[USED]):
        if f.flow[slot] >= 0:
            _sync(f, x, slot)


@compiled
def rank_all(f: Fabric, x: Sharing, rule: Rule) -> None:
    """Find every active flow's level anew, after thresholds, verdicts or paths changed; call `settle` first."""
    for slot in range(f.counters[USED]):
        if f.flow[slot] >= 0:
            _unschedule(f, slot)
            leave(x, slot)
            _enter_level(f, x, rule, slot, _place(f, rule, slot))
    _apply_rates(f, x)


@compiled
def enter_all(f: Fabric, x: Sharing, rule: Rule) -> None:
    """Put flows that another kernel had on their links, whose paths are set; before that there were none."""
    for slot in range(f.counters[USED]):
        _enter_level(f, x, rule, slot, _place(f, rule, slot))
    _apply_rates(f, x)


@compiled
def move(f: Fabric, x: Sharing, rule: Rule, slot: int, path: Paths) -> None:
    """Give a flow another path, and the level and cap that its verdict says; call `settle` first."""
    _unschedule(f, slot)
    leave(x, slot)
    for hop in range(HOPS):
        x.path[slot, hop] = path[hop]
    _enter_level(f, x, rule, slot, _place(f, rule, slot))
    _apply_rates(f, x)
