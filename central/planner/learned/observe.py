"""What the policy sees: features of VMs, PMs and places, and the masks. Nothing depends on the cluster's size.

Every feature is a ratio or a gain in slots, so one set of weights serves any number of machines and any sizes of node.
Gains come first: what leaving and arriving is worth at once, by the objective at hand, and how it gathers fragments.

A move changes two PMs. So an `Observer` keeps the tables of one walk and works out only what those PMs changed; what is
*local* to a PM (its own features, and most of its VMs') is apart from what is global (the best place elsewhere), which
lets the network, too, encode only the PMs that changed.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from central.planner.learned.pairs import NONE, Pairs
from central.planner.model.cluster import Bools, Ints
from central.planner.model.state import Floats
from central.planner.solvers.greedy import Walk
from central.planner.solvers.tables import Singles

LOCAL_FEATURES = 12  # of a VM, from its own PM alone
VM_FEATURES = LOCAL_FEATURES + 6
PM_FEATURES = 9
PLACE_FEATURES = 10
PROGRESS_FEATURES = 2


@dataclass(frozen=True)
class Observation:
    """One state. V VMs, M PMs.

    Attributes:
        vm: (V, VM_FEATURES), the local ones first.
        pm: (M, PM_FEATURES).
        host: (V,) PM of each VM, -1 for one that is on no ACTIVE PM: it is in no tree, and masked.
        vm_mask: (V,) VMs that may be chosen: movable, and some other place has room.
        progress: (PROGRESS_FEATURES,) share of MNL used up; moves left per PM.
    """

    vm: Singles
    pm: Singles
    host: Ints
    vm_mask: Bools
    progress: Singles


class Observer:
    """The features of one walk; `moved` after every move keeps them true."""

    def __init__(self, walk: Walk, net: bool = True) -> None:
        """With `net` no VM may leave a place where one of its group arrived on this walk, nor arrive where one left.

        Two such moves are worth one at most, and a policy that follows its likeliest action goes round in circles.
        """
        state = walk.state
        cluster = state.cluster
        self.walk, self.state, self.cluster, self.tables = walk, state, cluster, walk.tables
        self.slot_cores = self.tables.slot_cores
        self.pairs = Pairs(state, walk.valuation, walk.occupancy)
        self.net = net
        self.gone: Bools = np.zeros(self.tables.fits.shape, dtype=np.bool_)
        self.come: Bools = np.zeros_like(self.gone)
        self.vm: Singles = np.zeros((len(cluster.vm_group), VM_FEATURES), dtype=np.float32)
        self.pm: Singles = np.zeros((len(cluster.mapping.pms), PM_FEATURES), dtype=np.float32)
        self.members: list[list[int]] = [[] for _ in cluster.mapping.pms]
        self.host: Ints = np.where(state.vm_place >= 0, cluster.place_pm[np.maximum(state.vm_place, 0)], -1)
        for vm in np.flatnonzero(state.vm_place >= 0).tolist():
            self.members[int(self.host[vm])].append(vm)
        self._refresh(range(len(cluster.mapping.pms)))

    def fork(self, walk: Walk) -> "Observer":
        """The same features for a fork of the walk."""
        twin = object.__new__(Observer)
        twin.__dict__.update(self.__dict__)
        twin.walk, twin.state, twin.tables = walk, walk.state, walk.tables
        twin.pairs = self.pairs.copy(walk.state, walk.occupancy)
        twin.gone, twin.come = self.gone.copy(), self.come.copy()
        twin.vm, twin.pm, twin.host = self.vm.copy(), self.pm.copy(), self.host.copy()
        twin.members = [list(vms) for vms in self.members]
        return twin

    def moved(self, vm: int, source: int, target: int) -> None:
        """Note that `vm` has gone from one place to another: the walk already shows it."""
        group = int(self.cluster.vm_group[vm])
        source_pm, target_pm = int(self.cluster.place_pm[source]), int(self.cluster.place_pm[target])
        if self.net:
            self.gone[group, source] = self.come[group, target] = True
        self.members[source_pm].remove(vm)
        self.members[target_pm].append(vm)
        self.host[vm] = target_pm
        pms = sorted({source_pm, target_pm})
        self.pairs.changed(np.concatenate([self.tables.places_of[pm] for pm in pms]))
        self._refresh(pms)

    def observe(self) -> Observation:
        """The state now. A copy: it stays as it is when the walk goes on."""
        group, budget = self.cluster.vm_group, self.walk.budget
        place = np.maximum(self.state.vm_place, 0)
        best_in, best_out = self._best_in(), self._best_out()
        both, turn = self.pairs.leaving(best_in, best_out)
        room = self.tables.fits.sum(axis=1)
        count = np.maximum(1, self.tables.kind.sum(axis=1))
        used = budget.moves / max(1, budget.limits.mnl)
        self.vm[:, LOCAL_FEATURES] = best_in[group]
        self.vm[:, LOCAL_FEATURES + 1] = np.maximum(self.vm[:, 4] + best_in[group], NONE)
        self.vm[:, LOCAL_FEATURES + 2] = np.maximum(both[group, place] + best_in[group], NONE)
        self.vm[:, LOCAL_FEATURES + 3] = np.maximum(turn[group, place] + best_in[group], NONE)
        self.vm[:, LOCAL_FEATURES + 4] = (room / count)[group]
        self.vm[:, LOCAL_FEATURES + 5] = used
        here = self.tables.fits[group, place]
        mask: Bools = self.cluster.vm_movable & (room[group] - here > 0) & ~self.come[group, place]
        left = min(1.0, budget.moves_left / max(1, len(self.pm)))
        progress = np.array([used, left], dtype=np.float32)
        return Observation(self.vm.copy(), self.pm.copy(), self.host.copy(), mask, progress)

    def _best_in(self) -> Floats:
        """(G,) what arriving at the best place is worth to a VM of each group."""
        best: Floats = np.where(self.tables.fits, self.tables.arrive, NONE).max(axis=1, initial=NONE).astype(float)
        return best

    def _best_out(self) -> Floats:
        """(G,) what leaving the best place is worth to a VM of each group."""
        there = self.walk.occupancy.count > 0
        best: Floats = np.where(there, self.tables.leave, NONE).max(axis=1, initial=NONE).astype(float)
        return best

    def _refresh(self, pms: Iterable[int]) -> None:
        chosen = list(pms)
        self._pm_features(np.array(chosen, dtype=np.int64))
        self._vm_features(np.array([vm for pm in chosen for vm in self.members[pm]], dtype=np.int64))

    def _vm_features(self, vms: Ints) -> None:
        if not len(vms):
            return
        cluster, state = self.cluster, self.state
        group, place = cluster.vm_group[vms], state.vm_place[vms]
        node = cluster.place_nodes[place, 0]
        last = cluster.place_nodes[place, cluster.group_arity[group] - 1]
        cap = np.maximum(1, cluster.node_cores[node])
        first_free, last_free = state.free_cores[node], state.free_cores[last]
        cores = cluster.group_cores[group, 0]
        slot = self.slot_cores
        columns = [
            cores / cap,
            cores % slot / slot,
            cluster.group_mem_mb[group, 0] / np.maximum(1, cluster.node_mem_mb[node]),
            cluster.group_arity[group] - 1.0,
            self.tables.leave[group, place],
            self.tables.gather_out[group, place],
            first_free / cap,
            first_free % slot / slot,
            last_free % slot / slot,
            (first_free + cores) % slot / slot,
            *self._partners(group, place),
        ]
        self.vm[vms, :LOCAL_FEATURES] = np.stack(columns, axis=1)

    def _partners(self, group: Ints, place: Ints) -> tuple[Singles, Singles]:
        """What leaving gains with the best partner, all else left aside: another that leaves, or another that comes."""
        both, turn = np.full(len(group), NONE, dtype=np.float32), np.full(len(group), NONE, dtype=np.float32)
        pairs = self.pairs
        for groups, places, two, swapped in zip(pairs.groups, pairs.places, pairs.both, pairs.turn, strict=True):
            mine = np.flatnonzero(np.isin(group, groups))
            row, column = np.searchsorted(groups, group[mine]), place[mine] - places.start
            both[mine] = two[row, :, column].max(axis=1, initial=NONE)
            turn[mine] = swapped[row, :, column].max(axis=1, initial=NONE)
        return both, turn

    def _pm_features(self, pms: Ints) -> None:
        cluster, state, slot = self.cluster, self.state, self.slot_cores
        nodes = cluster.pm_nodes[pms]
        held = nodes >= 0
        free = np.where(held, state.free_cores[nodes], 0)
        cap = np.maximum(1, np.where(held, cluster.node_cores[nodes], 0))
        rest = free % slot / slot
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
            (free // slot).sum(axis=1) / count,
            cluster.node_active[nodes[:, 0]],
        ]
        self.pm[pms] = np.stack(columns, axis=1)

    def places(self, vm: int) -> tuple[range, Singles, Bools]:
        """Stage two: (places of the VM's kind, their features (K, PLACE_FEATURES), which are legal (K,))."""
        cluster, state, slot = self.cluster, self.state, self.slot_cores
        group, source = int(cluster.vm_group[vm]), int(state.vm_place[vm])
        places = cluster.group_places[group]
        window = slice(places.start, places.stop)
        nodes = cluster.place_nodes[window]
        arity = int(cluster.group_arity[group])
        free, last = state.free_cores[nodes[:, 0]], state.free_cores[nodes[:, arity - 1]]
        cap = np.maximum(1, cluster.node_cores[nodes[:, 0]])
        here = cluster.place_pm[window] == cluster.place_pm[source]
        after = (free - int(cluster.group_cores[group, 0])) % slot / slot
        arrive = self.tables.arrive[group, window]
        columns = [
            arrive,
            arrive + self.tables.leave[group, source],
            self.tables.gather_in[group, window],
            free / cap,
            free % slot / slot,
            after,
            (last - int(cluster.group_cores[group, arity - 1])) % slot / slot,
            after == 0,
            here,
            self.pairs.arriving(group, self._best_in()),
        ]
        legal = self.tables.fits[group, window] & ~self.gone[group, window]
        legal[source - places.start] = False
        if arity > 1:
            legal &= ~here  # places on the same nodes overlap: what leaving gives is not counted in `fits`
        forbidden = state.forbidden_pms(vm)
        if forbidden is not None:
            legal &= ~forbidden[cluster.place_pm[window]]
        return places, np.stack(columns, axis=1).astype(np.float32), legal
