"""`fabricpilot scenario ...`: the same traffic under every scheme."""

import os
from pathlib import Path

import click

from fabricpilot.errors import UsageError
from fabricpilot.levels import DEFAULT_LEVELS, check_levels
from fabricpilot.options import json_option, print_json

_DEFAULT_SEEDS = 5
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
@click.option("--seeds", default=_DEFAULT_SEEDS, show_default=True, help="Independent repetitions.")
@click.option("--levels", default=DEFAULT_LEVELS, show_default=True, help="K.")
@click.option("--full", is_flag=True, help="Hours four times as long, for the record.")
@click.option("--workers", type=int, help="Processes.  [default: one per core]")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Draw hours and sizes (.png, .svg).")
@json_option
def run(
    name: str,
    names: str,
    seeds: int,
    levels: int,
    full: bool,
    workers: int | None,
    plot_file: Path | None,
    as_json: bool,
) -> None:
    """Run the scenario NAME under every scheme and compare completion times."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from testbed.scenarios import catalogue
    from testbed.scenarios.contenders import contenders
    from testbed.scenarios.outcome import measure
    from testbed.scenarios.report import plot, table

    wanted = catalogue.scenario(name)
    chosen = contenders(names)
    check_levels(levels)
    if seeds < 1 or (workers is not None and workers < 1):
        raise UsageError(f"{seeds} seeds, {workers} workers; both must be at least 1")
    if plot_file is not None and not plot_file.parent.is_dir():
        raise UsageError(f"--plot {plot_file}: there is no folder {plot_file.parent}")
    if full:
        wanted = wanted.longer(_FULL_HOURS)
    with Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:.0f} of {task.total:.0f} runs"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task(name, total=seeds * len(chosen))
        found = measure(
            wanted,
            names,
            range(1, seeds + 1),
            levels,
            workers or os.cpu_count() or 1,
            lambda done: bar.update(task, advance=1, description=f"{name}: {done}"),
        )
    if plot_file is not None:
        plot(found, plot_file)
    if as_json:
        print_json(found)
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a pipe has no width; do not cut numbers
    console.print(table(found))
