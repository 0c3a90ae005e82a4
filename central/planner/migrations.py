"""A plan's migrations as flows to announce: long flows whose size is known before they begin.

Central's long-flow scheduling then gives them the lowest priority (`announced`).
"""

from collections.abc import Iterator

from central.planner.model.mapping import Mapping
from central.planner.model.plan import Move
from fabricpilot.errors import UsageError
from fabricpilot.wire import MAX_MIGRATIONS, MigrationFlow


def flows_of(mapping: Mapping, moves: tuple[Move, ...]) -> Iterator[MigrationFlow]:
    """The flows of a plan in its order; moves inside one host copy nothing over the network and are left out."""
    for move in moves:
        if move.source.pm != move.target.pm:
            yield MigrationFlow(
                vm=str(mapping.vms[move.vm].name),
                source_host=str(mapping.pms[move.source.pm].name),
                target_host=str(mapping.pms[move.target.pm].name),
                size_bytes=mapping.vms[move.vm].mem_mb * 2**20,
                batch=move.batch,
            )


def announcement(mapping: Mapping, moves: tuple[Move, ...]) -> list[MigrationFlow]:
    """The flows of one message.

    Raises:
        UsageError: more than one message may hold.
    """
    flows = list(flows_of(mapping, moves))
    if len(flows) > MAX_MIGRATIONS:
        raise UsageError(f"the plan has {len(flows)} migrations, and at most {MAX_MIGRATIONS} can be announced; cut it")
    return flows
