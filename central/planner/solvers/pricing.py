"""For one PM alone: the best pattern of arrivals and departures at given prices (numba).

In `columns` VMs have prices: a PM pays `cost[g]` for each VM of group g it takes in, and has `income[g, k]` from the
k-th that it gives away (never more than from the one before). What remains is a small knapsack per PM over cores and
units of memory: on each node the VMs that sit on one node leave some room (r cores, s units); the VMs spread over both
nodes then take the same from both rooms; what is left is worth its slots.

Arrays are per PM with two node slots; a PM with one node has a second of size 0. Values are slots, prices likewise.
With one level of memory (index 0 only) memory is left out of account.
"""

from typing import Any

import numba
import numpy as np

NOTHING = -1e18
compiled: Any = numba.njit(cache=True, nogil=True)


@compiled
def fill(table, item, outs, sizes, units, income, cost, room, room_units, top, top_units):  # type: ignore[no-untyped-def]
    """Dynamic program over the room one kind of VMs leaves; returns the number of stages.

    table[stage, r, s] is the best income if they leave r cores and s units; item[stage] is group + 1 for arrivals of
    that group (any number), -(group + 1) for one departure. `outs` says how many of each group may leave; they leave
    (room, room_units) now and (top, top_units) once all have gone.
    """
    table[0, : top + 1, : top_units + 1] = NOTHING
    table[0, room, room_units] = 0.0
    stage = 0
    for g in range(sizes.shape[0]):
        size, unit = sizes[g], units[g]
        for k in range(outs[g]):
            stage += 1
            item[stage] = -(g + 1)
            gain = income[g, min(k, income.shape[1] - 1)]
            for r in range(top + 1):
                for s in range(top_units + 1):
                    best = table[stage - 1, r, s]
                    if r >= size and s >= unit and table[stage - 1, r - size, s - unit] + gain > best:
                        best = table[stage - 1, r - size, s - unit] + gain
                    table[stage, r, s] = best
    for g in range(sizes.shape[0]):
        size, unit = sizes[g], units[g]
        stage += 1
        item[stage] = g + 1
        for r in range(top, -1, -1):
            for s in range(top_units, -1, -1):
                best = table[stage - 1, r, s]
                if r + size <= top and s + unit <= top_units and table[stage, r + size, s + unit] - cost[g] > best:
                    best = table[stage, r + size, s + unit] - cost[g]
                table[stage, r, s] = best
    return stage


@compiled
def trace(table, item, stages, r, s, sizes, units, into, outof):  # type: ignore[no-untyped-def]
    """Follow `table` back from (r, s): how many of each group arrive and leave."""
    for stage in range(stages, 0, -1):
        if item[stage] < 0:
            g = -item[stage] - 1
            if table[stage, r, s] != table[stage - 1, r, s]:
                outof[g] += 1
                r -= sizes[g]
                s -= units[g]
        else:
            g = item[stage] - 1
            while table[stage, r, s] != table[stage - 1, r, s]:
                into[g] += 1
                r += sizes[g]
                s += units[g]


