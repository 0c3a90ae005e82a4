"""Whether a flow can be put into an order at all, by room alone: the proof behind extra moves through a spare place.

Logic: a node with room now for everything that still has to arrive there can never be in anybody's way, so arrivals at
such places are made first, each with a departure that makes room, until only places remain that contend. What is left
is searched exhaustively over the counts still to be moved, up to `MOST_STATES`. Anti-affinity is not looked at: it can
only forbid more, so a no is a proof. With extra moves, a VM of the flow may leave for a limbo that has room for all: if
no order exists even so, no number of real spare places helps. A VM that is not in the flow could make way too, but it
has to go and to come back, so from two extra moves on there is another way, and no more than two are ever proven.
"""

from central.planner.model.state import State
from central.planner.solvers.grouped import Counts, Flow

MOST_STATES = 20_000
MOST_PROVEN = 2  # extra moves
LIMBO = -1  # a place with room for everybody

_Left = tuple[frozenset[tuple[tuple[int, int], int]], frozenset[tuple[tuple[int, int], int]], int]


def orderable(state: State, flow: Flow, extra: int = 0) -> bool | None:
    """Whether some order with that many extra moves makes every move fit; None if that was too much to find out."""
    cores, mem_mb = state.free_cores.tolist(), state.free_mem_mb.tolist()
    return _Search(state).reach(dict(flow.leaving), dict(flow.arriving), cores, mem_mb, extra)


def least_extra(state: State, flow: Flow, used: int) -> int:
    """A proven lower bound on the extra moves that the flow takes, no more than the `used` that are known to do."""
    for extra in range(min(used, MOST_PROVEN)):
        if orderable(state, flow, extra) is not False:
            return extra
    return min(used, MOST_PROVEN)


class _Search:
    def __init__(self, state: State) -> None:
        cluster = state.cluster
        self.nodes = cluster.place_nodes.tolist()
        self.cores, self.mem_mb = cluster.group_cores.tolist(), cluster.group_mem_mb.tolist()
        self.arity = cluster.group_arity.tolist()
        self.seen: set[_Left] = set()

    def reach(self, leaving: Counts, arriving: Counts, cores: list[int], mem_mb: list[int], extra: int) -> bool | None:
        """Depth first, from what is left to move, the room there is, and the extra moves that are left."""
        stack = [(leaving, arriving, cores, mem_mb, extra)]
        while stack:
            leaving, arriving, cores, mem_mb, extra = stack.pop()
            if not arriving:
                return True
            left = (frozenset(leaving.items()), frozenset(arriving.items()), extra)
            if left in self.seen:
                continue
            if len(self.seen) >= MOST_STATES:
                return None
            self.seen.add(left)
            able = [key for key in arriving if self._fits(key, cores, mem_mb)]
            harmless = [key for key in able if self._harmless(key, arriving, cores, mem_mb)]
            if extra and not harmless:
                for group, source in leaving:
                    if source != LIMBO:
                        moved = self._moved(group, source, LIMBO, leaving, arriving, cores, mem_mb)
                        stack.append((*moved, extra - 1))
            for group, place in harmless[:1] or able:
                for source in [at for one, at in leaving if one == group]:
                    stack.append((*self._moved(group, source, place, leaving, arriving, cores, mem_mb), extra))
        return False

    def _fits(self, key: tuple[int, int], cores: list[int], mem_mb: list[int]) -> bool:
        group, place = key
        return all(
            cores[self.nodes[place][part]] >= self.cores[group][part]
            and mem_mb[self.nodes[place][part]] >= self.mem_mb[group][part]
            for part in range(self.arity[group])
        )

    def _harmless(self, key: tuple[int, int], arriving: Counts, cores: list[int], mem_mb: list[int]) -> bool:
        """Whether the place's nodes have room for all that has to arrive there."""
        group, place = key
        for node in self.nodes[place][: self.arity[group]]:
            need_cores = need_mem = 0
            for (other, at), count in arriving.items():
                for part in range(self.arity[other]):
                    if self.nodes[at][part] == node:
                        need_cores += count * self.cores[other][part]
                        need_mem += count * self.mem_mb[other][part]
            if need_cores > cores[node] or need_mem > mem_mb[node]:
                return False
        return True

    def _moved(
        self,
        group: int,
        source: int,
        place: int,
        leaving: Counts,
        arriving: Counts,
        cores: list[int],
        mem_mb: list[int],
    ) -> tuple[Counts, Counts, list[int], list[int]]:
        leaving, arriving, cores, mem_mb = dict(leaving), dict(arriving), list(cores), list(mem_mb)
        if place == LIMBO:
            leaving[group, LIMBO] = leaving.get((group, LIMBO), 0) + 1
        for counts, at, sign in ((leaving, source, 1), (arriving, place, -1)):
            if sign < 0 and at == LIMBO:
                continue
            counts[group, at] -= 1
            if not counts[group, at]:
                del counts[group, at]
            for part in range(0 if at == LIMBO else self.arity[group]):
                cores[self.nodes[at][part]] += sign * self.cores[group][part]
                mem_mb[self.nodes[at][part]] += sign * self.mem_mb[group][part]
        return leaving, arriving, cores, mem_mb
