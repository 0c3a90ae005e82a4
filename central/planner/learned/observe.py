"""What the policy sees: features of VMs, PMs and places, and the masks. Nothing depends on the cluster's size.

Every feature is a ratio or a gain in slots, so one set of weights serves any number of machines and any sizes of node.
Gains come first: what leaving and arriving is worth at once, by the objective at hand, and how it gathers fragments.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from central.planner.model.cluster import Bools, Ints
from central.planner.model.state import State, Valuation
from central.planner.solvers.gains import shift_gain

Singles = npt.NDArray[np.float32]

VM_FEATURES = 14
PM_FEATURES = 10
PLACE_FEATURES = 9


@dataclass(frozen=True)
class Observation:
    """One state. V VMs, M PMs, G groups, P places, L most VMs on a PM.

    Attributes:
        vm: (V, VM_FEATURES).
        pm: (M, PM_FEATURES).
        members: (M, L) VMs of each PM, -1 beyond their number: the trees of the sparse attention.
        vm_mask: (V,) VMs that may be chosen: movable, and some other place has room.
        arrive, gather, fits: (G, P) per group and place, meaningful for places of the group's kind.
        leave: (V,) gain of each VM's leaving.
    """

    vm: Singles
    pm: Singles
    members: Ints
    vm_mask: Bools
    arrive: Singles
    gather: Singles
    fits: Bools
    leave: Singles


class Observer:
    """What does not change between the states of one cluster, kept."""

    def __init__(self, valuation: Valuation) -> None:
        self.valuation = valuation
        self.slot_cores = max(1, valuation.terms[0].cores or 16)

    def observe(self, state: State, used: float) -> Observation:
        """Features of a state; `used` is the share of MNL used up."""
        cluster = state.cluster
        groups, places = cluster.groups, len(cluster.place_pm)
        leave = np.zeros((groups, places), dtype=np.float32)
        arrive, gather_in, gather_out = np.zeros_like(leave), np.zeros_like(leave), np.zeros_like(leave)
        fits = np.zeros((groups, places), dtype=np.bool_)
        for group in range(groups):
            window = slice(cluster.group_places[group].start, cluster.group_places[group].stop)
            leave[group, window] = shift_gain(state, self.valuation, group, 1)
            arrive[group, window] = shift_gain(state, self.valuation, group, -1)
            gather_in[group, window] = self._gather(state, group, window, -1)
            gather_out[group, window] = self._gather(state, group, window, 1)
            fits[group, window] = state.fits(group)
        vm, mask, vm_leave = self._vms(state, leave, arrive, gather_out, fits, used)
        return Observation(vm, self._pms(state, used), members(state), mask, arrive, gather_in, fits, vm_leave)

    def _gather(self, state: State, group: int, window: slice, sign: int) -> npt.NDArray[np.float64]:
        """Growth of the sum of squared remainders, in units of a squared slot."""
        cluster = state.cluster
        total: npt.NDArray[np.float64] = np.zeros(window.stop - window.start)
        for part in range(int(cluster.group_arity[group])):
            free = state.free_cores[cluster.place_nodes[window, part]]
            after = (free + sign * cluster.group_cores[group, part]) % self.slot_cores
            total += (after.astype(float) ** 2 - (free % self.slot_cores).astype(float) ** 2) / self.slot_cores**2
        return total

    def _vms(
        self, state: State, leave: Singles, arrive: Singles, gather: Singles, fits: Bools, used: float
    ) -> tuple[Singles, Bools, Singles]:
        cluster = state.cluster
        group, place = cluster.vm_group, np.maximum(state.vm_place, 0)
        best_in = np.where(fits, arrive, -9.0).max(axis=1, initial=-9.0)
        room = fits.mean(axis=1)
        node = cluster.place_nodes[place, 0]
        last = np.take_along_axis(cluster.place_nodes[place], (cluster.group_arity[group] - 1)[:, None], axis=1)[:, 0]
        cap = np.maximum(1, cluster.node_cores[node])
        first_free, last_free = state.free_cores[node], state.free_cores[last]
        cores = cluster.group_cores[group, 0]
        out = leave[group, place]
        columns = [
            cores / cap,
            cores % self.slot_cores / self.slot_cores,
            cluster.group_mem_mb[group, 0] / np.maximum(1, cluster.node_mem_mb[node]),
            cluster.group_arity[group] - 1.0,
            out,
            np.maximum(best_in, -4.0)[group],
            np.maximum(out + best_in[group], -4.0),
            gather[group, place],
            first_free / cap,
            first_free % self.slot_cores / self.slot_cores,
            last_free % self.slot_cores / self.slot_cores,
            (first_free + cores) % self.slot_cores / self.slot_cores,
            room[group],
            np.full(len(group), used),
        ]
        free_elsewhere = fits.sum(axis=1)[group] - fits[group, place]
        mask: Bools = np.logical_and(cluster.vm_movable, free_elsewhere > 0)
        return np.stack(columns, axis=1).astype(np.float32), mask, out

    def _pms(self, state: State, used: float) -> Singles:
        cluster = state.cluster
        nodes = cluster.pm_nodes
        held = nodes >= 0
        free = np.where(held, state.free_cores[nodes], 0)
        cap = np.maximum(1, np.where(held, cluster.node_cores[nodes], 0))
        rest = free % self.slot_cores / self.slot_cores
        count = held.sum(axis=1)
        mem = np.where(held, state.free_mem_mb[nodes] / np.maximum(1, cluster.node_mem_mb[nodes]), 0.0)
        columns = [
            free.sum(axis=1) / cap.sum(axis=1),
            (free / cap).max(axis=1),
            np.where(held, free / cap, 1.0).min(axis=1),
            rest.sum(axis=1) / count,
            rest.max(axis=1),
            np.where(held, rest, 1.0).min(axis=1),
            mem.sum(axis=1) / count,
            (free // self.slot_cores).sum(axis=1) / count,
            cluster.node_active[cluster.pm_nodes[:, 0]],
            np.full(len(nodes), used),
        ]
        return np.stack(columns, axis=1).astype(np.float32)

    def places(self, state: State, seen: Observation, vm: int) -> tuple[range, Singles, Bools]:
        """Stage two: (places of the VM's kind, their features (K, PLACE_FEATURES), which are legal (K,))."""
        cluster = state.cluster
        group, source = int(cluster.vm_group[vm]), int(state.vm_place[vm])
        places = cluster.group_places[group]
        window = slice(places.start, places.stop)
        nodes = cluster.place_nodes[window]
        arity = int(cluster.group_arity[group])
        free, last = state.free_cores[nodes[:, 0]], state.free_cores[nodes[:, arity - 1]]
        cap = np.maximum(1, cluster.node_cores[nodes[:, 0]])
        cores = int(cluster.group_cores[group, 0])
        here = cluster.place_pm[window] == cluster.place_pm[source]
        after = (free - cores) % self.slot_cores / self.slot_cores
        arrive = seen.arrive[group, window]
        columns = [
            arrive,
            arrive + seen.leave[vm],
            seen.gather[group, window],
            free / cap,
            free % self.slot_cores / self.slot_cores,
            after,
            (last - int(cluster.group_cores[group, arity - 1])) % self.slot_cores / self.slot_cores,
            after == 0,
            here,
        ]
        legal = seen.fits[group, window].copy()
        legal[source - places.start] = False
        if arity > 1:
            legal &= ~here  # places on the same nodes overlap: what leaving gives is not counted in `fits`
        forbidden = state.forbidden_pms(vm)
        if forbidden is not None:
            legal &= ~forbidden[cluster.place_pm[window]]
        return places, np.stack(columns, axis=1).astype(np.float32), legal


def members(state: State) -> Ints:
    """(M, L) VMs of each PM, -1 beyond their number."""
    cluster = state.cluster
    placed = np.flatnonzero(state.vm_place >= 0)
    pm = cluster.place_pm[state.vm_place[placed]]
    order = np.argsort(pm, kind="stable")
    placed, pm = placed[order], pm[order]
    count = np.bincount(pm, minlength=len(cluster.mapping.pms))
    rank = np.arange(len(pm)) - np.repeat(np.cumsum(count) - count, count)
    table: Ints = np.full((len(count), max(1, int(count.max(initial=0)))), -1, dtype=np.int64)
    table[pm, rank] = placed
    return table
