"""Rates in a fabric: strict priority between levels, max-min fairness inside a level, kept up to date at every event.

Each link has, per level, a fair share: no flow of that level gets more from this link. A flow's rate is the smallest
share on its path. A link's share is its water level: what levels above left over, divided so that flows that other
links hold lower keep their rate and the rest gets the same. If all links are in this state, every flow has a link that
is full and where nobody of its level gets more: max-min fairness (Bertsekas and Gallager, Data Networks, 6.5.2). A
flow's own cap holds it like one more link that no other flow uses.

After a flow came, left or moved, only its links are looked at anew; where a share changes, the links of the flows that
feel it follow, in order of asking, until nothing changes. It ends, because the smallest share of a level settles first,
then the next (Charny, MIT 1994). Then what the level leaves over is compared with what the next level was given.
"""

from typing import NamedTuple

import numpy as np

from simulator.arrays import HOP_BITS, HOPS, Floats, Ints, Paths, doubled
from simulator.compiled import inner

TOLERANCE = 1e-9  # relative change of a fair share that is not followed up; far above rounding, far below notice
MAX_FABRIC_LEVELS = 64  # a link's occupied and pending levels are the bits of one integer

# Entries of Sharing.counts.
TOUCHED, PENDING, RECOMPUTED = range(3)


class Sharing(NamedTuple):
    """Per link and level: its flows (lists, per hop), share, given (what levels above left over) and used.

    Entries of the lists are slot << HOP_BITS | hop. `pending` holds per link the levels to look at, as bits, and
    `pending_links` which links have any. `touched` are flows whose rate may have changed.
    """

    capacity: Floats  # (links,) payload bytes per second
    path: Paths  # (slots, HOPS)
    rate: Floats  # (slots,)
    cap: Floats  # (slots,) no flow sends faster; infinite without one
    level: Ints  # (slots,)
    previous: Ints  # (slots * HOPS,)
    next: Ints  # (slots * HOPS,)
    head: Ints  # (links, levels), -1 where empty
    flows: Ints  # (links, levels), how many
    share: Floats  # (links, levels), infinite where the link does not hold anybody back
    given: Floats  # (links, levels)
    used: Floats  # (links, levels)
    pending: Ints  # (links,)
    pending_links: Ints  # (links,)
    queue: Ints  # (links,) of the level in work
    urgency: Floats  # (links,) the smallest share that changed and reached the queued link
    queued: Ints  # (links,)
    is_touched: Ints  # (slots,)
    touched: Ints  # (slots,)
    limit: Floats  # (slots,) scratch of the water level
    counts: Ints

    @classmethod
    def idle(cls, capacity: Floats, levels: int, slots: int) -> "Sharing":
        """No flows on links of the given capacities."""
        links = len(capacity)
        return cls(
            capacity=capacity,
            path=np.full((slots, HOPS), -1, np.int32),
            rate=np.zeros(slots),
            cap=np.full(slots, np.inf),
            level=np.zeros(slots, np.int64),
            previous=np.full(slots * HOPS, -1, np.int64),
            next=np.full(slots * HOPS, -1, np.int64),
            head=np.full((links, levels), -1, np.int64),
            flows=np.zeros((links, levels), np.int64),
            share=np.full((links, levels), np.inf),
            given=np.zeros((links, levels)),
            used=np.zeros((links, levels)),
            pending=np.zeros(links, np.int64),
            pending_links=np.zeros(links, np.int64),
            queue=np.zeros(links, np.int64),
            urgency=np.zeros(links),
            queued=np.zeros(links, np.int64),
            is_touched=np.zeros(slots, np.int64),
            touched=np.zeros(slots, np.int64),
            limit=np.zeros(slots),
            counts=np.zeros(3, np.int64),
        )

    def grown(self) -> "Sharing":
        """The same with room for twice as many flows."""
        per_slot = ("path", "rate", "cap", "level", "previous", "next", "is_touched", "touched", "limit")
        larger: Sharing = doubled(self, per_slot, {"cap": np.inf})
        return larger


@inner
def _mark(x: Sharing, link: int, level: int) -> None:
    if x.pending[link] == 0:
        x.pending_links[x.counts[PENDING]] = link
        x.counts[PENDING] += 1
    x.pending[link] |= np.int64(1) << np.int64(level)


@inner
def _touch(x: Sharing, slot: int) -> None:
    if x.is_touched[slot] == 0:
        x.is_touched[slot] = 1
        x.touched[x.counts[TOUCHED]] = slot
        x.counts[TOUCHED] += 1


