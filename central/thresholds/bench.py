"""`fabricpilot bench thresholds`: each method's thresholds in the simulator, on the same flows.

The flows are none of those the search has seen. Every method is compared with the exact one by the simulated mean
completion time; the exact model's own prediction and its time stand beside.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click

from fabricpilot.errors import UsageError
from fabricpilot.levels import MAX_LEVELS, Thresholds
from fabricpilot.options import json_option, print_json

if TYPE_CHECKING:
    from central.thresholds.simulated import Link
    from simulator.workloads.distribution import SizeDistribution

_QUICK = ("websearch_dctcp_bytes_trafficgenerator", "datamining_vl2_pkts1460_pias_ns2", "facebook_hadoop_bytes_hpcc")
_UNSEEN = 1_000_003  # added to the seed, far from what the search used


@dataclass(frozen=True)
class Row:
    """One distribution and load. Simulated means are in mean flow sizes; shares are above the exact method's mean."""

    cdf: str
    load: float
    seconds: float
    predicted: float
    simulated: float
    above_exact: dict[str, float]


@click.command()
@click.option("--full", is_flag=True, help="All bundled distributions at loads 0.5 to 0.9 instead of three at two.")
@click.option("--queues", default=MAX_LEVELS, show_default=True, help="Priority levels.")
@click.option("--flows", default=200_000, show_default=True, help="Flows in each simulation.")
@click.option("--evaluations", default=300, show_default=True, help="Simulations the search may use; 0 leaves it out.")
@click.option("--seed", default=1, show_default=True, help="Same seed, same flows.")
@click.option("--link-rate", metavar="RATE", help="Count headers, round trips, queues at it.  [default: fluid alone]")
@json_option
def thresholds(
    full: bool, queues: int, flows: int, evaluations: int, seed: int, link_rate: str | None, as_json: bool
) -> None:
    """Compare the exact thresholds with fair sharing, equal split, published ones and the search."""
    from central.thresholds.simulated import FLUID, Link
    from fabricpilot.config import parse_rate
    from simulator.workloads.distribution import SizeDistribution, names

    link = FLUID if link_rate is None else Link.real(parse_rate(link_rate))
    rows = []
    for name in names() if full else _QUICK:
        for load in (0.5, 0.6, 0.7, 0.8, 0.9) if full else (0.5, 0.8):
            rows.append(_row(SizeDistribution.load(name), load, queues, flows, evaluations, seed, link))
            click.echo(_line(rows[-1]), err=as_json)
    methods = sorted({method for row in rows for method in row.above_exact})
    least = {method: min(row.above_exact[method] for row in rows if method in row.above_exact) for method in methods}
    summary = {
        "queues": queues,
        "flows": flows,
        "least_above_exact": least,
        "slowest_seconds": max(row.seconds for row in rows),
    }
    if as_json:
        print_json(summary | {"rows": [asdict(row) for row in rows]})
    else:
        click.echo("least above exact: " + ", ".join(f"{method} {share:+.2%}" for method, share in least.items()))
        click.echo(f"exact took at most {summary['slowest_seconds']:.2f} s")


def _row(
    sizes: "SizeDistribution", load: float, levels: int, flows: int, evaluations: int, seed: int, link: "Link"
) -> Row:
    from central.thresholds import exact
    from central.thresholds.simulated import measured, optimise, trace_at
    from fabricpilot.published import published
    from simulator.schemes import equal_split

    trace = trace_at(sizes, load, flows, seed + _UNSEEN, link)
    best = exact.optimise(sizes, load, levels)
    rivals: dict[str, Thresholds | None] = {"fair": None, "equal-split": equal_split(sizes, levels)}
    for workload in ("websearch", "datamining"):
        try:
            rivals[f"published-{workload}"] = published(workload, levels, load).thresholds
        except UsageError:  # nothing was published for this K
            continue
    if evaluations:
        rivals["search"] = optimise(sizes, load, levels, "fct", flows, evaluations, seed, link).thresholds
    mean = measured(trace, best.thresholds, "fct", link)
    above = {
        name: measured(trace, chosen, "fct", link) / mean - 1 if chosen != best.thresholds else 0.0
        for name, chosen in rivals.items()
    }
    unit = sizes.mean_bytes
    return Row(sizes.name, load, round(best.seconds, 3), best.mean / unit, mean / unit, above)


def _line(row: Row) -> str:
    others = ", ".join(f"{method} {share:+.2%}" for method, share in row.above_exact.items())
    return f"{row.cdf} {row.load}: predicted {row.predicted:.3f}, simulated {row.simulated:.3f}; {others}"
