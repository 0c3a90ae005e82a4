"""Which moves may run at the same time.

A batch is a run of consecutive moves that all fit before any of its VMs has left: the room each arrival needs exists at
the start of the batch, no VM moves twice in it, and no two VMs that must stay apart meet while both sides still run.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from central.planner.model.mapping import Mapping
from central.planner.model.plan import Move, Place
from central.planner.model.problem import Step


def moves_of(mapping: Mapping, steps: Sequence[Step]) -> tuple[Move, ...]:
    """Steps as moves with their sources, in batches as large as the order allows."""
    at = [Place(vm.pm, tuple(share.node for share in vm.shares)) for vm in mapping.vms]
    moves = []
    for step in steps:
        moves.append(Move(step.vm, at[step.vm], step.target))
        at[step.vm] = step.target
    return _batched(mapping, moves)


def _batched(mapping: Mapping, moves: Sequence[Move]) -> tuple[Move, ...]:
    room: Counter[tuple[int, int, str]] = Counter()  # used per node
    for vm in mapping.vms:
        for share in vm.shares:
            room[vm.pm, share.node, "cores"] += share.cores
            room[vm.pm, share.node, "mem"] += share.mem_mb
    size = {
        (index, node.number, what): amount
        for index, pm in enumerate(mapping.pms)
        for node in pm.nodes
        for what, amount in (("cores", node.cores), ("mem", node.mem_mb))
    }
    sets_of: dict[int, list[int]] = {}
    for number, group in enumerate(mapping.anti_affinity):
        for member in group.members:
            sets_of.setdefault(member, []).append(number)

    def domain(number: int, pm: int) -> tuple[int, object]:
        host = mapping.anti_affinity[number].granularity == "host"
        return number, pm if host else str(mapping.pms[pm].rack)

    present: Counter[tuple[int, object]] = Counter(
        domain(number, mapping.vms[vm].pm) for vm, numbers in sets_of.items() for number in numbers
    )
    batch = 0
    open_moves: list[Move] = []  # of the batch: their sources are given up when it closes
    result = []

    def shift(move: Move, place: Place, sign: int) -> None:
        for share, node in zip(mapping.vms[move.vm].shares, place.nodes, strict=True):
            room[place.pm, node, "cores"] += sign * share.cores
            room[place.pm, node, "mem"] += sign * share.mem_mb
        for number in sets_of.get(move.vm, ()):
            if domain(number, move.source.pm) != domain(number, move.target.pm):
                present[domain(number, place.pm)] += sign

    for move in moves:
        shift(move, move.target, 1)
        crowded = any(
            room[move.target.pm, node, what] > size[move.target.pm, node, what]
            for node in move.target.nodes
            for what in ("cores", "mem")
        )
        meets = any(
            domain(number, move.source.pm) != domain(number, move.target.pm)
            and present[domain(number, move.target.pm)] > 1
            for number in sets_of.get(move.vm, ())
        )
        if open_moves and (crowded or meets or any(other.vm == move.vm for other in open_moves)):
            for other in open_moves:
                shift(other, other.source, -1)
            open_moves = []
            batch += 1
        open_moves.append(move)
        result.append(replace(move, batch=batch))
    return tuple(result)