@inner
def join(x: Sharing, slot: int) -> None:
    """Put a flow, whose path and level are set, on its links; call `update` when all changes are made."""
    level = x.level[slot]
    x.rate[slot] = 0.0
    _touch(x, slot)
    for hop in range(HOPS):
        link = x.path[slot, hop]
        if link < 0:
            break
        entry = slot << HOP_BITS | hop
        first = x.head[link, level]
        x.previous[entry] = -1
        x.next[entry] = first
        if first >= 0:
            x.previous[first] = entry
        x.head[link, level] = entry
        if x.flows[link, level] == 0:
            left = x.capacity[link]
            for above in range(level):
                left -= x.used[link, above]
            x.given[link, level] = left if left > TOLERANCE * x.capacity[link] else 0.0
        x.flows[link, level] += 1
        _mark(x, link, level)


@inner
def leave(x: Sharing, slot: int) -> None:
    """Take a flow off its links; call `update` when all changes are made."""
    level = x.level[slot]
    for hop in range(HOPS):
        link = x.path[slot, hop]
        if link < 0:
            break
        entry = slot << HOP_BITS | hop
        before, after = x.previous[entry], x.next[entry]
        if before >= 0:
            x.next[before] = after
        else:
            x.head[link, level] = after
        if after >= 0:
            x.previous[after] = before
        x.flows[link, level] -= 1
        if x.flows[link, level] == 0:
            x.share[link, level] = np.inf
        _mark(x, link, level)
    x.rate[slot] = 0.0


@inner
def slide(x: Sharing, slot: int, level: int) -> bool:
    """Move a flow to another level if nobody can feel it: no other flow of its links is in a level from old to new.

    Then all rates stay, and what its links know of the old level they know of the new one. False: nothing was done.
    """
    old = x.level[slot]
    low, high = min(old, level), max(old, level)
    for hop in range(HOPS):
        link = x.path[slot, hop]
        if link < 0:
            break
        others = -1
        for k in range(low, high + 1):
            others += x.flows[link, k]
        if others > 0:
            return False
    for hop in range(HOPS):
        link = x.path[slot, hop]
        if link < 0:
            break
        x.head[link, level], x.head[link, old] = x.head[link, old], -1
        x.flows[link, level], x.flows[link, old] = 1, 0
        x.share[link, level], x.share[link, old] = x.share[link, old], np.inf
        x.given[link, level] = x.given[link, old]
        x.used[link, level], x.used[link, old] = x.used[link, old], 0.0
    x.level[slot] = level
    return True


@inner
def _held_to(path: Paths, share: Floats, cap: Floats, slot: int, level: int, but: int, nor: int) -> float:
    """The smallest of a flow's cap and the shares on its path, two links left out."""
    smallest: float = cap[slot]
    for hop in range(HOPS):
        link = path[slot, hop]
        if link < 0:
            break
        if link != but and link != nor and share[link, level] < smallest:
            smallest = share[link, level]
    return smallest


@inner
def _water_level(limit: Floats, n: int, given: float) -> tuple[float, float]:
    """The share that fills `given` when the first `n` flows take no more than their `limit` (reordered), and the rest.

    The share is infinite where something is left over.
    """
    left, sharing = given, n
    while sharing > 0:
        share = max(left, 0.0) / sharing
        kept = 0
        for i in range(sharing):  # those held lower elsewhere keep that and drop out
            if limit[i] < share:
                left -= limit[i]
            else:
                limit[kept] = limit[i]
                kept += 1
        if kept == sharing:
            return share, 0.0
        sharing = kept
    return np.inf, max(left, 0.0)


