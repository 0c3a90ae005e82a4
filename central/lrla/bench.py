"""`fabricpilot bench lrla`: completion times of long flows by scheme, over two and four routes, in the laboratory.

Every scheme meets the same traffic, seed by seed, so that what is compared are pairs. "below" is the share by which a
scheme's mean is below that of ECMP with one fixed priority, with a 95 % interval over the seeds (Student's t).
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from fabricpilot.options import json_option, print_json

if TYPE_CHECKING:
    from central.lrla.laboratory import Lab, Outcome

BASELINE = "ecmp"
NAMES = (BASELINE, "least-loaded", "shortest-first", "learned", "auto")


@click.command()
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(2, 100), help="Runs of each scheme.")
@click.option("--routes", default="2,4", show_default=True, help="Numbers of spines, comma-separated.")
@click.option("--load", default=0.5, show_default=True, help="Of every host's link.")
@click.option("--oversubscription", default=2.0, show_default=True, help="Of the racks' uplinks.")
@click.option("--cdf", default="websearch_dctcp_bytes_trafficgenerator", show_default=True, help="Flow sizes.")
@click.option("--traffic-s", default=8.0, show_default=True, help="Seconds of traffic per run.")
@json_option
def lrla(
    seeds: int, routes: str, load: float, oversubscription: float, cdf: str, traffic_s: float, as_json: bool
) -> None:
    """Long flows under ECMP, the least loaded route, shortest first, the learned policy and AuTO's."""
    from central.lrla.laboratory import Lab

    lab = Lab(cdf=cdf, load=load, oversubscription=oversubscription, traffic_s=traffic_s, renew_s=0.25)
    result: dict[str, Any] = {
        "cdf": cdf,
        "load": load,
        "oversubscription": oversubscription,
        "seeds": seeds,
        "routes": {spines: compare(replace(lab, spines=int(spines)), seeds) for spines in routes.split(",")},
    }
    if as_json:
        print_json(result)
        return
    _show(result["routes"])


def compare(lab: "Lab", seeds: int) -> dict[str, Any]:
    """All schemes on one fabric: mean completion times in microseconds, and how far below the baseline they are."""
    from central.lrla.auto import auto
    from central.lrla.laboratory import run
    from central.lrla.learned import LearnedScheme
    from central.lrla.rules import RULES

    schemes = {**RULES, "learned": LearnedScheme.load()}

    def one(name: str, seed: int) -> "Outcome":
        return run(lab, auto(seed=seed) if name == "auto" else schemes[name], seed)  # that one remembers

    runs = {name: [one(name, seed) for seed in range(1, seeds + 1)] for name in NAMES}
    return {name: _summary(outcomes, runs[BASELINE]) for name, outcomes in runs.items()}


def _summary(outcomes: "list[Outcome]", base: "list[Outcome]") -> dict[str, Any]:
    import numpy as np

    told: dict[str, Any] = {"long_flows": sum(outcome.long_flows for outcome in outcomes)}
    for kind in ("long", "short", "all"):
        mine, theirs = (np.array([getattr(o, f"{kind}_fct_us") for o in group]) for group in (outcomes, base))
        told[f"{kind}_fct_us"] = round(float(mine.mean()), 1)
        told[f"{kind}_below"] = round(1 - float(mine.mean() / theirs.mean()), 4)
        if kind == "long":
            told["long_below_interval"] = _interval(1 - mine / theirs)
    told["spread"] = round(float(np.mean([outcome.spread for outcome in outcomes])), 3)
    return told


def _interval(values: Any) -> list[float]:
    """Mean less and plus the half width of its 95 % interval."""
    from scipy import stats

    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    return [round(float(values.mean()) - half, 4), round(float(values.mean()) + half, 4)]


def _show(routes: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    for spines, schemes in routes.items():
        table = Table(title=f"{spines} routes")
        for column in ("scheme", "long, ms", "below ECMP", "95 %", "up to the threshold", "all flows", "max-min"):
            table.add_column(column)
        for name, told in schemes.items():
            low, high = told["long_below_interval"]
            table.add_row(
                name,
                f"{told['long_fct_us'] / 1e3:.0f}",
                f"{told['long_below']:.1%}",
                f"{low:.1%} to {high:.1%}",
                f"{told['short_below']:.1%}",
                f"{told['all_below']:.1%}",
                f"{told['spread']:.2f}",
            )
        Console().print(table)
