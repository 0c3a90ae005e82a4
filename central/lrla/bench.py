"""`fabricpilot bench lrla`: completion times of long flows by scheme, over two and four routes, in the laboratory.

Every scheme meets the same traffic, seed by seed, so that what is compared are pairs. "below" is the share by which a
scheme's mean is below that of ECMP with one fixed priority, with a 95 % interval over the seeds (Student's t). Schemes
of `EARLY` are told of flows early, the others as the default thresholds say.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from fabricpilot.errors import UsageError
from fabricpilot.options import json_option, print_json

if TYPE_CHECKING:
    from central.lrla.flow_set import LongFlowScheme
    from central.lrla.laboratory import Lab, Outcome

BASELINE = "ecmp"
LATE = (BASELINE, "least-loaded", "shortest-first", "auto")
EARLY = ("young-first", "learned")
WITH_RATES = ("auto-rates", "learned-rates")  # the same networks, trained with the rate action: an ablation


@click.command()
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(2, 100), help="Runs of each scheme.")
@click.option("--routes", default="2,4", show_default=True, help="Numbers of spines, comma-separated.")
@click.option("--load", default=0.5, show_default=True, help="Of every host's link.")
@click.option("--oversubscription", default=2.0, show_default=True, help="Of the racks' uplinks.")
@click.option("--cdf", default="websearch_dctcp_bytes_trafficgenerator", show_default=True, help="Flow sizes.")
@click.option("--traffic-s", default=8.0, show_default=True, help="Seconds of traffic per run.")
@click.option(
    "--scheme",
    default=",".join((*LATE, *EARLY)),
    show_default=True,
    help=f"Comma-separated; there are also {', '.join(WITH_RATES)} (an ablation).",
)
@json_option
def lrla(
    seeds: int,
    routes: str,
    load: float,
    oversubscription: float,
    cdf: str,
    traffic_s: float,
    scheme: str,
    as_json: bool,
) -> None:
    """Long flows under ECMP, the rules, the learned policy and AuTO's."""
    from central.lrla.laboratory import Lab

    names = scheme.split(",")
    if unknown := [name for name in names if name not in (*LATE, *EARLY, *WITH_RATES)]:
        raise UsageError(f"--scheme '{unknown[0]}' is unknown; choose from: {', '.join((*LATE, *EARLY, *WITH_RATES))}")
    lab = Lab(cdf=cdf, load=load, oversubscription=oversubscription, traffic_s=traffic_s, renew_s=0.25)
    result: dict[str, Any] = {
        "cdf": cdf,
        "load": load,
        "oversubscription": oversubscription,
        "seeds": seeds,
        "routes": {spines: compare(replace(lab, spines=int(spines)), seeds, names) for spines in routes.split(",")},
    }
    if as_json:
        print_json(result)
        return
    _show(result["routes"])


def compare(lab: "Lab", seeds: int, names: Sequence[str] = (*LATE, *EARLY)) -> dict[str, Any]:
    """Schemes on one fabric: mean completion times in microseconds, and how far below the baseline they are."""
    from central.lrla import laboratory

    labs = {True: replace(lab, thresholds=laboratory.EARLY), False: lab}
    runs = {
        name: [
            laboratory.run(labs[name.removesuffix("-rates") in EARLY], _scheme(name, seed), seed)
            for seed in range(1, seeds + 1)
        ]
        for name in dict.fromkeys((BASELINE, *names))
    }
    return {name: _summary(outcomes, runs[BASELINE]) for name, outcomes in runs.items()}


def _scheme(name: str, seed: int) -> "LongFlowScheme":
    """For one run: AuTO's remembers, and draws by the seed."""
    from central.lrla.auto import auto
    from central.lrla.learned import LearnedScheme
    from central.lrla.rules import RULES
    from central.lrla.weights import PAPER, RATED, SHIPPED

    if name in RULES:
        return RULES[name]
    if name.startswith("auto"):
        return auto(RATED["auto"] if name in WITH_RATES else PAPER, seed)
    return LearnedScheme.load(RATED["learned"] if name in WITH_RATES else SHIPPED)


def _summary(outcomes: "list[Outcome]", base: "list[Outcome]") -> dict[str, Any]:
    import numpy as np

    told: dict[str, Any] = {"long_flows": sum(outcome.long_flows for outcome in outcomes)}
    for kind in ("long", "short", "all"):
        mine, theirs = (np.array([getattr(o, f"{kind}_fct_us") for o in group]) for group in (outcomes, base))
        told[f"{kind}_fct_us"] = round(float(mine.mean()), 1)
        told[f"{kind}_below"] = round(1 - float(mine.mean() / theirs.mean()), 4)
        told[f"{kind}_below_interval"] = _interval(1 - mine / theirs)
    for name in ("spread", "held"):
        told[name] = round(float(np.mean([getattr(outcome, name) for outcome in outcomes])), 3)
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
        for column in ("scheme", "long, ms", "below ECMP", "95 %", "others", "95 %", "all flows", "max-min"):
            table.add_column(column)
        for name, told in schemes.items():
            spans = {kind: "{:.1%} to {:.1%}".format(*told[f"{kind}_below_interval"]) for kind in ("long", "short")}
            table.add_row(
                name,
                f"{told['long_fct_us'] / 1e3:.0f}",
                f"{told['long_below']:.1%}",
                spans["long"],
                f"{told['short_below']:.1%}",
                spans["short"],
                f"{told['all_below']:.1%}",
                f"{told['spread']:.2f}",
            )
        Console().print(table)
