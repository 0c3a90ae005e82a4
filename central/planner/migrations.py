"""A running plan as flows: each migration is announced as a long flow of the lowest priority.

Data only: the central daemon hands the announcements to the long-flow agent, which schedules them beside the tenants'
traffic. The size is known beforehand (the VM's memory), which is more than it knows of any other flow.
"""

from collections.abc import Iterator

import msgspec

from central.planner.model.mapping import Mapping
from central.planner.model.plan import Plan

Name = str


class PlanRequest(msgspec.Struct, frozen=True, kw_only=True, tag="plan_request"):
    """Ask central for a plan. `mapping` is VMR2L JSON; the rest as on the command line."""

    mapping: bytes
    mnl: int | None = None
    objective: str = "fr"
    solver: str = "auto"
    deadline_s: float = 5.0
    seed: int = 0


class PlanAnswer(msgspec.Struct, frozen=True, kw_only=True, tag="plan_answer"):
    """plan.json, or the one-line error and its exit code."""

    plan: bytes = b""
    error: str = ""
    exit_code: int = 0


class MigrationFlow(msgspec.Struct, frozen=True, kw_only=True, tag="migration_flow"):
    """One migration of a running plan, as the long-flow agent sees it."""

    plan: Name
    vm: Name
    source_host: Name
    target_host: Name
    size_bytes: int  # memory to copy; a live migration copies dirtied pages again on top
    batch: int
    level: int  # the lowest priority there is


def announce(mapping: Mapping, plan: Plan, name: str, levels: int) -> Iterator[MigrationFlow]:
    """The flows of a plan in its order; moves inside one host copy nothing over the network and are left out."""
    for move in plan.moves:
        if move.source.pm != move.target.pm:
            yield MigrationFlow(
                plan=name,
                vm=str(mapping.vms[move.vm].name),
                source_host=str(mapping.pms[move.source.pm].name),
                target_host=str(mapping.pms[move.target.pm].name),
                size_bytes=mapping.vms[move.vm].mem_mb * 2**20,
                batch=move.batch,
                level=levels - 1,
            )


def answer(request: PlanRequest) -> PlanAnswer:
    """Plan for a request; never raises for what the peer sent."""
    from central.planner.formats import vmr2l
    from central.planner.model.objective import parse_objective
    from central.planner.model.plan import plan_document
    from central.planner.model.problem import Limits, Problem
    from central.planner.planning import make_plan
    from fabricpilot.errors import FabricpilotError

    try:
        mapping = vmr2l.parse(request.mapping, "mapping of the request")
        mnl = request.mnl if request.mnl is not None else (mapping.maximum_migration or 50)
        problem = Problem(mapping, parse_objective(request.objective), Limits(mnl))
        seconds = min(max(request.deadline_s, 0.1), MOST_SECONDS)
        plan = make_plan(problem, request.solver, seconds, request.seed)
    except FabricpilotError as error:
        return PlanAnswer(error=str(error), exit_code=error.exit_code)
    return PlanAnswer(plan=msgspec.json.encode(plan_document(mapping, plan)))


MOST_SECONDS = 60.0  # of one request, whatever the peer asks for
