"""`fabricpilot scenario ...`: the same traffic under every scheme."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fabricpilot.errors import FabricpilotError, UsageError
from fabricpilot.levels import DEFAULT_LEVELS, check_levels
from fabricpilot.options import json_option, print_json

if TYPE_CHECKING:
    from testbed.scenarios.catalogue import Scenario

_DEFAULT_SEEDS = {"simulator": 5, "testbed": 1}
_HOUR_S = 10.0  # on the testbed
_FULL_HOURS = 4.0  # times the default: hours of 60 minutes where they are 15


@click.group()
def scenario() -> None:
    """Compare schemes on AuTO's scenarios and others, with central's policies deciding while traffic runs."""


@scenario.command("list")
@json_option
def list_scenarios(as_json: bool) -> None:
    """Show what scenarios and schemes there are."""
    from testbed.scenarios.catalogue import SCENARIOS
    from testbed.scenarios.contenders import CONTENDERS

    if as_json:
        print_json(
            {
                "scenarios": {name: found.about for name, found in SCENARIOS.items()},
                "schemes": {name: found.about for name, found in CONTENDERS.items()},
            }
        )
        return
    for title, entries in (("scenarios", SCENARIOS), ("schemes", CONTENDERS)):
        click.echo(f"{title}:")
        for name, found in entries.items():
            click.echo(f"  {name:17} {found.about}")


@scenario.command()
@click.argument("name")
@click.option("--scheme", "names", default="", help="Schemes by commas.  [default: all]")
@click.option(
    "--on",
    "place",
    type=click.Choice(["simulator", "testbed"]),
    default="simulator",
    show_default=True,
    help="Simulated links, or real TCP between namespaces with agents and central (root).",
)
@click.option("--seeds", type=int, help="Independent repetitions.  [default: 5; 1 on the testbed]")
@click.option("--levels", default=DEFAULT_LEVELS, show_default=True, help="K.")
@click.option("--full", is_flag=True, help="Hours four times as long, for the record.")
@click.option("--workers", type=int, help="Processes of the simulator.  [default: one per core]")
@click.option("--send-buffer", metavar="BYTES", help="What simulated hosts see of what waits.  [default: 4MB]")
@click.option("--hour", "hour_s", type=float, help=f"Seconds of an hour on the testbed.  [default: {_HOUR_S:g}]")
@click.option("--out", type=click.Path(path_type=Path), help="Flows and logs of the testbed.  [default: out/NAME]")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Draw hours and sizes (.png, .svg).")
@json_option
def run(
    name: str,
    names: str,
    place: str,
    seeds: int | None,
    levels: int,
    full: bool,
    workers: int | None,
    send_buffer: str | None,
    hour_s: float | None,
    out: Path | None,
    plot_file: Path | None,
    as_json: bool,
) -> None:
    """Run the scenario NAME under every scheme and compare completion times."""
    from rich.console import Console

    from simulator.cli import parse_size
    from testbed.scenarios import catalogue
    from testbed.scenarios.report import plot, table

    wanted = catalogue.scenario(name)
    check_levels(levels)
    count = _DEFAULT_SEEDS[place] if seeds is None else seeds
    if count < 1 or (workers is not None and workers < 1):
        raise UsageError(f"{count} seeds, {workers} workers; both must be at least 1")
    other = (
        {"--hour": hour_s, "--out": out}
        if place == "simulator"
        else {"--workers": workers, "--send-buffer": send_buffer}
    )
    for option, value in other.items():
        if value is not None:
            raise UsageError(f"{option} is of no meaning with --on {place}")
    if plot_file is not None and not plot_file.parent.is_dir():
        raise UsageError(f"--plot {plot_file}: there is no folder {plot_file.parent}")
    if send_buffer is not None:
        wanted = replace(wanted, send_buffer_bytes=float(parse_size(send_buffer)))
    longer = _FULL_HOURS if full else 1.0
    if place == "testbed":
        at_s = (_HOUR_S if hour_s is None else hour_s) * longer
        found = _on_hosts(wanted, names, range(1, count + 1), levels, at_s, out or Path("out") / name)
    else:
        found = _simulated(wanted.longer(longer), names, range(1, count + 1), levels, workers or os.cpu_count() or 1)
    if plot_file is not None:
        plot(found, plot_file)
    if as_json:
        print_json(found)
    else:
        console = Console()
        if not console.is_terminal:
            console = Console(width=160)  # a pipe has no width; do not cut numbers
        console.print(table(found))
    lost = sum(scheme.get("lost", 0) for scheme in found["schemes"].values())
    if lost:
        raise FabricpilotError(f"{lost} flows did not complete; see {out or Path('out') / name}/*/flows.csv")


def _simulated(wanted: "Scenario", names: str, seeds: Sequence[int], levels: int, workers: int) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from testbed.scenarios.contenders import contenders
    from testbed.scenarios.outcome import measure

    total = len(seeds) * len(contenders(names))
    with Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:.0f} of {task.total:.0f} runs"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task(wanted.name, total=total)

        def advance(done: str) -> None:
            bar.update(task, advance=1, description=f"{wanted.name}: {done}")

        return measure(wanted, names, seeds, levels, workers, advance)


def _on_hosts(
    wanted: "Scenario", names: str, seeds: Sequence[int], levels: int, hour_s: float, out: Path
) -> dict[str, Any]:
    """As `_simulated`, with real hosts. Schemes that no network can run are left out, unless they alone are wanted."""
    from testbed.netns.registry import need_root
    from testbed.report.progress import ProgressSteps
    from testbed.scenarios.real import fit_for_hosts, measure_on_hosts
    from testbed.scenarios.small import small

    here = small(wanted, hour_s)
    chosen, refused = fit_for_hosts(names)
    told = "; ".join(f"'{name}' cannot run on a network: {why}" for name, why in refused.items())
    if not chosen:
        raise UsageError(told)
    need_root()
    if told:
        click.echo(f"left out: {told}", err=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to --out {out}: {error.strerror}") from error
    with ProgressSteps() as steps:
        return measure_on_hosts(here, chosen, seeds, levels, out, steps) | {"left_out": refused}