@inner
def _settle_level(x: Sharing, level: int) -> None:
    """Recompute shares of the pending links of one level, and of those that feel it, until none changes."""
    path, share, cap, limit, used, given = x.path, x.share, x.cap, x.limit, x.used, x.given
    head, following, queue, queued, pending = x.head, x.next, x.queue, x.queued, x.pending
    pending_links, is_touched, touched, urgency = x.pending_links, x.is_touched, x.touched, x.urgency
    pending_n, touched_n = x.counts[PENDING], x.counts[TOUCHED]
    bit = np.int64(1) << np.int64(level)
    waiting = 0
    for i in range(pending_n):
        link = pending_links[i]
        if pending[link] & bit:
            queue[waiting] = link
            queued[link] = 1
            urgency[link] = 0.0
            waiting += 1
    while waiting > 0:
        at = 0
        for i in range(1, waiting):
            if urgency[queue[i]] < urgency[queue[at]]:
                at = i
        link = queue[at]
        waiting -= 1
        queue[at] = queue[waiting]
        queued[link] = 0
        x.counts[RECOMPUTED] += 1
        there = given[link, level]
        new, left = 0.0, there
        if there > 0.0:
            n = 0
            entry = head[link, level]
            while entry >= 0:
                limit[n] = _held_to(path, share, cap, entry >> HOP_BITS, level, link, -1)
                n += 1
                entry = following[entry]
            new, left = _water_level(limit, n, there)
        used[link, level] = there - left
        old = share[link, level]
        if new == old or abs(new - old) <= TOLERANCE * min(old, new):
            continue
        share[link, level] = new
        entry = head[link, level]
        while entry >= 0:
            slot = entry >> HOP_BITS
            entry = following[entry]
            elsewhere = _held_to(path, share, cap, slot, level, link, -1)
            if min(elsewhere, old) == min(elsewhere, new):
                continue  # held lower elsewhere before and after: nobody feels it
            if is_touched[slot] == 0:
                is_touched[slot] = 1
                touched[touched_n] = slot
                touched_n += 1
            for hop in range(HOPS):
                other = path[slot, hop]
                if other < 0:
                    break
                if other == link:
                    continue
                rest = _held_to(path, share, cap, slot, level, link, other)
                before, after = min(rest, old), min(rest, new)
                if before == after:
                    continue
                lower = min(before, after)
                if queued[other]:
                    urgency[other] = min(urgency[other], lower)
                    continue
                there = share[other, level]
                if lower >= there:
                    continue  # the other link holds the flow below both
                if pending[other] & bit == 0:  # what it leaves over has to be looked at in the end
                    if pending[other] == 0:
                        pending_links[pending_n] = other
                        pending_n += 1
                    pending[other] |= bit
                if there == np.inf and max(before, after) < np.inf:
                    used[other, level] += after - before
                    if used[other, level] < given[other, level]:
                        continue  # the other link was not full and is not now
                queue[waiting] = other
                queued[other] = 1
                urgency[other] = lower
                waiting += 1
    x.counts[PENDING], x.counts[TOUCHED] = pending_n, touched_n


@inner
def update(x: Sharing, changed: Ints, new_rate: Floats) -> int:
    """Bring all rates up to date after joins and leaves.

    Writes the flows whose rate changed to `changed` and what it is now to `new_rate` (both shape (slots,)); returns how
    many. `rate` itself still holds the old values, so that the caller can account for the time before.
    """
    capacity, path, share, cap = x.capacity, x.path, x.share, x.cap
    pending, pending_links = x.pending, x.pending_links
    flows, given, used = x.flows, x.given, x.used
    levels = flows.shape[1]
    while x.counts[PENDING] > 0:
        level = levels
        for i in range(x.counts[PENDING]):
            bits, k = pending[pending_links[i]], 0
            while k < level and bits & (np.int64(1) << np.int64(k)) == 0:
                k += 1
            level = min(level, k)
        _settle_level(x, level)
        bit = np.int64(1) << np.int64(level)
        kept = 0
        for i in range(x.counts[PENDING]):
            link = pending_links[i]
            if pending[link] & bit:
                pending[link] &= ~bit
                same = TOLERANCE * capacity[link]
                left = given[link, level] - used[link, level]
                if left <= same:
                    left = 0.0
                for below in range(level + 1, levels):
                    deeper = np.int64(1) << np.int64(below)
                    if flows[link, below] == 0 and pending[link] & deeper == 0:
                        continue
                    if abs(left - given[link, below]) <= same:
                        break
                    given[link, below] = left
                    if share[link, below] < np.inf or left <= used[link, below] or pending[link] & deeper:
                        pending[link] |= deeper
                        break
                    left -= used[link, below]  # it was not full and is not now
            if pending[link] != 0:
                pending_links[kept] = link
                kept += 1
        x.counts[PENDING] = kept
    changes = 0
    for i in range(x.counts[TOUCHED]):
        slot = x.touched[i]
        x.is_touched[slot] = 0
        if x.level[slot] < 0:
            continue  # it has left for good
        rate = _held_to(path, share, cap, slot, x.level[slot], -1, -1)
        if rate != x.rate[slot]:
            changed[changes] = slot
            new_rate[changes] = rate
            changes += 1
    x.counts[TOUCHED] = 0
    return changes