@compiled
def slots(cores, mem_mb, term_cores, term_mem_mb):  # type: ignore[no-untyped-def]
    """How often a request fits into that much."""
    if term_cores > 0 and term_mem_mb > 0:
        return min(cores // term_cores, mem_mb // term_mem_mb)
    return cores // term_cores if term_cores > 0 else mem_mb // term_mem_mb


@compiled
def best_room(table, stages, worth, taken, taken_units, need, need_units, top, top_units, found):  # type: ignore[no-untyped-def]
    """Best income plus worth on one node once `taken` is gone from the room and at least `need` remains; -> found."""
    best = NOTHING
    for r in range(taken + need, top + 1):
        for s in range(taken_units + need_units, top_units + 1):
            value = table[stages, r, s] + worth[r - taken, s - taken_units]
            if value > best:
                best = value
                found[0], found[1] = r, s
    return best


@compiled
def price_all(pms, held, vms, groups, prices, terms, patterns):  # type: ignore[no-untyped-def]
    """Best pattern of each PM in `pms` (K,), written to `patterns` (K, 2 + 4A + 2B).

    Args:
        pms: (K,) PMs to price.
        held: cap (M, 2) cores, cap_units (M, 2), rest_mb (M, 2) memory beyond whole units, room (M, 2) and
            room_units (M, 2) that one-node VMs leave, taken (M,) and taken_units (M,) by two-node VMs per node,
            unit_mb.
        vms: outs (M, 2, A) and pair_outs (M, B): movable VMs of each one-node and two-node group.
        groups: sizes (A,), units (A,), pair_sizes (B,), pair_units (B,): what a VM takes per node.
        prices: income (M, 2, A, K) from the first, second, ... VM that leaves (the last stands for all after it), cost
            (A,) of an arrival; pair_income (M, B, K), pair_cost (B,).
        terms: cores, mem_mb, weights of one-node terms (T,), then of the two-node term cores, mem_mb, weight or 0.
        patterns: reduced value, gain, into node 0 (A), out of 0 (A), into 1, out of 1, pairs in (B), pairs out (B).
    """
    cap, cap_units, rest_mb, room, room_units, taken, taken_units, unit_mb = held
    outs, pair_outs = vms
    sizes, units, pair_sizes, pair_units = groups
    income, cost, pair_income, pair_cost = prices
    cores, mem_mb, weights, both_cores, both_mem_mb, both_weight = terms
    a, b = sizes.shape[0], pair_sizes.shape[0]
    most = 2 + a + b
    for i in pms:
        most = max(most, 2 + a + max(outs[i, 0].sum(), outs[i, 1].sum()), 2 + b + pair_outs[i].sum())
    shape = (most, cap.max() + 1, cap_units.max() + 1)
    table0, table1, table2 = np.empty(shape), np.empty(shape), np.empty(shape)
    item0, item1, item2 = np.zeros(most, np.int64), np.zeros(most, np.int64), np.zeros(most, np.int64)
    worths = np.empty((2, shape[1], shape[2]))
    known = np.full(2, -1, np.int64)
    at0, at1 = np.zeros(2, np.int64), np.zeros(2, np.int64)
    ignore_memory = shape[2] == 1
    for row in range(pms.shape[0]):
        pm = pms[row]
        c0, c1, u0, u1 = cap[pm, 0], cap[pm, 1], cap_units[pm, 0], cap_units[pm, 1]
        for k in range(2):
            if known[k] != rest_mb[pm, k]:
                known[k] = rest_mb[pm, k]
                for r in range(shape[1]):
                    for s in range(shape[2]):
                        total = 0.0
                        for t in range(cores.shape[0]):
                            total += weights[t] * slots(r, s * unit_mb + rest_mb[pm, k], cores[t], mem_mb[t])
                        worths[k, r, s] = total
        n0 = fill(table0, item0, outs[pm, 0], sizes, units, income[pm, 0], cost, room[pm, 0], room_units[pm, 0], c0, u0)
        n1 = fill(table1, item1, outs[pm, 1], sizes, units, income[pm, 1], cost, room[pm, 1], room_units[pm, 1], c1, u1)
        # Two-node VMs as a table over what they leave of a common room, so that one routine serves both.
        common, common_units = min(c0, c1), min(u0, u1)
        left, left_units = common - taken[pm], common_units - taken_units[pm]
        n2 = fill(
            table2,
            item2,
            pair_outs[pm],
            pair_sizes,
            pair_units,
            pair_income[pm],
            pair_cost,
            left,
            left_units,
            common,
            common_units,
        )
        # At best nothing is taken by pairs: a bound that skips nearly every other amount.
        limit = best_room(table0, n0, worths[0], 0, 0, 0, 0, c0, u0, at0)
        limit += best_room(table1, n1, worths[1], 0, 0, 0, 0, c1, u1, at1)
        most_both = 0.0
        if both_weight > 0.0:
            most_both = both_weight * min(
                slots(c0, (u0 + 1) * unit_mb + rest_mb[pm, 0], both_cores, 0 if ignore_memory else both_mem_mb),
                slots(c1, (u1 + 1) * unit_mb + rest_mb[pm, 1], both_cores, 0 if ignore_memory else both_mem_mb),
            )
        best = NOTHING
        q, v, r0, s0, r1, s1 = 0, 0, 0, 0, 0, 0
        for turn in range((common + 1) * (common_units + 1) + 1):
            if turn == 0:  # what pairs take now comes first: a good value to beat
                p, w = taken[pm], taken_units[pm]
            else:
                p, w = (turn - 1) // (common_units + 1), (turn - 1) % (common_units + 1)
            from_pairs = table2[n2, common - p, common_units - w]
            if from_pairs + limit + most_both <= best + 1e-12 or from_pairs <= NOTHING / 2:
                continue
            count = 0
            while True:
                need = count * both_cores
                lack0, lack1 = count * both_mem_mb - rest_mb[pm, 0], count * both_mem_mb - rest_mb[pm, 1]
                need0 = 0 if ignore_memory or lack0 <= 0 else (lack0 + unit_mb - 1) // unit_mb
                need1 = 0 if ignore_memory or lack1 <= 0 else (lack1 + unit_mb - 1) // unit_mb
                top0 = best_room(table0, n0, worths[0], p, w, need, need0, c0, u0, at0)
                if top0 <= NOTHING / 2:
                    break
                top1 = best_room(table1, n1, worths[1], p, w, need, need1, c1, u1, at1)
                if top1 <= NOTHING / 2:
                    break
                value = from_pairs + top0 + top1 + count * both_weight
                if value > best + 1e-12:
                    best, q, v = value, p, w
                    r0, s0, r1, s1 = at0[0], at0[1], at1[0], at1[1]
                if both_weight <= 0.0:
                    break
                count += 1
        before = worths[0, room[pm, 0] - taken[pm], room_units[pm, 0] - taken_units[pm]]
        before += worths[1, room[pm, 1] - taken[pm], room_units[pm, 1] - taken_units[pm]]
        after = worths[0, r0 - q, s0 - v] + worths[1, r1 - q, s1 - v]
        if both_weight > 0.0:
            term_mem = 0 if ignore_memory else both_mem_mb
            before += both_weight * min(
                slots(
                    room[pm, 0] - taken[pm],
                    (room_units[pm, 0] - taken_units[pm]) * unit_mb + rest_mb[pm, 0],
                    both_cores,
                    term_mem,
                ),
                slots(
                    room[pm, 1] - taken[pm],
                    (room_units[pm, 1] - taken_units[pm]) * unit_mb + rest_mb[pm, 1],
                    both_cores,
                    term_mem,
                ),
            )
            after += both_weight * min(
                slots(r0 - q, (s0 - v) * unit_mb + rest_mb[pm, 0], both_cores, term_mem),
                slots(r1 - q, (s1 - v) * unit_mb + rest_mb[pm, 1], both_cores, term_mem),
            )
        pattern = patterns[row]
        pattern[:] = 0.0
        pattern[0] = best - before
        pattern[1] = after - before
        trace(table0, item0, n0, r0, s0, sizes, units, pattern[2 : 2 + a], pattern[2 + a : 2 + 2 * a])
        trace(table1, item1, n1, r1, s1, sizes, units, pattern[2 + 2 * a : 2 + 3 * a], pattern[2 + 3 * a : 2 + 4 * a])
        trace(
            table2,
            item2,
            n2,
            common - q,
            common_units - v,
            pair_sizes,
            pair_units,
            pattern[2 + 4 * a : 2 + 4 * a + b],
            pattern[2 + 4 * a + b :],
        )
