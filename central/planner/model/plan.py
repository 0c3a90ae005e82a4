"""A plan: moves in executable order, what they are worth, and `plan.json`.

A move names machines by position in the mapping; the file names them by name. Memory on the way is what a migration
copies. A batch is a run of moves that may be carried out at the same time (see `solvers.batches`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from central.planner.model.mapping import Mapping, Name
from fabricpilot.errors import UsageError


@dataclass(frozen=True)
class Place:
    """Where a VM is: a PM and the numbers of the NUMA nodes its shares are on, in the order of the VM's shares."""

    pm: int
    nodes: tuple[int, ...]


@dataclass(frozen=True)
class Move:
    """One migration of VM `vm` (position in the mapping)."""

    vm: int
    source: Place
    target: Place
    batch: int = 0


@dataclass(frozen=True)
class TermWorth:
    """Slots of one request and the share of the free resource they leave unused."""

    request: str
    slots: int
    fragment_rate: float


@dataclass(frozen=True)
class Worth:
    """What a state of the cluster is worth: the objective (a weighted fragment rate) and each of its terms."""

    fragment_rate: float
    terms: tuple[TermWorth, ...]

    @property
    def slots(self) -> int:
        """Slots of the first term: 16-core slots unless the objective says otherwise."""
        return self.terms[0].slots


@dataclass(frozen=True)
class Plan:
    """Moves, and the report on them. `bound` is a proven lower bound on the objective, None where nobody has one."""

    moves: tuple[Move, ...]
    initial: Worth
    final: Worth
    prefixes: tuple[Worth, ...]  # after 1, 2, ... moves: stop early where the rest is not worth it
    bound: float | None
    solver: str
    seconds: float
    mnl: int
    seed: int
    objective: str
    notes: tuple[str, ...] = ()

    @property
    def gap(self) -> float | None:
        """Fragment rate above the bound, at least 0; None without a bound."""
        return None if self.bound is None else max(0.0, self.final.fragment_rate - self.bound)


class _End(msgspec.Struct):
    pm: Name
    numa: list[int]


class _Move(msgspec.Struct):
    vm: Name
    source: _End = msgspec.field(name="from")
    target: _End = msgspec.field(name="to")
    batch: int = 0


class _PlanFile(msgspec.Struct):
    moves: list[_Move]
    mnl: int | None = None


def plan_document(mapping: Mapping, plan: Plan) -> dict[str, Any]:
    """The content of plan.json."""
    return {
        "moves": [move_document(mapping, move) for move in plan.moves],
        "initial": worth_document(plan.initial),
        "final": worth_document(plan.final),
        "bound": None if plan.bound is None else {"fragment_rate": round(plan.bound, 6)},
        "gap": None if plan.gap is None else round(plan.gap, 6),
        "solver": plan.solver,
        "seconds": round(plan.seconds, 3),
        "mnl": plan.mnl,
        "seed": plan.seed,
        "objective": plan.objective,
        "prefixes": [
            {"moves": count, "fragment_rate": round(worth.fragment_rate, 6), "slots": worth.slots}
            for count, worth in enumerate(plan.prefixes, start=1)
        ],
        "notes": list(plan.notes),
    }


def move_document(mapping: Mapping, move: Move) -> dict[str, Any]:
    """One move as plan.json holds it."""

    def end(place: Place) -> dict[str, Any]:
        return {"pm": mapping.pms[place.pm].name, "numa": list(place.nodes)}

    return {
        "vm": mapping.vms[move.vm].name,
        "from": end(move.source),
        "to": end(move.target),
        "batch": move.batch,
    }


def worth_document(worth: Worth) -> dict[str, Any]:
    """A worth as plan.json holds it; the terms only where there are several."""
    document: dict[str, Any] = {"fragment_rate": round(worth.fragment_rate, 6), "slots": worth.slots}
    if len(worth.terms) > 1:
        document["terms"] = [
            {"request": term.request, "slots": term.slots, "fragment_rate": round(term.fragment_rate, 6)}
            for term in worth.terms
        ]
    return document


def read_moves(raw: bytes, mapping: Mapping, source: str) -> tuple[tuple[Move, ...], int | None]:
    """Moves and MNL of a plan.json for `mapping`.

    Raises:
        UsageError: not a plan, or it names a machine that the mapping does not have. Whether the moves are legal is the
            checker's to say.
    """
    try:
        document = msgspec.json.decode(raw, type=_PlanFile)
    except msgspec.DecodeError as error:
        raise UsageError(f"{source} is not a plan: {error}") from None
    moves = []
    for position, entry in enumerate(document.moves):
        where = f"{source}, move {position}"
        vm = mapping.vm_by_name.get(str(entry.vm))
        if vm is None:
            raise UsageError(f"{where}: VM {entry.vm} is not in the mapping")
        ends = []
        for end in (entry.source, entry.target):
            pm = mapping.pm_by_name.get(str(end.pm))
            if pm is None:
                raise UsageError(f"{where}: PM {end.pm} is not in the mapping")
            ends.append(Place(pm, tuple(end.numa)))
        moves.append(Move(vm, ends[0], ends[1], entry.batch))
    return tuple(moves), document.mnl


def copied_mb(mapping: Mapping, moves: Sequence[Move]) -> int:
    """Memory, in MB, that the moves copy over the network."""
    return sum(mapping.vms[move.vm].mem_mb for move in moves)
