"""A planning request: everything `fabricpilot plan` may ask for, as one message, and its answer.

The command line makes one and either carries it out here or sends it to central, which carries it out with the same
function; so both understand the same. On the wire it is MessagePack, compressed, in parts (`wire.PlanPart`).
"""

import json
import zlib
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from central.planner import checker, planning
from central.planner.model.mapping import Mapping
from central.planner.model.objective import parse_objective, parse_request
from central.planner.model.plan import Plan, plan_document, read_moves
from central.planner.model.problem import Limits, Problem
from fabricpilot.errors import FabricpilotError, UsageError
from fabricpilot.wire import MAX_PLAN_PART_BYTES, MAX_PLAN_PARTS

MOST_SECONDS = 60.0  # that central plans for one request, whatever the client asks for
MOST_UNPACKED_BYTES = 64 * 2**20  # of one request or answer
DEFAULT_MNL = 50

T = TypeVar("T", "PlanRequest", "PlanOutcome")


class PlanRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is to be planned; defaults as on the command line."""

    mapping: bytes = b""  # VMR2L JSON; empty where the mapping is at hand
    mnl: int | None = None  # default: the mapping's own, else 50
    deadline_s: float = 5.0
    solver: str = "auto"
    objective: str = "fr"
    make_room: str = ""  # a request to let in, instead of the objective
    earlier_plan: bytes | None = None  # plan.json to repair
    max_bytes: int | None = None
    cost_per_gb: float = 0.0
    cap_per_pm: int | None = None
    cap_per_tenant: int | None = None
    fixed: list[str] = []  # names of VMs that must stay
    samples: int = 8  # of the learned solver, and its quantiles
    vm_quantile: float = 0.98
    place_quantile: float = 0.95
    seed: int = 0


class PlanOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """plan.json, or the one-line error and its exit code."""

    plan: bytes = b""
    error: str = ""
    exit_code: int = 0


def problem_of(mapping: Mapping, request: PlanRequest) -> Problem:
    """The problem the request poses.

    Raises:
        UsageError: an objective or a number nobody can mean.
    """
    mnl = request.mnl
    if mnl is None:
        mnl = DEFAULT_MNL if mapping.maximum_migration is None else mapping.maximum_migration
    limits = Limits(
        mnl=mnl,
        max_bytes=request.max_bytes,
        per_pm=request.cap_per_pm,
        per_tenant=request.cap_per_tenant,
        fixed=frozenset(mapping.vm_by_name[name] for name in request.fixed if name in mapping.vm_by_name),
    )
    if not 0.0 <= request.cost_per_gb < float("inf"):
        raise UsageError(f"--cost-per-gb {request.cost_per_gb:g}: expected 0 or more")
    return Problem(mapping, replace(parse_objective(request.objective), cost_per_gb=request.cost_per_gb), limits)


def plan_for(mapping: Mapping, request: PlanRequest) -> Plan:
    """A checked plan, by what the request says.

    Raises:
        UsageError: the request contradicts itself, or its goal is proven to be out of reach.
        FabricpilotError: no plan was found.
    """
    from central.planner.replan import read_wishes, replan
    from central.planner.solvers.room import make_room

    problem = problem_of(mapping, request)
    seconds, seed = request.deadline_s, request.seed
    if not 0.0 < seconds < float("inf"):
        raise UsageError(f"--deadline {seconds:g}: expected more than 0 seconds")
    if request.make_room and request.earlier_plan is not None:
        raise UsageError("--make-room and --replan-from exclude each other: give one of them")
    if request.make_room:
        term = parse_request(request.make_room)
        return planning.plan_by(problem, planning.MAKE_ROOM, lambda p, d, s: make_room(p, term, d, s), seconds, seed)
    if request.earlier_plan is not None:
        wishes, gone = read_wishes(request.earlier_plan, mapping, "the earlier plan")
        return planning.plan_by(problem, "replan", lambda p, d, s: replan(p, wishes, gone, d, s), seconds, seed)
    if request.solver == "learned":
        from central.planner.learned.solver import Options, learned

        risk = Options(request.samples, request.vm_quantile, request.place_quantile)
        return planning.plan_by(problem, "learned", lambda p, d, s: learned(p, d, s, risk), seconds, seed)
    return planning.make_plan(problem, request.solver, seconds, seed)


def answer(request: PlanRequest) -> PlanOutcome:
    """Carry out a request that carries its mapping; never raises for what the client sent."""
    from central.planner.formats import vmr2l

    try:
        mapping = vmr2l.parse(request.mapping, "mapping of the request")
        limited = msgspec.structs.replace(request, deadline_s=min(request.deadline_s, MOST_SECONDS))
        plan = plan_for(mapping, limited)
    except FabricpilotError as error:
        return PlanOutcome(error=str(error), exit_code=error.exit_code)
    return PlanOutcome(plan=msgspec.json.encode(plan_document(mapping, plan)))


def plan_of(mapping: Mapping, request: PlanRequest, outcome: PlanOutcome) -> Plan:
    """The plan in an answer, checked here: nobody else's word is taken for it.

    Raises:
        FabricpilotError: the answer is an error, or not a plan for this mapping.
    """
    if outcome.error:
        raise (UsageError if outcome.exit_code == UsageError.exit_code else FabricpilotError)(outcome.error)
    problem = problem_of(mapping, request)
    moves, _ = read_moves(outcome.plan, mapping, "central's answer")
    report = checker.check(mapping, moves, problem.objective, problem.limits)
    if report.violation:
        raise FabricpilotError(f"central's plan does not hold for this mapping: {report.violation}")
    told: dict[str, Any] = json.loads(outcome.plan)
    bound = told.get("bound")
    return Plan(
        moves=moves,
        initial=report.worths[0],
        final=report.worths[-1],
        prefixes=report.worths[1:],
        bound=None if bound is None else float(bound["fragment_rate"]),
        solver=str(told.get("solver")),
        seconds=float(told.get("seconds", 0.0)),
        mnl=problem.limits.mnl,
        seed=request.seed,
        objective=request.objective,
        notes=tuple(str(note) for note in told.get("notes", ())),
    )


def pack(content: PlanRequest | PlanOutcome) -> bytes:
    """As bytes for the wire."""
    return zlib.compress(msgspec.msgpack.encode(content), 6)


def unpack_request(raw: bytes) -> PlanRequest:
    """A request from the wire.

    Raises:
        UsageError: it is none, or larger than anybody needs.
    """
    return _unpack(raw, PlanRequest, "request")


def unpack_outcome(raw: bytes) -> PlanOutcome:
    """An answer from the wire; errors as `unpack_request`."""
    return _unpack(raw, PlanOutcome, "answer")


def parts_of(raw: bytes) -> list[bytes]:
    """Bytes cut into parts that fit a message.

    Raises:
        UsageError: more parts than a request may have.
    """
    parts = [raw[start : start + MAX_PLAN_PART_BYTES] for start in range(0, len(raw), MAX_PLAN_PART_BYTES)] or [b""]
    if len(parts) > MAX_PLAN_PARTS:
        most = MAX_PLAN_PARTS * MAX_PLAN_PART_BYTES
        raise UsageError(f"{len(raw)} bytes compressed are too many for a request ({most}); plan without --central")
    return parts


def _unpack(raw: bytes, kind: type[T], what: str) -> T:
    try:
        stream = zlib.decompressobj()
        content = stream.decompress(raw, MOST_UNPACKED_BYTES)
        if stream.unconsumed_tail:
            raise UsageError(f"the {what} unpacks to more than {MOST_UNPACKED_BYTES} bytes")
        return msgspec.msgpack.decode(content, type=kind)
    except (zlib.error, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"the {what} is not one of this version: {error}") from None
