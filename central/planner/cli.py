"""`fabricpilot plan`: make a plan for a mapping, check one, make mappings, convert.

Exit 0 with a plan, 1 if there is none (or a checked plan is bad), 2 for wrong input. Heavy imports are in the commands.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fabricpilot.errors import FabricpilotError, UsageError

if TYPE_CHECKING:
    from central.planner.model.mapping import Mapping
    from central.planner.model.plan import Plan
    from central.planner.request import PlanOutcome, PlanRequest
    from fabricpilot.config import LinkSection

SHOWN_MOVES = 12
FILE = click.Path(dir_okay=False, path_type=Path)
MAPPING = click.Path(path_type=Path)
CENTRAL_KEY = "/etc/fabricpilot/central.key"
CLIENT_KEY = "/etc/fabricpilot/planner.key_secret"

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


def central_options(command: CommandT) -> CommandT:
    """The options that say how to reach a central daemon."""
    for option in (
        click.option("--insecure", is_flag=True, help="No keys at all; on loopback only."),
        click.option("--central-key", type=FILE, default=CENTRAL_KEY, show_default=True, help="Central's public key."),
        click.option("--key", type=FILE, default=CLIENT_KEY, show_default=True, help="Own key, NAME.key_secret."),
    ):
        command = option(command)
    return command


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
@click.option("--central", metavar="ENDPOINT", help="Have this central daemon plan, for example tcp://10.0.0.1:5555.")
@central_options
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
    from central.planner.model.plan import plan_document
    from central.planner.request import PlanRequest, plan_for, plan_of

    mapping = read_mapping(options["mapping"])
    request = PlanRequest(
        mnl=options["mnl"],
        deadline_s=options["deadline"],
        solver=options["solver"],
        objective=options["objective"],
        make_room=options["make_room"] or "",
        earlier_plan=_bytes(options["replan_from"]) if options["replan_from"] else None,
        max_bytes=options["max_bytes"],
        cost_per_gb=options["cost_per_gb"],
        cap_per_pm=options["cap_per_pm"],
        cap_per_tenant=options["cap_per_tenant"],
        fixed=_cooling(options["history"], options["cooldown"]),
        samples=options["samples"],
        vm_quantile=options["vm_quantile"],
        place_quantile=options["place_quantile"],
        seed=options["seed"],
    )
    if options["central"]:
        made = plan_of(mapping, request, _asked(mapping, request, options))
    else:
        made = plan_for(mapping, request)
    document = plan_document(mapping, made)
    if options["out"]:
        _write(options["out"], json.dumps(document, indent=1) + "\n")
    _export(mapping, made, options)
    if options["as_json"]:
        click.echo(json.dumps(document))
    else:
        show(mapping, made)
    _judge_goal(request, made)


def _judge_goal(request: "PlanRequest", made: "Plan") -> None:
    """A plan that misses its goal is shown, and is a failure all the same."""
    from central.planner.model.objective import parse_objective

    goal = parse_objective(request.objective).goal
    if goal is not None and not request.make_room and made.final.fragment_rate > goal + 1e-9:
        raise FabricpilotError(
            f"the goal {goal:g} was not reached in {request.deadline_s:g} s; raise --deadline or --mnl"
        )


def _asked(mapping: "Mapping", request: "PlanRequest", options: dict[str, Any]) -> "PlanOutcome":
    """The answer of the central daemon."""
    import msgspec

    from central.planner.client import ask
    from central.planner.formats import vmr2l

    section, name = link_section(options)
    return ask(section, name, msgspec.structs.replace(request, mapping=msgspec.json.encode(vmr2l.document(mapping))))


def link_section(options: dict[str, Any]) -> tuple["LinkSection", str]:
    """How to reach central, and the name of the key that is used for it: that of its file."""
    from fabricpilot.config import LinkSection
    from fabricpilot.keys import SECRET_SUFFIX

    key: Path = options["key"]
    section = LinkSection(
        endpoint=options["central"],
        key=str(key),
        central_key=str(options["central_key"]),
        insecure=options["insecure"],
    )
    return section, key.name.removesuffix(SECRET_SUFFIX)


def _export(mapping: "Mapping", made: "Plan", options: dict[str, Any]) -> None:
    from central.planner.formats import export

    if options["script"]:
        _write(options["script"], export.shell_script(mapping, made))
    if options["neutral"]:
        _write(options["neutral"], json.dumps(export.neutral(mapping, made), indent=1) + "\n")
    if options["plot"]:
        from central.planner.plots import animate

        animate(mapping, made, options["plot"])


def _cooling(history: Path | None, cooldown_s: float) -> list[str]:
    """Names of the VMs that moved too short a time ago."""
    if history is None:
        return []
    try:
        moved = json.loads(_bytes(history))
        since = time.time() - cooldown_s
        return [name for name, when in moved.items() if when > since]
    except (ValueError, AttributeError, TypeError):
        raise UsageError(f'history {history}: expected JSON {{"vm name": unix seconds}}') from None


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise FabricpilotError(f"cannot write {path}: {error.strerror}") from None


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
@click.option("--mapping", type=MAPPING, required=True)
@click.option("--plan", "plan_file", type=FILE, required=True)
@click.option("--central", metavar="ENDPOINT", required=True, help="The central daemon of the hosts.")
@click.option("--name", default="plan", show_default=True, help="Of the plan; the same name replaces what was told.")
@click.option("--for", "ttl_s", default=3600.0, show_default=True, help="Seconds after which central forgets it.")
@click.option("--done", is_flag=True, help="The plan has ended: its flows are like any other's again.")
@central_options
def announce(mapping: Path, plan_file: Path, name: str, ttl_s: float, done: bool, **options: Any) -> None:
    """Tell central that a plan runs: its migrations then wait for all other long flows."""
    from central.planner.client import announce as tell
    from central.planner.migrations import announcement
    from central.planner.model.plan import read_moves
    from fabricpilot.wire import Migrations

    if not 0 < ttl_s <= 86_400:
        raise UsageError(f"--for {ttl_s:g}: expected more than 0 and at most 86400 seconds")
    cluster = read_mapping(mapping)
    moves, _ = read_moves(_bytes(plan_file), cluster, str(plan_file))
    flows = [] if done else announcement(cluster, moves)
    section, client = link_section(options)
    tell(section, Migrations(host=client, plan=name, flows=flows, ttl_s=ttl_s))
    click.echo(f"plan {name}: " + ("ended" if done else f"{len(flows)} migrations announced for {ttl_s:g} s"))


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
    from central.planner.warm import warm_up

    torch.set_num_threads(threads)
    warm_up()
    policy, before = weights.load(start) if start else (None, {})
    if updates:
        settings = distill.Settings(updates=updates, learning_rate=rate, seed=seed)
        policy = distill.distill(settings, out, policy, click.echo, before)
        before = {"algorithm": "distill", "updates": updates, "rate": rate, "seed": seed, "before": before}
    if iterations:
        ppo.train(ppo.Settings(iterations=iterations, seed=seed), out, policy, click.echo, before=before)
