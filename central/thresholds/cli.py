"""`fabricpilot thresholds`: demotion thresholds for a flow-size distribution, by any of the methods, or compared.

Reads a distribution, asks the method (`methods.py`) and prints a table or JSON, and draws a plot if asked to. All that
is heavy is imported when the command runs.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fabricpilot.levels import DEFAULT_LEVELS
from fabricpilot.options import json_option, print_json

if TYPE_CHECKING:
    from central.thresholds.optimum import Optimum
    from simulator.workloads.distribution import SizeDistribution

_EXAMPLES = """\b
Examples:
  fabricpilot thresholds --cdf websearch_dctcp_bytes_trafficgenerator --load 0.8 --queues 8
  fabricpilot thresholds --cdf websearch_dctcp_bytes_trafficgenerator --ranking backlog --send-buffer 2MB
  fabricpilot thresholds --cdf sizes.txt --load 0.6 --method all --objective slowdown --plot slowdown.png
"""


@click.command(epilog=_EXAMPLES)
@click.option("--cdf", required=True, metavar="NAME|FILE", help="Bundled flow-size distribution, or a CDF file.")
@click.option("--load", default=0.8, show_default=True, help="Share of the link the flows need, below 1.")
@click.option("--queues", default=DEFAULT_LEVELS, show_default=True, help="Priority levels, 2 to 8.")
@click.option(
    "--method",
    type=click.Choice(["exact", "mm1", "search", "equal-split", "published", "all"]),
    default="exact",
    show_default=True,
    help="exact: least mean of multilevel processor sharing. mm1: PIAS's and AuTO's formulation. search: CMA-ES in "
    "the simulator, minutes. equal-split: quantiles. published: PIAS's own. all: all but search, beside each other.",
)
@click.option(
    "--objective",
    type=click.Choice(["fct", "slowdown", "tail"]),
    default="fct",
    show_default=True,
    help="Mean completion time, mean slowdown, or root mean square of the sizes' slowdowns.",
)
@click.option(
    "--ranking",
    type=click.Choice(["attained", "backlog", "size"]),
    default="attained",
    show_default=True,
    help="What levels go by. attained: bytes sent. backlog: those and the send buffer. size: known sizes.",
)
@click.option(
    "--send-buffer", default="4MB", show_default=True, metavar="BYTES", help="backlog: what it shows at most."
)
@click.option("--turns", is_flag=True, help="exact: long flows take turns (long_flows.scheme = in-turn).")
@click.option(
    "--base-bytes",
    default=0.0,
    show_default=True,
    help="What the link could send in a base round trip: part of every completion time (not for search).",
)
@click.option(
    "--link-rate",
    metavar="RATE",
    help='search: with headers, round trips and queues at this rate, "1Gbit".  [default: the fluid alone]',
)
@click.option("--flows", default=100_000, show_default=True, help="search: flows in each simulation.")
@click.option("--evaluations", default=300, show_default=True, help="search: simulations at most.")
@click.option("--seed", default=1, show_default=True, help="search: same seed, same thresholds.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw mean slowdown by size (PNG, SVG).")
@json_option
def thresholds(
    cdf: str,
    load: float,
    queues: int,
    method: str,
    objective: str,
    ranking: str,
    send_buffer: str,
    turns: bool,
    base_bytes: float,
    link_rate: str | None,
    flows: int,
    evaluations: int,
    seed: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Choose the byte thresholds between priority levels."""
    from central.thresholds.methods import Question, answer, side_by_side
    from central.thresholds.optimum import visible_bytes
    from fabricpilot.config import parse_rate
    from simulator.cli import parse_size
    from simulator.workloads.distribution import SizeDistribution

    sizes = SizeDistribution.load(cdf)
    rate_bps = None if link_rate is None else float(parse_rate(link_rate))
    visible = visible_bytes(ranking, parse_size(send_buffer))
    ask = Question(sizes, load, queues, objective, base_bytes, flows, evaluations, seed, rate_bps, visible, turns)
    optima = side_by_side(ask) if method == "all" else [answer(method, ask)]
    if plot is not None:
        from central.thresholds.plot import draw

        draw(plot, sizes, optima)
    if as_json:
        records = [_record(sizes, ranking, optimum) for optimum in optima]
        print_json(records if method == "all" else records[0])
        return
    _print_table(sizes, optima)
    if plot is not None:
        click.echo(f"drawn in {plot}")


def _record(sizes: "SizeDistribution", ranking: str, optimum: "Optimum") -> dict[str, object]:
    return {
        "cdf": sizes.name,
        "load": optimum.load,
        "queues": optimum.thresholds.levels,
        "method": optimum.method,
        "objective": optimum.objective,
        "ranking": ranking,
        "thresholds": list(optimum.thresholds.bytes),
        "mean": optimum.mean,
        "fair_sharing": optimum.processor_sharing,
        "gain": optimum.gain,
        "seconds": round(optimum.seconds, 4),
        "note": optimum.note,
    }


def _print_table(sizes: "SizeDistribution", optima: list["Optimum"]) -> None:
    from rich.console import Console
    from rich.table import Table

    first = optima[0]
    unit = sizes.mean_bytes if first.objective == "fct" else 1.0
    what = {
        "fct": "mean completion time (1: a flow of mean size, alone)",
        "slowdown": "mean slowdown",
        "tail": "root mean square of the sizes' slowdowns",
    }[first.objective]
    table = Table(title=f"{sizes.name}, load {first.load:g}: {what}", title_justify="left")
    table.add_column("method")
    table.add_column("thresholds, bytes")
    for column in ("value", "fair sharing", "better by", "took"):
        table.add_column(column, justify="right")
    for optimum in optima:
        table.add_row(
            optimum.method,
            " ".join(f"{threshold:,}" for threshold in optimum.thresholds.bytes),
            f"{optimum.mean / unit:.3f}",
            f"{optimum.processor_sharing / unit:.3f}",
            f"{optimum.gain:.1%}",
            f"{optimum.seconds:.2f} s",
        )
    console = Console()
    console.print(table)
    for optimum in optima:
        if optimum.note:
            console.print(f"{optimum.method}: {optimum.note}", highlight=False)
