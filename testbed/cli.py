"""`fabricpilot testbed ...`: real traffic in network namespaces."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fabricpilot.config import parse_rate
from fabricpilot.errors import FabricpilotError, UsageError
from fabricpilot.options import json_option, print_json
from testbed.transport.cli import transport

if TYPE_CHECKING:
    from testbed.experiment import Outcome
    from testbed.plan import RunPlan

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


@click.group()
def testbed() -> None:
    """Run real traffic through a star of network namespaces, and time every flow (root)."""


testbed.add_command(transport)


def plan_options(command: CommandT) -> CommandT:
    """The options that say what a run is to be."""
    for option in (
        click.option(
            "--buffer", "buffer_bytes", default=256_000, show_default=True, help="Bytes the bottleneck queues."
        ),
        click.option("--scale", default=0.1, show_default=True, help="Factor on every flow size of the workload."),
        click.option("--rate", default="200Mbit", show_default=True, help="Rate of the bottleneck."),
        click.option("--senders", default=4, show_default=True, help="Number of sending hosts."),
        click.option("--seed", default=1, show_default=True, help="Of the trace: same seed, same flows."),
        click.option(
            "--duration", "duration_s", default=75.0, show_default=True, help="Seconds in which flows arrive."
        ),
        click.option("--load", default=0.8, show_default=True, help="Payload over the bottleneck's rate, below 1."),
        click.option(
            "--workload",
            default="websearch",
            show_default=True,
            help="Flow sizes: websearch, datamining, hadoop, cache, a bundled table or a CDF file.",
        ),
        click.option(
            "--decision-interval",
            "decision_s",
            default=5.0,
            show_default=True,
            help="Seconds between central's decisions.",
        ),
        click.option(
            "--send-buffer", default="", help="Of every connection from its beginning, 4MB.  [default: as Linux has it]"
        ),
        click.option("--dry-run", is_flag=True, help="Say what would be made and run, and change nothing."),
    ):
        command = option(command)
    return command


@testbed.command()
@plan_options
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/demo"), show_default=True, help="Results.")
@json_option
def demo(out: Path, as_json: bool, dry_run: bool, **options: Any) -> None:
    """Show the main job: one trace under FIFO and under fabricpilot, and what it changes."""
    from testbed.schemes import DEMO

    _experiment(DEMO, out, as_json, dry_run, options)


@testbed.command()
@click.argument("schemes", nargs=-1, required=True, metavar="SCHEME...")
@plan_options
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/run"), show_default=True, help="Results.")
@json_option
def run(schemes: tuple[str, ...], out: Path, as_json: bool, dry_run: bool, **options: Any) -> None:
    """Run one trace under the schemes named; `testbed schemes` lists them."""
    from testbed.schemes import check_names

    check_names(schemes)
    _experiment(tuple(dict.fromkeys(schemes)), out, as_json, dry_run, options)


@testbed.command()
@json_option
def schemes(as_json: bool) -> None:
    """List the schemes, and how they differ here from what the simulator does under the same name."""
    from central.policy.schemes import SCHEMES

    if as_json:
        print_json(
            {
                name: {"text": scheme.text, "on_network": scheme.on_network, "refusal": scheme.refusal}
                for name, scheme in SCHEMES.items()
            }
        )
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, scheme in SCHEMES.items():
        table.add_row(name, scheme.described)
    Console().print(table, highlight=False)


@testbed.command()
@click.option("--force", is_flag=True, help="Also end and remove runs that are still in progress.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed and change nothing.")
@json_option
def clean(force: bool, dry_run: bool, as_json: bool) -> None:
    """Remove what testbed runs left on this machine, and nothing else."""
    from dataclasses import asdict

    from testbed.netns.registry import clean as clean_all

    removals = clean_all(force=force, dry_run=dry_run)
    if as_json:
        print_json({"removed": not dry_run, "runs": [asdict(removal) for removal in removals]})
        return
    verb = "would remove" if dry_run else "removed"
    for removal in removals:
        if removal.in_use_by:
            click.echo(f"run {removal.run} is in progress (pid {removal.in_use_by}); left alone, --force ends it")
        else:
            counts = (
                (len(removal.namespaces), "namespaces"),
                (len(removal.processes), "processes"),
                (len(removal.mounts), "mounts"),
                (len(removal.cgroups), "cgroups"),
            )
            click.echo(f"run {removal.run}: {verb} {', '.join(f'{n} {what}' for n, what in counts)}")
    if not removals:
        click.echo("nothing of ours is here")


def _experiment(schemes: Sequence[str], out: Path, as_json: bool, dry_run: bool, options: dict[str, Any]) -> None:
    from simulator.cli import parse_size
    from testbed.flows.recorded import make_trace
    from testbed.netns.registry import need_root
    from testbed.plan import RunPlan

    send_buffer = options.pop("send_buffer")
    plan = RunPlan(
        rate_bps=parse_rate(options.pop("rate")),
        send_buffer_bytes=parse_size(send_buffer) if send_buffer else 0,
        **options,
    )
    trace = make_trace(plan.recipe)  # before anything is made, so that a wrong workload is told at once
    if dry_run:
        _show_plan(plan, len(trace), trace.offered_load, schemes, out)
        return
    need_root()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to --out {out}: {error.strerror}") from error
    from testbed.experiment import run_experiment
    from testbed.report.progress import ProgressSteps

    with ProgressSteps() as steps:
        outcome = run_experiment(plan, schemes, out, steps)
        steps.begin("write the report", 1)
        report = _write(outcome, out)
        steps.advance(1)
    if as_json:
        print_json(report)
    else:
        _show(report, outcome, out)
    if report["lost_flows"]:
        raise FabricpilotError(f"{report['lost_flows']} flows did not complete; see {out}/*/flows.csv")


def _write(outcome: "Outcome", out: Path) -> dict[str, Any]:
    import json

    from testbed.report.document import document
    from testbed.report.figures import draw
    from testbed.report.page import write_page

    report = document(outcome)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    results = {name: scheme.results for name, scheme in outcome.schemes.items()}
    draw(results, outcome.plan.scale, report["thresholds"], out / "fct.png")
    write_page(report, out / "fct.png", out / "index.html")
    return report


def _show(report: dict[str, Any], outcome: "Outcome", out: Path) -> None:
    from rich.console import Console

    from testbed.report.fct import summarise
    from testbed.report.sentences import sentences
    from testbed.report.table import fct_table

    console = Console()
    scale = outcome.plan.scale
    console.print(fct_table({n: summarise(s.results, outcome.calibration, scale) for n, s in outcome.schemes.items()}))
    for sentence in sentences(report):
        console.print(f"- {sentence}", highlight=False)
    console.print(f"- Written: {out}/report.json, {out}/fct.png, {out}/index.html", highlight=False)


def _show_plan(plan: "RunPlan", flows: int, offered_load: float, schemes: Sequence[str], out: Path) -> None:
    from central.policy.schemes import find
    from testbed.netns.registry import Run
    from testbed.netns.star import StarPlan
    from testbed.netns.switch_port import shape_command
    from testbed.schemes import dscp_of

    star = StarPlan(Run("RUN"), plan.senders)
    for namespace in star.namespaces:
        click.echo(f"ip netns add {namespace}")
    for namespace, lines in star.commands():
        for line in lines:
            click.echo(f"ip -netns {namespace} {line}")
    for scheme in schemes:
        command = " ".join(shape_command(plan.rate_bps, plan.buffer_bytes, dscp_of(scheme)))
        click.echo(f"# {scheme}: {find(scheme).described}\n# {scheme}: in {star.switch}: {command}")
    click.echo(
        f"# {flows:,} flows of {plan.recipe.workload} x {plan.scale:g} at load {offered_load:.3f} "
        f"in {plan.duration_s:g} s under each of: {', '.join(schemes)}; results in {out}"
    )
