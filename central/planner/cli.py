"""`fabricpilot plan`: make a plan for a mapping, check one, make mappings, convert.

Exit 0 with a plan, 1 if there is none (or a checked plan is bad), 2 for wrong input. Heavy imports are in the commands.
"""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fabricpilot.errors import FabricpilotError, UsageError

if TYPE_CHECKING:
    from central.planner.model.mapping import Mapping
    from central.planner.model.plan import Plan
    from central.planner.model.problem import Problem

SHOWN_MOVES = 12
FILE = click.Path(dir_okay=False, path_type=Path)
MAPPING = click.Path(path_type=Path)


@click.group(invoke_without_command=True)
@click.option("--mapping", type=MAPPING, help="VMR2L JSON (.json, .json.gz), a table (.csv), or a folder of virsh XML.")
@click.option("--mnl", type=int, help="Most moves. Default: the mapping's maximum_migration, else 50.")
@click.option("--deadline", type=float, default=5.0, show_default=True, help="Seconds to plan in.")
@click.option(
    "--solver", default="auto", show_default=True, help="auto, exact, learned, greedy, swap, ... (see below)."
)
@click.option(
    "--objective", default="fr", show_default=True, help="fr, fr-goal:RATE, mixed[:W], multi[:W], 16c*0.7+..."
)
@click.option("--make-room", help="Fewest moves that let this request in, for example 64c/128G/2numa.")
@click.option("--max-bytes", type=int, help="Most bytes of VM memory copied in all.")
@click.option("--cost-per-gb", type=float, default=0.0, help="Slots that copying one GB is held to cost.")
@click.option("--cap-per-pm", type=int, help="Most moves into or out of one PM.")
@click.option("--cap-per-tenant", type=int, help="Most moves of one tenant's VMs.")
@click.option("--history", type=FILE, help='When VMs last moved: JSON {"vm name": unix seconds}.')
@click.option("--cooldown", type=float, default=86400.0, show_default=True, help="Seconds a VM in --history stays put.")
@click.option("--replan-from", type=FILE, help="An earlier plan: keep what still holds, repair the rest.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=FILE, help="Write plan.json here.")
@click.option("--script", type=FILE, help="Write the moves as a shell script of virsh migrate commands.")
@click.option("--neutral", type=FILE, help="Write the moves as JSON for any orchestrator.")
@click.option("--plot", type=FILE, help="Animate the moves (GIF).")
@click.option("--samples", default=8, show_default=True, help="Trajectories of the learned solver.")
@click.option("--vm-quantile", default=0.98, show_default=True, help="Share of improbable VMs that it cuts.")
@click.option("--place-quantile", default=0.95, show_default=True, help="Share of improbable places that it cuts.")
@click.option("--json", "as_json", is_flag=True, help="Print plan.json instead of a table.")
@click.pass_context
def plan(context: click.Context, /, **options: Any) -> None:
    """Plan VM migrations so that large requests fit again.

    The plan is checked by code that did not make it. FR is the fragment rate: the share of free cores that no 16-core
    slot can use.
    """
    if context.invoked_subcommand is None:
        if options["mapping"] is None:
            raise UsageError("--mapping is missing: give a mapping file, or make one with `fabricpilot plan generate`")
        _plan(options)


def _plan(options: dict[str, Any]) -> None:
    from central.planner import planning
    from central.planner.model.objective import parse_request
    from central.planner.model.plan import plan_document
    from central.planner.replan import read_wishes, replan
    from central.planner.solvers.room import make_room

    mapping = read_mapping(options["mapping"])
    problem = _problem(mapping, options)
    seconds, seed, name = options["deadline"], options["seed"], options["solver"]
    if seconds <= 0:
        raise UsageError(f"--deadline {seconds:g}: expected more than 0 seconds")
    if options["make_room"] and options["replan_from"]:
        raise UsageError("--make-room and --replan-from exclude each other: give one of them")
    if options["make_room"]:
        request = parse_request(options["make_room"])
        made = planning.plan_by(problem, "make-room", lambda p, d, s: make_room(p, request, d, s), seconds, seed)
    elif options["replan_from"]:
        wishes, gone = read_wishes(_bytes(options["replan_from"]), mapping, str(options["replan_from"]))
        made = planning.plan_by(problem, "replan", lambda p, d, s: replan(p, wishes, gone, d, s), seconds, seed)
    elif name == "learned":
        from central.planner.learned.solver import Options, learned

        risk = Options(options["samples"], options["vm_quantile"], options["place_quantile"])
        made = planning.plan_by(problem, name, lambda p, d, s: learned(p, d, s, risk), seconds, seed)
    else:
        made = planning.make_plan(problem, name, seconds, seed)
    document = plan_document(mapping, made)
    if options["out"]:
        _write(options["out"], json.dumps(document, indent=1) + "\n")
    _export(mapping, made, options)
    if options["as_json"]:
        click.echo(json.dumps(document))
    else:
        show(mapping, made)
    goal = problem.objective.goal
    if goal is not None and made.final.fragment_rate > goal + 1e-9:
        raise FabricpilotError(f"the goal {goal:g} was not reached in {seconds:g} s; raise --deadline or --mnl")


def _export(mapping: "Mapping", made: "Plan", options: dict[str, Any]) -> None:
    from central.planner.formats import export

    if options["script"]:
        _write(options["script"], export.shell_script(mapping, made))
    if options["neutral"]:
        _write(options["neutral"], json.dumps(export.neutral(mapping, made), indent=1) + "\n")
    if options["plot"]:
        from central.planner.plots import animate

        animate(mapping, made, options["plot"])


def _problem(mapping: "Mapping", options: dict[str, Any]) -> "Problem":
    from dataclasses import replace

    from central.planner.model.objective import parse_objective
    from central.planner.model.problem import Limits, Problem

    mnl = options["mnl"]
    if mnl is None:
        mnl = 50 if mapping.maximum_migration is None else mapping.maximum_migration
    limits = Limits(
        mnl=mnl,
        max_bytes=options["max_bytes"],
        per_pm=options["cap_per_pm"],
        per_tenant=options["cap_per_tenant"],
        fixed=_cooling(mapping, options["history"], options["cooldown"]),
    )
    objective = replace(parse_objective(options["objective"]), cost_per_gb=options["cost_per_gb"])
    return Problem(mapping, objective, limits)


def _cooling(mapping: "Mapping", history: Path | None, cooldown_s: float) -> frozenset[int]:
    if history is None:
        return frozenset()
    try:
        moved = json.loads(_bytes(history))
        since = time.time() - cooldown_s
        return frozenset(
            mapping.vm_by_name[name] for name, when in moved.items() if when > since and name in mapping.vm_by_name
        )
    except (ValueError, AttributeError, TypeError):
        raise UsageError(f'history {history}: expected JSON {{"vm name": unix seconds}}') from None


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None


def read_mapping(path: Path) -> "Mapping":
    """A mapping from any format we read, by what the path looks like."""
    from central.planner.formats import libvirt, table, vmr2l

    if path.is_dir():
        return libvirt.read_folder(path)
    return table.read_file(path) if path.suffix == ".csv" else vmr2l.read_file(path)


def show(mapping: "Mapping", made: "Plan") -> None:
    """The plan for a person."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    parallel = len({move.batch for move in made.moves})
    bound = "" if made.bound is None else f", no plan can be below {made.bound:.4f}"
    console.print(
        f"FR {made.initial.fragment_rate:.4f} -> {made.final.fragment_rate:.4f}{bound}; "
        f"slots {made.initial.slots} -> {made.final.slots}; {len(made.moves)} moves (MNL {made.mnl}) in {parallel} "
        f"batches; {made.solver}, {made.seconds:.2f} s"
    )
    for note in made.notes:
        console.print(f"  {note}")
    if not made.moves:
        return
    table = Table(box=None, pad_edge=False)
    for column in ("#", "batch", "VM", "cores", "GB", "from", "to", "FR after"):
        table.add_column(column, justify="right" if column in ("#", "batch", "cores", "GB", "FR after") else "left")
    for number, move in enumerate(made.moves[:SHOWN_MOVES], start=1):
        vm = mapping.vms[move.vm]
        ends = [f"{mapping.pms[end.pm].name}:{','.join(map(str, end.nodes))}" for end in (move.source, move.target)]
        worth = made.prefixes[number - 1].fragment_rate
        table.add_row(
            str(number), str(move.batch), str(vm.name), str(vm.cores), f"{vm.mem_mb / 1024:.0f}", *ends, f"{worth:.4f}"
        )
    console.print(table)
    if len(made.moves) > SHOWN_MOVES:
        console.print(f"... {len(made.moves) - SHOWN_MOVES} more; --out plan.json or --json has them all")


@plan.command()
@click.option("--mapping", type=MAPPING, required=True)
@click.option("--plan", "plan_file", type=FILE, required=True)
@click.option("--mnl", type=int, help="Default: the plan's own.")
@click.option("--objective", default="fr", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def check(mapping: Path, plan_file: Path, mnl: int | None, objective: str, as_json: bool) -> None:
    """Replay a plan move by move; exit 1 with the first violation."""
    from central.planner import checker
    from central.planner.model.objective import parse_objective
    from central.planner.model.plan import read_moves, worth_document
    from central.planner.model.problem import Limits

    cluster = read_mapping(mapping)
    moves, own = read_moves(_bytes(plan_file), cluster, str(plan_file))
    limit = mnl if mnl is not None else (own if own is not None else len(moves))
    report = checker.check(cluster, moves, parse_objective(objective), Limits(limit))
    if as_json:
        worths = {"initial": worth_document(report.worths[0]), "final": worth_document(report.worths[-1])}
        click.echo(json.dumps({"moves": len(moves), "violation": report.violation, **worths}))
    if report.violation:
        raise FabricpilotError(f"plan {plan_file}: {report.violation}")
    if not as_json:
        first, last = report.worths[0], report.worths[-1]
        click.echo(
            f"good: {len(moves)} moves, FR {first.fragment_rate:.4f} -> {last.fragment_rate:.4f}, "
            f"slots {first.slots} -> {last.slots}"
        )


@plan.command()
@click.option("--shape", default="medium", show_default=True, help="tiny, small, medium, large, multi, affinity.")
@click.option("--level", help="Workload level of the shape: low, middle, high.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=FILE, required=True, help="Mapping file to write, .json or .json.gz.")
def generate(shape: str, level: str | None, seed: int, out: Path) -> None:
    """Write a seeded mapping of a published shape."""
    from central.planner import generator
    from central.planner.formats import vmr2l

    made = generator.generate(generator.shape(shape, level), seed)
    vmr2l.write_file(made, out)
    click.echo(f"{out}: {len(made.pms)} PMs, {len(made.vms)} VMs, {len(made.anti_affinity)} anti-affinity sets")


@plan.command()
@click.option("--out", type=FILE, required=True, help="Weights to write, .npz; a checkpoint every few minutes.")
@click.option("--updates", default=1200, show_default=True, help="Of the distillation from the exact solver.")
@click.option("--iterations", default=0, show_default=True, help="Of PPO after that.")
@click.option("--rate", default=1e-3, show_default=True, help="Learning rate of the distillation at its start.")
@click.option("--start", type=FILE, help="Weights to go on from.")
@click.option("--threads", default=1, show_default=True, help="1: the same weights for the same seed.")
@click.option("--seed", default=0, show_default=True)
def train(out: Path, updates: int, iterations: int, rate: float, start: Path | None, threads: int, seed: int) -> None:
    """Train the policy: distillation from the exact solver, then PPO."""
    import torch

    from central.planner.learned import distill, ppo, weights
    from central.planner.planning import warm_up

    torch.set_num_threads(threads)
    warm_up()
    policy, before = weights.load(start) if start else (None, {})
    if updates:
        settings = distill.Settings(updates=updates, learning_rate=rate, seed=seed)
        policy = distill.distill(settings, out, policy, click.echo, before)
        before = {"algorithm": "distill", "updates": updates, "rate": rate, "seed": seed, "before": before}
    if iterations:
        ppo.train(ppo.Settings(iterations=iterations, seed=seed), out, policy, click.echo, before=before)
